"""An engine of one process, on an optimizer of the JSON or of the script."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import nn

from tests.single import init_single_process


def engine_of(
    model: nn.Module, block: dict[str, Any], stage: int = 0, given: Any = None, **config: Any
) -> Any:
    init_single_process()
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "compression_training": block,
        **config,
    }
    if given is None:
        settings.setdefault("optimizer", {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}})
    listed = model.parameters() if given is None else None
    return deepspeed.initialize(model=model, model_parameters=listed, optimizer=given, config=settings)[0]
