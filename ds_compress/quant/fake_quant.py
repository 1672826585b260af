"""Fake-quantized weights and inputs, as a layer computes with them now."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ds_compress.ops.counter_rng import uniform
from ds_compress.quant.arithmetic import (
    clamp_to_dtype,
    dequantize_,
    normalize,
    round_and_clamp_,
    working_dtype,
)
from ds_compress.quant.fused import FakeQuantized, fake_quantize_rows, input_rows, weight_rows
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.layout import join_weight, split_weight
from ds_compress.quant.qparams import QParams, choose_qparams, global_scale_for, qparams_from_range
from ds_compress.quant.weights import (
    choose_weight_qparams,
    learned_qparams,
    own_global_scale,
    quantize_blocks,
)


@dataclass(frozen=True)
class FakeQuantConfig:
    """How a weight is quantized now: y = blend_ratio * w + (1 - blend_ratio) * Q(w).

    noise_key: the key of `counter_rng.uniform` for stochastic rounding. step_ratio: what a learned step size is
    multiplied by where the grid has fewer or more values than the one that it was made for. clipped_ste: whether
    clipped weights get no gradient (learned scales need that) or a plain straight-through one. kernel: what a layer
    multiplies once its input is quantized too: "float" numbers on their grids, or the codes themselves, "int8"
    (`integer_linear`) or "fp8" (`fp8_linear`). backward: how the gradient of the input is multiplied, "float" or "int8"
    (`integer_linear.input_gradient`, beside that kernel only). global_scale: fp32 (1,) of a grid that has one, of a
    stack one for each matrix; None: that of the weight at hand.
    """

    grid: WeightGrid
    noise_key: int = 0
    blend_ratio: float = 0.0
    step_ratio: float = 1.0
    clipped_ste: bool = True
    kernel: str = "float"
    backward: str = "float"
    global_scale: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def changes_gradient(self) -> bool:
        """Whether the gradient of the weight is not simply that of the quantized weight."""
        return self.clipped_ste and self.grid.may_clip


def weight_qparams(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None = None
) -> list[QParams]:
    """QParams of each block of `layout.split_weight`: chosen from the values, or made from learned step sizes."""
    if step_size is None:
        return choose_weight_qparams(weight, fake_quant.grid, fake_quant.global_scale)
    scale = step_size.to(working_dtype(weight)) * fake_quant.step_ratio
    return learned_qparams(scale, weight.shape, fake_quant.grid, fake_quant.global_scale)


def fake_quantize_weight(
    weight: torch.Tensor,
    fake_quant: FakeQuantConfig,
    step_size: torch.Tensor | None = None,
    qparams: list[QParams] | None = None,
    with_unclipped: bool = False,
) -> FakeQuantized:
    """blend_ratio * w + (1 - blend_ratio) * Q(w) in the dtype and shape of the weight.

    Args:
        qparams: those of an earlier call; by default as `weight_qparams` makes them.
        with_unclipped: also return which weights did not clip, where one pass can (else `unclipped` is None).
    """
    grid = fake_quant.grid
    # The kernel knows one global scale at a time.
    several = grid.stacked and grid.has_global_scale
    if qparams is None and (step_size is not None or grid.granularity is Granularity.PER_BLOCK or several):
        qparams = weight_qparams(weight, fake_quant, step_size)
    # A blend is computed in fp32 and cast last, which one pass over a 16-bit weight cannot do.
    is_blended = bool(fake_quant.blend_ratio) and weight.dtype is not torch.float32
    rows = None if is_blended else weight_rows(weight, grid)
    if rows is not None:
        given = None if qparams is None else qparams[0]
        shared = None
        if given is None and grid.has_global_scale:
            shared = (
                fake_quant.global_scale
                if fake_quant.global_scale is not None
                else own_global_scale(weight, grid)
            )
        one_pass = fake_quantize_rows(rows, grid, given, with_unclipped, shared)
        values, unclipped = one_pass.values.view(weight.shape), one_pass.unclipped
        if qparams is None:
            groups = split_weight(weight.contiguous(), grid)[0].shape[:-2]
            qparams = [_broadcast(q, (*groups, 1, 1)) for q in one_pass.qparams]
    else:
        qparams = qparams or choose_weight_qparams(weight, grid, fake_quant.global_scale)
        blocks = quantize_blocks(weight, qparams, grid, rounding_noise(weight, fake_quant))
        dequantized = [dequantize_(block, q) for block, q in zip(blocks, qparams, strict=True)]
        values, unclipped = clamp_to_dtype(join_weight(dequantized, weight.shape, grid), weight.dtype), None
    if fake_quant.blend_ratio:
        values = values.mul_(1 - fake_quant.blend_ratio).add_(weight, alpha=fake_quant.blend_ratio)
    return FakeQuantized(values.to(weight.dtype), qparams, unclipped)


def rounding_noise(weight: torch.Tensor, fake_quant: FakeQuantConfig) -> torch.Tensor | None:
    """The noise of stochastic rounding for each weight, a function of the config; None for rounding to nearest."""
    if not fake_quant.grid.stochastic:
        return None
    return uniform(weight.shape, fake_quant.noise_key, device=weight.device).to(working_dtype(weight))


def fake_quantize_input(
    x: torch.Tensor,
    grid: ActivationGrid,
    fixed_range: torch.Tensor | None = None,
    qparams: QParams | None = None,
    with_unclipped: bool = False,
) -> FakeQuantized:
    """Q(x) in the dtype and shape of x.

    Args:
        fixed_range: the two numbers (min, max) of a static grid.
        qparams: those of an earlier call; by default as `input_qparams` makes them.
        with_unclipped: also return which values did not clip, where one pass can (else `unclipped` is None).
    """
    if qparams is None and _has_one_scale(grid):
        qparams = input_qparams(x, grid, fixed_range)
    rows = input_rows(x, grid)
    if rows is None:
        qparams = qparams or input_qparams(x, grid, fixed_range)
        grouped = in_groups(x.to(working_dtype(x)), grid)
        quantized = round_and_clamp_(normalize(grouped, qparams), grid)
        values = clamp_to_dtype(dequantize_(quantized, qparams), x.dtype)
        return FakeQuantized(values.to(x.dtype).view(x.shape), [qparams])
    shared = global_input_scale(x, grid, fixed_range) if qparams is None else None
    one_pass = fake_quantize_rows(rows, grid, qparams, with_unclipped, shared)
    if qparams is None:
        qparams = _broadcast(one_pass.qparams[0], _shape_of_scales(x, grid))
    return FakeQuantized(one_pass.values.view(x.shape), [qparams], one_pass.unclipped)


def _shape_of_scales(x: torch.Tensor, grid: ActivationGrid) -> tuple[int, ...]:
    """In which they broadcast over `in_groups` of x."""
    match grid.granularity:
        case TokenGranularity.PER_TENSOR:
            return (1,) * x.dim()
        case TokenGranularity.PER_SAMPLE:
            return (x.shape[0], *[1] * (x.dim() - 1))
        case _:
            return (*in_groups(x, grid).shape[:-1], 1)


def _has_one_scale(grid: ActivationGrid) -> bool:
    """Whether it is found in a pass of its own, before that of the kernel."""
    if grid.has_global_scale:
        return False
    return grid.static or (grid.granularity is TokenGranularity.PER_TENSOR and grid.format == "int")


def in_groups(x: torch.Tensor, grid: ActivationGrid) -> torch.Tensor:
    """x, of which the last axis is one group where groups of neighbours share a scale."""
    if grid.granularity is not TokenGranularity.PER_TOKEN_GROUP:
        return x
    return x.unflatten(-1, (-1, grid.group_size))


def global_input_scale(
    x: torch.Tensor, grid: ActivationGrid, fixed_range: torch.Tensor | None
) -> torch.Tensor | None:
    """fp32 (1,): of a static grid that of `fixed_range`, else that of x; None for grids without."""
    if not grid.has_global_scale:
        return None
    lowest, highest = _required_range(fixed_range) if grid.static else x.detach().aminmax()
    return global_scale_for(torch.maximum(highest, lowest.neg()), grid).to(x.device)


def input_qparams(x: torch.Tensor, grid: ActivationGrid, fixed_range: torch.Tensor | None) -> QParams:
    """QParams of x: chosen from its values or, static, for the two numbers (min, max) of `fixed_range`.

    They broadcast over `in_groups` of x.

    Raises:
        ValueError: the grid is static and there is no `fixed_range`.
    """
    x = x.to(working_dtype(x))
    if grid.static and not grid.has_global_scale:
        lowest, highest = _required_range(fixed_range)
        return qparams_from_range(lowest.to(x.dtype), highest.to(x.dtype), grid)
    shared = global_input_scale(x, grid, fixed_range)
    match grid.granularity:
        case TokenGranularity.PER_TOKEN | TokenGranularity.PER_TOKEN_GROUP:
            return choose_qparams(in_groups(x, grid), (-1,), grid, shared)
        case TokenGranularity.PER_SAMPLE:
            return choose_qparams(x, tuple(range(1, x.dim())), grid, shared)
        case TokenGranularity.PER_TENSOR:
            return choose_qparams(x, tuple(range(x.dim())), grid, shared)


def _required_range(fixed_range: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    if fixed_range is None:
        raise ValueError("a static activation grid needs a range")
    return fixed_range.unbind()


def _broadcast(qparams: QParams, shape: tuple[int, ...]) -> QParams:
    """QParams of rows in the shape that broadcasts over the values."""
    offset = None if qparams.offset is None else qparams.offset.view(shape)
    return QParams(qparams.scale.view(shape), offset)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """In which a product with x runs under autocast; None where that does nothing to it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
