"""An engine that may be given its teacher, as tests of teachers train it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

import ds_compress
from tests.multirank.common import ds_config


@contextlib.contextmanager
def engine_of(
    model: nn.Module, block: dict[str, Any], teacher: nn.Module | None = None, stage: int = 0
) -> Iterator[Any]:
    config = {**ds_config(stage, block), "train_micro_batch_size_per_gpu": 8}
    engine, *_ = ds_compress.initialize(
        model=model, model_parameters=model.parameters(), config=config, teacher=teacher
    )
    try:
        yield engine
    finally:
        engine.destroy()
