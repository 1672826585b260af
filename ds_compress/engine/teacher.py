"""The teacher of a distillation: frozen, in eval mode, and sharded by its own ZeRO-3 inference engine."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ds_compress.config.errors import ConfigError, Problem, shown
from ds_compress.config.schema import CompressionConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PATH = "compression_training.distillation.teacher"


class Teacher:
    """A model to learn from; its engine is made at the first forward, when the student's exists.

    Args:
        model: the teacher; its parameters are frozen here.
        zero_stage: 3 keeps 1/world_size of it in each process and gathers one module at a time;
            0 keeps it whole everywhere (faster, for small teachers).
        dtype: of its parameters; None leaves them as they are.
    """

    def __init__(self, model: nn.Module, zero_stage: int = 3, dtype: torch.dtype | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:
            self.model.to(dtype)
        self._zero_stage = zero_stage
        self._engine: Any = None

    @classmethod
    def of(cls, config: CompressionConfig, given: nn.Module | None, student: nn.Module) -> Teacher | None:
        """The teacher that was given as an object, or the one the JSON names; None when there is neither.

        Raises:
            ConfigError: the JSON wants distillation and there is no teacher, or it cannot be loaded.
        """
        block = config.distillation
        if block is None or not block.enabled:
            return None if given is None else cls._for_layers(config, given)
        dtype = None if block.teacher_dtype is None else _DTYPES[block.teacher_dtype]
        if given is not None:
            return cls(given, block.teacher_zero_stage, dtype)
        if block.teacher is None:
            raise _error(
                None, "a path or name, or an object given to ds_compress.initialize(..., teacher=model)"
            )
        return cls(_load(block.teacher, student), block.teacher_zero_stage, dtype)

    @classmethod
    def _for_layers(cls, config: CompressionConfig, given: nn.Module) -> Teacher:
        if config.layer_reduction is None or not config.layer_reduction.enabled:
            raise _error(
                "a teacher object", "a block with distillation or layer_reduction enabled, to use it"
            )
        return cls(given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output for the student's inputs, without a graph; a collective under ZeRO-3."""
        if self._engine is None:
            self._engine = self._build_engine()
        with torch.no_grad():
            return self._engine(*args, **kwargs)

    def _build_engine(self) -> Any:
        parameter = next(self.model.parameters())
        if self._zero_stage == 0 and not hasattr(parameter, "ds_id"):
            from deepspeed.accelerator import get_accelerator

            return self.model.to(get_accelerator().current_device_name())
        import deepspeed

        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 2**31 - 1,
            "zero_optimization": {"stage": 3},
        }
        if parameter.dtype is torch.bfloat16:
            config["bf16"] = {"enabled": True}
        elif parameter.dtype is torch.float16:
            config["fp16"] = {"enabled": True}
        engine, *_ = deepspeed.initialize(model=self.model, config=config)
        engine.eval()
        return engine


def _load(name_or_path: str, student: nn.Module) -> nn.Module:
    """The same class as the student, as transformers loads it."""
    loader = getattr(type(student), "from_pretrained", None)
    if loader is None:
        raise _error(
            name_or_path,
            f"an object given to ds_compress.initialize(..., teacher=model): {type(student).__name__} has no "
            "from_pretrained",
        )
    if os.sep in name_or_path and not os.path.isdir(name_or_path):
        raise _error(name_or_path, "an existing folder with config.json and weights, or a model name")
    try:
        teacher: nn.Module = loader(name_or_path)
    except (OSError, ValueError) as error:
        allowed = f"something that {type(student).__name__}.from_pretrained can load ({error})"
        raise _error(name_or_path, allowed) from error
    return teacher


def _error(got: Any, allowed: str) -> ConfigError:
    return ConfigError([Problem(_PATH, shown(got), allowed)])
