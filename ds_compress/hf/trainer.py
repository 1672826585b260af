"""A Trainer that is handed its teacher."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from ds_compress.config import ConfigError
from ds_compress.config.schema.compression_training import CompressionConfig, parse_config
from ds_compress.engine.build import teacher_given
from ds_compress.errors import Problem, shown
from ds_compress.hf.callback import CompressionCallback

_PATH = "compression_training.distillation"


class DistillationTrainer(Trainer):
    """`Trainer(**kwargs)` whose model imitates `teacher`, as the JSON's `distillation` block says.

    The losses are added inside the engine, as they are for a plain Trainer whose JSON names the teacher; this form
    is for a teacher that exists as an object. The log of each training loss has `compression/distillation/<loss>`.

    Args:
        teacher: a model that reads the same inputs; frozen and sharded here. Overrides `distillation.teacher`.
        **kwargs: those of `transformers.Trainer`; `args.deepspeed` must be given.

    Raises:
        ConfigError: no DeepSpeed config, or none with an enabled `distillation` block.
    """

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _require_distillation(getattr(self.args, "hf_deepspeed_config", None))
        self.teacher = teacher
        CompressionCallback.add_to(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with teacher_given(self.teacher):
            return super().train(*args, **kwargs)


def _require_distillation(hf_config: Any) -> None:
    if hf_config is None:
        problem = Problem(
            "TrainingArguments.deepspeed",
            "nothing",
            'a DeepSpeed config with {"compression_training": {"distillation": {"enabled": true, ...}}}',
            "a plain Trainer trains without a teacher",
        )
        raise ConfigError([problem])
    block = hf_config.config.get("compression_training")
    parsed = parse_config(block) if block is not None else CompressionConfig()
    if parsed.distillation is None or not parsed.distillation.enabled:
        raise ConfigError(
            [
                Problem(
                    _PATH,
                    "absent" if parsed.distillation is None else shown({"enabled": False}),
                    'a block that says which losses to use, e.g. {"enabled": true, "losses": {"logits": {}}}',
                    "add it to the JSON of TrainingArguments(deepspeed=...), or use a plain Trainer",
                )
            ]
        )
