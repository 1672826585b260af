"""Fused experts that run on stored integers: one product for all experts of a layer, on the grouped integer kernels.

The class of the module is changed to one that derives from it, so its gate, its activation and its norms are its own;
the forward is that of transformers' "grouped_mm" (`transformers.integrations.moe`) on packed matrices. Experts that
the kernels do not fit are dequantized once, and their own forward multiplies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ds_compress.export.integer_kernels import misfit, takes_groups
from ds_compress.export.quantized_experts import QuantizedExperts
from ds_compress.export.read import InputScheme
from ds_compress.modelinfo.experts import follows_registry
from ds_compress.ops import kernels
from ds_compress.quant import layers
from ds_compress.quant.qparams import qparams_from_range

_DOWN = "down_proj"
STACKS = "_ds_compress_stacks"


@dataclass(frozen=True, eq=False)
class PackedStack:
    """The matrices of all experts, packed for the kernels of this machine.

    packed: uint8 (experts, bytes). weight_scale: fp32 (experts, out_features), None where int4 matrices hold theirs.
    input_scale: fp32 (experts,) of static ranges, None: one per row. steps: see `Grid.scale_divisor`.
    """

    packed: torch.Tensor
    weight_scale: torch.Tensor | None
    out_features: int
    in_features: int
    group_size: int
    input_scale: torch.Tensor | None
    steps: int

    @classmethod
    def of(cls, experts: QuantizedExperts, used: InputScheme) -> PackedStack:
        """One expert after the other, so that no second stack is in memory."""
        first, ops = experts.first, kernels()
        in_groups = takes_groups(first)
        packed: torch.Tensor | None = None
        for number, matrix in enumerate(experts.matrices):
            own = (
                ops.int4_linear_pack(matrix.values, matrix.scale)
                if in_groups
                else ops.int8_linear_pack(matrix.values)
            )
            if packed is None:
                packed = own.new_empty(len(experts.matrices), own.numel())
            packed[number] = own
        assert packed is not None
        scale = None if in_groups else torch.stack([matrix.scale[:, 0] for matrix in experts.matrices])
        given = None
        if used.input_range is not None:
            lowest, highest = used.input_range[:, 0], used.input_range[:, 1]
            given = qparams_from_range(lowest, highest, used.grid).scale.contiguous()
        rows, columns = first.values.shape
        return cls(packed, scale, rows, columns, first.group_size, given, used.grid.scale_divisor)

    def multiply(self, x: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (rows, in_features), sorted by expert, -> (rows, out_features); see `int8_grouped_linear`."""
        rest = (offsets, bias, self.input_scale)
        y: torch.Tensor
        if self.weight_scale is None:
            y = kernels().int4_grouped_linear(
                x, self.packed, self.out_features, self.group_size, *rest, steps=self.steps
            )
        else:
            y = kernels().int8_grouped_linear(x, self.packed, self.weight_scale, *rest, steps=self.steps)
        return y


