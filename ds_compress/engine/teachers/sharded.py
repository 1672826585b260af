"""The teacher of a distillation: frozen, in eval mode, and sharded by its own ZeRO-3 inference engine."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.engine.signed import refuse_encrypted, refuse_unsigned, refuse_unsigned_object
from ds_compress.engine.teachers.identity import identity
from ds_compress.engine.zero import internals
from ds_compress.errors import ConfigError, Problem, shown
from ds_compress.sharding.shards import Shards

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PATH = "compression_training.distillation.teacher"


class ShardedTeacher:
    """A model to learn from; its engine is made at the first forward, when the student's exists.

    Args:
        model: the teacher; its parameters are frozen here.
        zero_stage: 3 keeps 1/world_size of it in each process and gathers one module at a time;
            0 keeps it whole everywhere (faster, for small teachers).
        dtype: of its parameters; None leaves them as they are.
        offload: "cpu" keeps a sharded teacher in host memory.
        autocast: what it computes in where that is not the precision of its weights.
    """

    model: nn.Module | None

    def __init__(
        self,
        model: nn.Module,
        zero_stage: int = 3,
        dtype: torch.dtype | None = None,
        offload: str = "none",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:
            _cast(model, dtype)
        self._zero_stage = zero_stage
        self._offload = offload
        self._autocast = autocast
        self._engine: Any = None

    @classmethod
    def of(
        cls, config: CompressionConfig, given: nn.Module | None, student: nn.Module
    ) -> ShardedTeacher | None:
        """The teacher that was given as an object, or the one the JSON names; None when there is neither.

        Raises:
            ConfigError: the JSON wants distillation and there is no teacher, or it cannot be loaded.
        """
        block = config.distillation
        if block is None or not block.enabled:
            return None if given is None else cls._for_layers(config, given, student)
        dtype = None if block.teacher_dtype is None else DTYPES[block.teacher_dtype]
        if given is not None and (block.self_teacher or block.teacher_cache):
            other = "self_teacher" if block.self_teacher else "teacher_cache"
            raise _error("a teacher object", f'no object where "{other}" is the teacher')
        if block.self_teacher is not None or block.teacher_cache is not None:
            return None
        settings = block.teacher_zero_stage, dtype, block.teacher_offload
        if given is not None:
            _refuse_shared(given, student)
            refuse_unsigned_object(given, config, "distillation", "teacher")
            return cls(given, *settings)
        if block.teacher is None:
            raise _error(
                None,
                "a path or name, an object given to ds_compress.initialize(..., teacher=model), self_teacher or "
                "teacher_cache",
            )
        refuse_unsigned(block.teacher, config, "distillation", "teacher")
        refuse_encrypted(block.teacher, "distillation", "teacher")
        return cls(_load(block.teacher, student, block.teacher_zero_stage, dtype), *settings)

    @classmethod
    def _for_layers(cls, config: CompressionConfig, given: nn.Module, student: nn.Module) -> ShardedTeacher:
        if config.layer_reduction is None or not config.layer_reduction.enabled:
            raise _error(
                "a teacher object", "a block with distillation or layer_reduction enabled, to use it"
            )
        _refuse_shared(given, student)
        refuse_unsigned_object(given, config, "layer_reduction")
        return cls(given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output for the student's inputs, without a graph; a collective under ZeRO-3.

        In eval mode, whatever its owner has set meanwhile.
        """
        if self._engine is None:
            self._engine = self._build_engine()
        assert self.model is not None
        with torch.no_grad(), evaluating(self.model):
            return self._engine(*args, **kwargs)

    def place(self, student: nn.Module, shards: Shards) -> None:
        """The student's engine exists, and its masters are at `shards`."""

    def identity(self) -> str | None:
        """What tells it from other teachers; a collective."""
        assert self.model is not None
        return identity(self.model)

    def follow(self, student: nn.Module) -> None:
        """The student took a step."""

    def fragment_state(self, shards: Shards) -> dict[str, dict[str, torch.Tensor]]:
        """What of its weights only this run knows, as `Technique.fragment_state`."""
        return {}

    def load_fragment_state(self, shards: Shards, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restores what `fragment_state` returned."""

    def _build_engine(self) -> Any:
        assert self.model is not None
        parameter = next(self.model.parameters())
        if self._zero_stage == 0 and not internals.is_zero3_parameter(parameter):
            from deepspeed.accelerator import get_accelerator

            model = self.model.to(get_accelerator().current_device_name())
            return model if self._autocast is None else _UnderAutocast(model, self._autocast)
        known = _engines.get(self.model)
        engine = None if known is None else known()
        if engine is None:
            engine = self._sharding_engine(parameter.dtype)
            _engines[self.model] = weakref.ref(engine)
        return engine

    def _sharding_engine(self, dtype: torch.dtype) -> Any:
        import deepspeed

        config = zero3_config(dtype)
        if self._offload == "cpu":
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        if self._autocast is not None:
            config["torch_autocast"] = {"enabled": True, "dtype": str(self._autocast).removeprefix("torch.")}
        engine, *_ = deepspeed.initialize(model=self.model, config=config)
        engine.eval()
        return engine


_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""Of sharded teachers: a model is sharded once, however many students it has. Its hooks keep the engine alive."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, without dropout, and without moving what a normalization remembers."""
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True


class _UnderAutocast:
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self._model.parameters()).device.type
        with torch.autocast(device, dtype=self._dtype):
            return self._model(*args, **kwargs)


