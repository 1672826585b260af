"""QParams, the scale and the offset of a group of values: chosen from the values, or made from a given range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_compress.ops.reference.division import divided
from ds_compress.ops.reference.fake_quantize import SMALLEST_SCALE, asymmetric_range
from ds_compress.ops.reference.float_formats import (
    ScaleKind,
    block_scale,
    global_scale_of,
    power_of_two,
    stored_e4m3,
)
from ds_compress.quant.grid import Grid, Levels


@dataclass(frozen=True)
class QParams:
    """How the values of a group are read back: q * scale + offset. The tensors broadcast over the values.

    offset: -zero_point * scale, None on symmetric grids. threshold: of ternary grids only.
    """

    scale: torch.Tensor
    offset: torch.Tensor | None = None
    threshold: torch.Tensor | None = None


def choose_qparams(
    values: torch.Tensor, axes: tuple[int, ...], grid: Grid, global_scale: torch.Tensor | None = None
) -> QParams:
    """The qparams of groups that lie along `axes` (kept as size 1) of an fp32 or fp64 tensor.

    global_scale: one fp32 number, or what broadcasts over the groups, for grids that have one; by default that of these
    values.
    """
    if values.numel() == 0:
        nothing = values.sum(axes, keepdim=True)
        if grid.format != "int":
            return QParams(torch.ones_like(nothing))
        return qparams_from_range(nothing, nothing, grid)
    match grid.levels:
        case Levels.TERNARY:
            return _choose_ternary(values, axes)
        case Levels.BINARY:
            mean = mean_magnitude(values, axes)
            return QParams(scale=_nan_unless_finite(mean, mean))
        case Levels.UNIFORM:
            # Twice faster than aminmax or a vector norm, which are not vectorised along an axis.
            lowest, highest = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
            return qparams_from_range(lowest, highest, grid)
        case Levels.FLOAT | Levels.CODEBOOK:
            return QParams(_float_scale(values.abs().amax(axes, keepdim=True), grid, global_scale))


def _float_scale(amax: torch.Tensor, grid: Grid, global_scale: torch.Tensor | None) -> torch.Tensor:
    known = grid.number_format
    assert known is not None
    if known.number is None:
        scale = torch.where(amax == 0, 1.0, amax)
        return _nan_unless_finite(scale, amax)
    if known.has_global_scale and global_scale is None:
        global_scale = global_scale_of(amax.amax(), known.number)
    return block_scale(amax, known.number, known.scale, global_scale)


def stored_scale(scale: torch.Tensor, grid: Grid, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """The nearest scale that the format can store, for a wanted one; positive, of the same shape."""
    known = grid.number_format
    wanted = scale.abs().clamp_min(SMALLEST_SCALE)
    if known is None or known.scale is ScaleKind.FP32:
        return wanted
    if known.scale is ScaleKind.E8M0:
        return power_of_two(wanted.log2().round().clamp_(-127, 127).to(torch.int32), wanted.dtype)
    if global_scale is None:
        raise ValueError(f"scales of {grid.format} need the global scale of their tensor")
    return stored_e4m3(wanted * global_scale) / global_scale


def global_scale_for(amax: torch.Tensor, grid: Grid) -> torch.Tensor:
    """fp32 (1,), or one for each of several: the global scale of a tensor with this largest magnitude."""
    known = grid.number_format
    if known is None or known.number is None:
        raise ValueError(f"{grid.describe()} has no global scale")
    return global_scale_of(amax, known.number).reshape(-1)


def qparams_from_range(lowest: torch.Tensor, highest: torch.Tensor, grid: Grid) -> QParams:
    """The qparams of a uniform grid or of floats over values from `lowest` to `highest` (same shape)."""
    if grid.format != "int":
        return QParams(_float_scale(torch.maximum(highest, lowest.neg()), grid, None))
    if grid.levels is not Levels.UNIFORM:
        return QParams(scale=torch.ones_like(lowest), threshold=torch.zeros_like(lowest))
    if grid.symmetric:
        # Few operations: on a small layer, these tiny ones cost more than the elementwise passes.
        return QParams(
            scale=divided(torch.maximum(highest, lowest.neg()), grid.scale_divisor).clamp_min_(SMALLEST_SCALE)
        )
    scale, offset = asymmetric_range(lowest, highest, grid.scale_divisor)
    return QParams(scale=scale, offset=offset)


def signs_beyond(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """sign(x) where |x| > threshold, else 0; minimum and maximum are four times as fast as clamp here."""
    clamp_to_dtype = torch.minimum(torch.maximum(values, threshold.neg()), threshold)
    return clamp_to_dtype.neg_().add_(values).sign_()


def _choose_ternary(values: torch.Tensor, axes: tuple[int, ...]) -> QParams:
    mean = mean_magnitude(values, axes)
    threshold = mean * 0.7
    beyond = signs_beyond(values, threshold)
    count = beyond.abs().sum(axes, keepdim=True).clamp_min_(1)
    scale = _finite_sum(beyond.mul_(values), axes, count)
    return QParams(scale=_nan_unless_finite(scale, mean), threshold=threshold)


def mean_magnitude(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """mean|x| along `axes` (kept as size 1), finite where all values are."""
    magnitudes = values.abs()
    mean = magnitudes.mean(axes, keepdim=True)
    return _unless_overflown(mean, lambda: (magnitudes * _OF_MANY).mean(axes, keepdim=True))


def _finite_sum(values: torch.Tensor, axes: tuple[int, ...], count: torch.Tensor) -> torch.Tensor:
    """The sum along `axes` over `count`, finite where that is."""
    total = values.sum(axes, keepdim=True)
    return _unless_overflown(total / count, lambda: (values * _OF_MANY).sum(axes, keepdim=True) / count)


_OF_MANY = 2.0**-40
"""Exact, and so small that no sum over a weight overflows."""


def _unless_overflown(result: torch.Tensor, of_small: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`result`, and where that is Inf or NaN the one that was made of values times `_OF_MANY`."""
    finite = result.isfinite()
    if not torch.compiler.is_compiling() and result.device.type == "cpu" and bool(finite.all()):
        return result
    return torch.where(finite, result, of_small() / _OF_MANY)


def _nan_unless_finite(scale: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
    return scale + (evidence - evidence)