class ServedExperts(nn.Module):
    """Fused experts with integer inputs and weights. Gives what the class's own forward gives on their values, but for
    the rounding of sums, which are exact here. There is no `gate_up_proj` or `down_proj` that code could read."""

    _ds_compress_base_class: ClassVar[type[nn.Module]]
    # Of the base class, see `transformers.integrations.moe.use_experts_implementation`.
    has_gate: bool
    has_post_expert_norm: bool

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (tokens, hidden); top_k_index, top_k_weights (tokens, chosen): experts of each token, and how
        much of each goes on. An index beyond the last expert stands for one of another process, and gives 0."""
        base = cast(Any, self)
        stacks: Mapping[str, PackedStack] = self.__dict__[STACKS]
        up, down = stacks
        tokens, chosen = top_k_index.shape
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        numbers = torch.arange(len(stacks[up].packed), device=experts.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, numbers, right=True)
        inner = stacks[up].multiply(hidden_states[order // chosen], offsets, self._bias(up))
        inner = base._apply_gate(inner) if self.has_gate else base.act_fn(inner)
        y = stacks[down].multiply(inner, offsets, self._bias(down))
        if self.has_post_expert_norm:
            y = base.post_expert_norm(y)
        weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        by_token = torch.empty_like(weighted)
        by_token[order] = weighted
        return by_token.view(tokens, chosen, y.shape[1]).sum(dim=1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        stacks: Mapping[str, PackedStack] = self.__dict__[STACKS]
        parts = [self._ds_compress_base_class.extra_repr(self)]
        for name, stack in stacks.items():
            kind = "int8" if stack.weight_scale is not None else f"int4 in groups of {stack.group_size}"
            parts.append(f"{name}=({len(stack.packed)}, {stack.out_features}, {stack.in_features}) {kind}")
        return ", ".join(part for part in parts if part)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle its base, not its name.
        return _rebuild, (self._ds_compress_base_class,), self.__dict__

    def _bias(self, matrix: str) -> torch.Tensor | None:
        return self._parameters.get(f"{matrix}_bias")


def serve_experts(
    module: nn.Module, experts: Mapping[str, QuantizedExperts], inputs: Mapping[str, InputScheme]
) -> str | None:
    """Gives fused experts, in place, the matrices `experts` by their names, and `inputs` rounded as they were.

    Everything else of the module is loaded. Returns why they are dequantized and compute in floats, None where they
    run on the integer kernels.
    """
    reason = _misfit(module, experts, inputs)
    if reason is None:
        up = next(name for name in experts if name != _DOWN)
        stacks = {name: PackedStack.of(experts[name], inputs[name]) for name in (up, _DOWN)}
        for name in stacks:
            del module._parameters[name]
        vars(module)[STACKS] = stacks
        cast(Any, module).__class__ = _served_class(type(module))
        return None
    for name, stack in experts.items():
        module._parameters[name] = nn.Parameter(stack.dequantize(), requires_grad=False)
    for name, used in inputs.items():
        count = len(experts[name].matrices)
        quantizer = layers.ExpertsInputQuantizer(used.grid, True, used.input_range, experts=count)
        layers.attach(module).set_input_quantizer(name, quantizer)
    return reason


def _misfit(
    module: nn.Module, experts: Mapping[str, QuantizedExperts], inputs: Mapping[str, InputScheme]
) -> str | None:
    if not follows_registry(module):
        return f"{type(module).__name__} does not multiply as transformers' registry of experts expects"
    up = "gate_up_proj" if cast(Any, module).has_gate else "up_proj"
    if set(experts) != {up, _DOWN}:
        return f"of {up} and {_DOWN} only {', '.join(experts)} is quantized"
    return misfit_of_experts(experts, inputs)


def misfit_of_experts(
    experts: Mapping[str, QuantizedExperts], inputs: Mapping[str, InputScheme]
) -> str | None:
    """Why the grouped kernels do not compute with these stacks and inputs; None where they do."""
    for name, stack in experts.items():
        used = inputs.get(name)
        reason = misfit(stack.first, used)
        if reason is not None:
            return f"{name}: {reason}"
        if used is not None and used.input_range is not None and not bool(used.input_range.isfinite().all()):
            return f"{name}: some experts have no range for their inputs, which pass as they are"
    return None


_classes: dict[type[nn.Module], type[ServedExperts]] = {}


def _served_class(base: type[nn.Module]) -> type[ServedExperts]:
    if base not in _classes:
        namespace: dict[str, Any] = {
            "_ds_compress_base_class": base,
            "__module__": __name__,
            "__doc__": ServedExperts.__doc__,
        }
        made = type(f"Served{base.__name__}", (ServedExperts, base), namespace)
        _classes[base] = cast("type[ServedExperts]", made)
    return _classes[base]


def _rebuild(base: type[nn.Module]) -> ServedExperts:
    made = _served_class(base)
    return made.__new__(made)
