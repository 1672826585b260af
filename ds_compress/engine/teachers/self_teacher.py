"""Teachers that are the student itself: as it was, as it has been on average, or as it is without quantizers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.engine.teachers.sharded import DTYPES, ShardedTeacher, evaluating, zero3_config
from ds_compress.engine.zero import internals
from ds_compress.engine.zero.parameters import full_parameters
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.quant.qat_module import MATRICES
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.kv_cache import KEYS, VALUES


def self_teacher(config: CompressionConfig, model: nn.Module, before: bool) -> ShardedTeacher | None:
    """The teacher that the JSON's `self_teacher` asks for, made from `model`; None when it asks for none.

    before: whether layer reduction is still to come: `initial` copies the model then, the others as it is afterwards.
    """
    block = config.distillation
    if block is None or not block.enabled or block.self_teacher is None:
        return None
    weights = block.self_teacher.weights
    if before != (weights == "initial"):
        return None
    if weights == "current" or _stays_as_it_is(config):
        return CurrentTeacher(model)
    dtype = None if block.teacher_dtype is None else DTYPES[block.teacher_dtype]
    if weights == "initial":
        return ShardedTeacher(frozen_copy(model, block.teacher_zero_stage, dtype), block.teacher_zero_stage, None,
                       block.teacher_offload)  # fmt: skip
    return EmaTeacher(model, block.self_teacher.decay, block.teacher_offload)


def _stays_as_it_is(config: CompressionConfig) -> bool:
    """Whether the model without its quantizers is what it was: only scales train, and nothing is cut."""
    quantization = config.weight_quantization
    if quantization is None or not quantization.is_enabled or quantization.settings.train != "scales":
        return False
    changing = [name for name, block in config.enabled_blocks().items() if not block.is_in_forward]
    return not set(changing) - {
        "distillation",
        "gradient_compression",
        "parameter_compression",
        "robust_reduction",
    }


class CurrentTeacher(ShardedTeacher):
    """The student as it is now, its quantizers off for the time of a forward; needs no memory."""

    def __init__(self, student: nn.Module) -> None:
        self.model = student

    def identity(self) -> None:
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        with torch.no_grad(), quantizers_off(self.model), evaluating(self.model):
            return self.model(*args, **kwargs)


class EmaTeacher(ShardedTeacher):
    """After each step, average <- decay * average + (1 - decay) * student (Tarvainen & Valpola 2017, Mean Teacher).

    Kept in fp32, sharded as the student is; without communication. It averages the weights as the student's forward
    sees them, masked and before quantizers. Buffers (what a BatchNorm remembers) are the student's, as in torch's
    `AveragedModel`: they are averages already.
    """

    def __init__(self, student: nn.Module, decay: float, offload: str) -> None:
        stage = 3 if internals.is_zero3_parameter(next(student.parameters())) else 0
        super().__init__(frozen_copy(student, stage, torch.float32), stage, None, offload)
        self._decay = decay
        self._student = student

    def identity(self) -> None:
        return None

    def place(self, student: nn.Module, shards: Shards) -> None:
        self._student = student
        dtype = next(student.parameters()).dtype
        self._autocast = None if dtype is torch.float32 else dtype
        self._zero_stage = 3 if shards.is_sharded else 0

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        for _, average, own in self._pairs(student):
            target, value = _aligned(average, own)
            target.lerp_(value.to(target), 1.0 - self._decay)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._copy_buffers()
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        assert self.model is not None
        own = dict(self._student.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name in own:
                buffer.copy_(own[name])

    @torch.no_grad()
    def fragment_state(self, shards: Shards) -> dict[str, dict[str, torch.Tensor]]:
        state = {}
        for name, average in self._named().items():
            with full_parameters([average]):
                fragment = shards.fragments.get(name)
                if fragment is not None:
                    part = average.detach().flatten()[fragment.start : fragment.start + fragment.numel]
                    state[name] = part.float().clone()
        return {"average": state}

    @torch.no_grad()
    def load_fragment_state(self, shards: Shards, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        parts = state.get("average")
        if parts is None:
            return
        for name, average in self._named().items():
            whole = torch.zeros(torch.Size(shape_of(average)).numel())
            fragment = shards.fragments.get(name)
            if fragment is not None and name in parts:
                whole[fragment.start : fragment.start + fragment.numel] = parts[name]
            whole = shards.sum(whole)
            with full_parameters([average], write=True):
                average.data.copy_(whole.view(average.shape))

    def _named(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return dict(self.model.named_parameters())

    def _pairs(self, student: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        own = dict(student.named_parameters())
        return ((name, average, own[name]) for name, average in self._named().items())


def frozen_copy(model: nn.Module, zero_stage: int, dtype: torch.dtype | None) -> nn.Module:
    """A copy of `model` with parameters of its own; under ZeRO-3 sharded from the start, one parameter whole at a time.

    A collective when either of them is sharded.
    """
    shells: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(shape_of(parameter), device="meta")
        shells[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    copied: nn.Module = copy.deepcopy(model, dict(shells))
    made: dict[int, nn.Parameter] = {}
    for parameter in model.parameters():
        with full_parameters([parameter]):
            value = parameter.detach().to(dtype=dtype or parameter.dtype, copy=True)
        made[id(shells[id(parameter)])] = (
            _sharded(value) if _shards(zero_stage) else nn.Parameter(value, False)
        )
    for module in copied.modules():
        module._parameters = {
            name: parameter if parameter is None else made[id(parameter)]
            for name, parameter in module._parameters.items()
        }
    return copied


def _shards(zero_stage: int) -> bool:
    return zero_stage == 3 and dist.is_initialized() and dist.get_world_size() > 1


def _sharded(value: torch.Tensor) -> nn.Parameter:
    import deepspeed

    holder = nn.Module()
    holder.register_parameter("value", nn.Parameter(value, requires_grad=False))
    deepspeed.zero.Init(module=holder, config_dict_or_path=zero3_config(value.dtype), dtype=value.dtype)
    return holder.get_parameter("value")


def _aligned(average: Any, own: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same elements of both, as far as this process has them."""
    if not internals.is_zero3_parameter(average):
        assert not internals.is_zero3_parameter(own)
        return average.data, own.data
    shard = average.ds_tensor
    if internals.is_zero3_parameter(own):
        return shard, own.ds_tensor
    start = shard.numel() * dist.get_rank(average.ds_process_group)
    part = own.detach().flatten()[start : start + shard.numel()]
    return shard[: part.numel()], part


@contextlib.contextmanager
def quantizers_off(
    model: nn.Module, kinds: Sequence[str] = ("weight_quantizer", "input_quantizer", KEYS, VALUES)
) -> Iterator[None]:
    """Inside, the layers of `model` compute as they do without quantization; `kinds`: without which of them."""
    switched: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        for attribute in (*kinds, *(f"{kind}{MATRICES}" for kind in kinds)):
            if attribute in vars(module):
                switched.append((module, attribute, vars(module)[attribute]))
                vars(module)[attribute] = None
    try:
        yield
    finally:
        for module, attribute, quantizer in switched:
            vars(module)[attribute] = quantizer
