"""A quantized weight as the integers and scales that training computed with, in one layout for all formats.

weight[o, i] = values[o, i] * scale[o, i // group_size] (+ offset[o, i // group_size])

whatever granularity the grid had: a scale that several rows share is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ds_compress.quant.arithmetic import working_dtype
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight, rounding_noise
from ds_compress.quant.grid import Granularity, Levels, WeightGrid
from ds_compress.quant.weights import quantize


@dataclass(frozen=True)
class QuantizedMatrix:
    """values: int8 `[out, in]`, uint8 where there is an offset. scale, offset: fp32 `[out, groups]`.

    group_size: columns that share a scale; `in` when a row has one. shape: that of the weight itself, of which
    `[out, in]` is a view. transposed: it is stored `[in, out]` (Conv1D). bits: enough for every value; one bit
    holds -1 and 1, the values of a binary weight without zeros.
    """

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    def dequantize_matrix(self) -> torch.Tensor:
        """fp32 `[out, in]`, in the arithmetic of `quant.grid`."""
        rows, columns = self.values.shape
        blocks = self.values.float().view(rows, self.groups, columns // self.groups)
        values = blocks * self.scale.unsqueeze(2)
        if self.offset is not None:
            values = values + self.offset.unsqueeze(2)
        return values.view(rows, columns)

    def dequantize(self) -> torch.Tensor:
        """The same in the shape of the weight."""
        matrix = self.dequantize_matrix()
        return (matrix.t() if self.transposed else matrix).reshape(self.shape).contiguous()

    def cut(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedMatrix:
        """What is left of it after `apply`, which removes entries of tensors in the weight's shape.

        Raises:
            ValueError: columns are removed, but not by whole groups.
        """
        rows, columns = self.values.shape
        values = apply(self._outer(self.values))
        shape = tuple(values.shape)
        if shape == self.shape:
            return self
        inner = (values.t() if self.transposed else values).reshape(-1, _columns(shape, self.transposed))
        # Which rows and columns stay shows in the positions of the entries that stay.
        position = torch.arange(rows * columns, dtype=torch.int64).view(rows, columns)
        left = apply(self._outer(position))
        left = (left.t() if self.transposed else left).reshape(inner.shape)
        kept_rows, kept_columns = left[:, 0] // columns, left[0] % columns
        groups = kept_columns // self.group_size
        kept_groups, counts = groups.unique(return_counts=True)
        if self.groups > 1 and bool((counts != self.group_size).any()):
            raise ValueError(f"its columns are cut across groups of {self.group_size} that share a scale")
        part = (kept_rows[:, None], kept_groups[None, :])
        return replace(
            self,
            values=inner.contiguous(),
            scale=self.scale[part],
            offset=None if self.offset is None else self.offset[part],
            group_size=self.group_size if self.groups > 1 else inner.shape[1],
            shape=shape,
        )

    def _outer(self, matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.t() if self.transposed else matrix).reshape(self.shape)


def quantize_matrix(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None = None
) -> QuantizedMatrix:
    """The integers behind `quant.layers.quantized_weight`; checked to give the same weight when dequantized.

    Raises:
        ValueError: the weight has no integers (still blended, NaN), or its scales do not fit the layout.
    """
    if fake_quant.blend_ratio:
        raise ValueError(
            f"it is still a blend of {fake_quant.blend_ratio:.0%} real weights (fp16_mixed_quantize): train on until 0"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("it has NaN or Inf")
    grid = fake_quant.grid
    scale = None if step_size is None else step_size.to(working_dtype(weight)) * fake_quant.step_ratio
    stored = quantize(weight.detach(), grid, rounding_noise(weight, fake_quant), scale)
    transposed = grid.channel_axis == 1
    columns = _columns(tuple(weight.shape), transposed)
    matrix = (stored.values.t() if transposed else stored.values).reshape(-1, columns)
    rows = matrix.shape[0]
    scales = _by_row(stored.scale, grid, rows, columns)
    quantized = QuantizedMatrix(
        values=matrix.contiguous().cpu(),
        scale=scales,
        offset=None if stored.offset is None else _by_row(stored.offset, grid, rows, columns),
        bits=_bits(grid, matrix),
        group_size=columns // scales.shape[1],
        shape=tuple(weight.shape),
        transposed=transposed,
    )
    trained = fake_quantize_weight(weight.detach(), fake_quant, step_size).values
    if not torch.equal(quantized.dequantize().to(trained.dtype), trained.cpu()):
        raise ValueError("its integers and scales do not give the weight that training computed with")
    return quantized


def quantize_rows(weight: torch.Tensor) -> QuantizedMatrix:
    """A weight that was not trained in integers, rounded to int8 with one scale per row: max|row| / 127."""
    grid = WeightGrid(bits=8, narrow_range=True, granularity=Granularity.PER_CHANNEL)
    return quantize_matrix(weight.float(), FakeQuantConfig(grid))


def _bits(grid: WeightGrid, values: torch.Tensor) -> int:
    if grid.levels is Levels.UNIFORM:
        return grid.bits
    return 1 if grid.levels is Levels.BINARY and bool((values != 0).all()) else 2


def _columns(shape: tuple[int, ...], transposed: bool) -> int:
    if transposed:
        return shape[0]
    return int(torch.Size(shape[1:]).numel())


def _by_row(scale: torch.Tensor, grid: WeightGrid, rows: int, columns: int) -> torch.Tensor:
    """fp32 `[rows, groups]` of scales of `layout.scale_shape`."""
    scale = scale.float().cpu()
    match grid.granularity:
        case Granularity.PER_TENSOR:
            found = scale.view(1, 1).expand(rows, 1)
        case Granularity.PER_CHANNEL:
            found = scale.view(rows, 1)
        case Granularity.PER_COLUMN_GROUP:
            if columns % grid.group_size and columns > grid.group_size:
                raise ValueError(f"its {columns} columns are no multiple of group_size {grid.group_size}")
            found = scale.t() if grid.channel_axis else scale
        case Granularity.PER_GROUP:
            found = _of_runs(scale, rows, columns, bool(grid.channel_axis))
    return found.contiguous()


def _of_runs(scale: torch.Tensor, rows: int, columns: int, transposed: bool) -> torch.Tensor:
    run = rows * columns // scale.numel()
    if scale.numel() == 1:
        return scale.view(1, 1).expand(rows, 1)
    if transposed and run % rows == 0:  # some inputs, all outputs
        return scale.view(1, -1).expand(rows, -1)
    if not transposed and run % columns == 0:
        return scale.repeat_interleave(run // columns).view(rows, 1)
    if not transposed and columns % run == 0:
        return scale.view(rows, columns // run)
    raise ValueError(
        f"quantize_groups {scale.numel()} cuts across its rows: train with granularity per_channel or per_column_group"
    )