def zero3_config(dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed config of a sharded model that never trains."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31 - 1,
        # What ZeRO-3 kept whole because it is small, or used again soon, would not notice when its shards change.
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    if dtype is torch.bfloat16:
        config["bf16"] = {"enabled": True}
    elif dtype is torch.float16:
        config["fp16"] = {"enabled": True}
    return config


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    if not any(internals.is_zero3_parameter(parameter) for parameter in model.parameters()):
        model.to(dtype)
        return
    if any(p.is_floating_point() and p.dtype is not dtype for p in model.parameters()):
        allowed = "a teacher object that already has that precision, when it is sharded by zero.Init"
        raise ConfigError([Problem(f"{_PATH}_dtype", shown(str(dtype).removeprefix("torch.")), allowed)])


def _load(name_or_path: str, student: nn.Module, zero_stage: int, dtype: torch.dtype | None) -> nn.Module:
    """The same class as the student, as transformers loads it; sharded from the start under ZeRO-3."""
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
        with _loading_for(zero_stage, dtype):
            teacher: nn.Module = loader(name_or_path, **({} if dtype is None else {"dtype": dtype}))
    except (OSError, ValueError) as error:
        allowed = f"something that {type(student).__name__}.from_pretrained can load ({error})"
        raise _error(name_or_path, allowed) from error
    return teacher


@contextlib.contextmanager
def _loading_for(zero_stage: int, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, transformers loads models as the teacher's stage wants them, whatever the student's is."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    before = None if reference is None else reference()
    shards = zero_stage == 3 and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    integration.unset_hf_deepspeed_config()
    # Held here: the integration keeps a weak reference.
    chosen = integration.HfDeepSpeedConfig(zero3_config(dtype or torch.float32)) if shards else None
    try:
        yield
    finally:
        del chosen
        integration.unset_hf_deepspeed_config()
        if before is not None:
            integration.set_hf_deepspeed_config(before)


def _refuse_shared(teacher: nn.Module, student: nn.Module) -> None:
    """A teacher is frozen, and a weight that both have would be frozen in the student too, or move in both.

    Raises:
        ConfigError: the student trains a parameter, or a memory, that the teacher has.
    """
    if teacher is student:
        raise _error(
            "the student itself", "another model object", "give ds_compress.initialize copy.deepcopy(model)"
        )
    theirs = dict(teacher.named_parameters())
    ids = {id(parameter): name for name, parameter in theirs.items()}
    memories = {_memory(parameter): name for name, parameter in theirs.items()}
    shared = [
        (name, ids.get(id(own)) or memories[_memory(own)])
        for name, own in student.named_parameters()
        if own.requires_grad and (id(own) in ids or (_memory(own) is not None and _memory(own) in memories))
    ]
    if shared:
        mine, its = shared[0]
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise _error(
            f"a teacher object whose {its} is the student's {mine}{more}",
            "one with weights of its own, because a teacher is frozen and a student trains",
            "give ds_compress.initialize copy.deepcopy(teacher), or freeze what both have in the student",
        )


def _memory(parameter: nn.Parameter) -> int | None:
    """Where its elements are; None for those that are elsewhere (sharded, or without data)."""
    if parameter.is_meta or not parameter.numel() or internals.is_zero3_parameter(parameter):
        return None
    return parameter.untyped_storage().data_ptr() or None


def _error(got: Any, allowed: str, hint: str = "") -> ConfigError:
    return ConfigError([Problem(_PATH, shown(got), allowed, hint)])
