"""A quantized weight as the integers or floats and scales that training computed with, in one layout for all formats.

    weight[o, i] = values[o, i] * scale[o, i // group_size] (+ offset[o, i // group_size])

whatever granularity a grid of integers had: a scale that several rows share is repeated. Floats keep theirs, because
servers have other kernels for other granularities: [1, 1] of a tensor, [o // group_size, i // group_size] of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ds_compress.ops.reference.float_formats import ScaleKind, decode
from ds_compress.quant.arithmetic import working_dtype
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight, rounding_noise
from ds_compress.quant.formats import FORMATS, nf4_values
from ds_compress.quant.grid import Granularity, Levels, WeightGrid
from ds_compress.quant.weights import QuantizedWeight, quantize


@dataclass(frozen=True)
class QuantizedMatrix:
    """values: int8 `[out, in]`, uint8 where there is an offset; uint8 codes of floats. scale, offset: fp32, what values
    are multiplied by and added to.

    group_size: columns that share a scale; `in` when a row has one. shape: that of the weight itself, of which
    `[out, in]` is a view. transposed: it is stored `[in, out]` (Conv1D). bits: enough for every value; one bit
    holds -1 and 1, the values of a binary weight without zeros. format: "int", or a name of `quant.formats`; only then
    has granularity a meaning. global_scale: fp32 (1,), see `quant.weights.QuantizedWeight`.
    """

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, ...]
    transposed: bool = False
    format: str = "int"
    granularity: Granularity = Granularity.PER_COLUMN_GROUP
    global_scale: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def group_rows(self) -> int:
        """Rows that share a scale."""
        match self.granularity:
            case Granularity.PER_BLOCK:
                return self.group_size
            case Granularity.PER_TENSOR:
                return self.values.shape[0]
            case _:
                return 1

    def numbers(self) -> torch.Tensor:
        """fp32 `[out, in]`: values before they are multiplied."""
        if self.format == "int":
            return self.values.float()
        number = FORMATS[self.format].number
        return nf4_values(self.values) if number is None else decode(self.values, number)

    def dequantize_matrix(self) -> torch.Tensor:
        """fp32 `[out, in]`, in the arithmetic of `quant.grid`."""
        rows, columns = self.values.shape
        values = self.numbers()
        if self.group_rows > 1 or columns % self.group_size:
            by_row = self.scale.repeat_interleave(self.group_rows, 0)[:rows]
            return values.mul_(by_row.repeat_interleave(self.group_size, 1)[:, :columns])
        blocks = values.view(rows, self.groups, columns // self.groups)
        values = blocks * self.scale.unsqueeze(2)
        if self.offset is not None:
            values = values + self.offset.unsqueeze(2)
        return values.view(rows, columns)

    def loaded_in(self, dtype: torch.dtype) -> torch.Tensor:
        """What a loader makes of it that holds fp32 scales, and every product, in this dtype; fp32, of `shape`.

        Scales of blocks that are stored in 8 bits are not rounded any further.
        """
        if dtype is torch.float32:
            return self.dequantize()
        is_rounded = self.format == "int" or FORMATS[self.format].scale is ScaleKind.FP32
        scale = self.scale.to(dtype).float() if is_rounded else self.scale
        return replace(self, scale=scale).dequantize().to(dtype).float()

    def count_nonzero(self) -> int:
        """Of the dequantized weight."""
        is_plain = self.format == "int" and self.offset is None
        return int((self.values if is_plain else self.dequantize_matrix()).count_nonzero())

    def dequantize(self) -> torch.Tensor:
        """The same in the shape of the weight."""
        matrix = self.dequantize_matrix()
        return (matrix.t() if self.transposed else matrix).reshape(self.shape).contiguous()

    def cut(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedMatrix:
        """What is left of it after `apply`, which removes entries of tensors in the weight's shape.

        Raises:
            ValueError: columns (of square blocks, rows too) are removed, but not by whole groups.
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
        kept_groups = self._whole_groups(left[0] % columns, self.group_size, columns, "columns")
        kept_rows = left[:, 0] // columns
        if self.group_rows > 1:
            kept_rows = self._whole_groups(kept_rows, self.group_rows, rows, "rows")
        part = (kept_rows[:, None], kept_groups[None, :])
        has_groups = self.groups > 1 or self.granularity is Granularity.PER_BLOCK
        return replace(
            self,
            values=inner.contiguous(),
            scale=self.scale[part],
            offset=None if self.offset is None else self.offset[part],
            group_size=self.group_size if has_groups else inner.shape[1],
            shape=shape,
        )

    @staticmethod
    def _whole_groups(kept: torch.Tensor, size: int, of: int, what: str) -> torch.Tensor:
        """The groups of which `kept` has all members, or the only one."""
        sizes = torch.bincount(torch.arange(of) // size)
        groups, counts = (kept // size).unique(return_counts=True)
        if len(sizes) > 1 and bool((counts != sizes[groups]).any()):
            raise ValueError(
                f"its {what} are cut across groups of {size} that share a scale: train it with one scale per row "
                "(granularity per_channel), or remove the structures before it is quantized (ds_compress.finalize)"
            )
        return groups

    def _outer(self, matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.t() if self.transposed else matrix).reshape(self.shape)


def quantize_matrix(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None = None
) -> QuantizedMatrix:
    """The integers or codes behind `quant.layers.quantized_weight`; checked to give the same weight when dequantized.

    Raises:
        ValueError: the weight has none (still blended, NaN), or its scales do not fit the layout.
    """
    check_quantized(weight, fake_quant)
    noise = rounding_noise(weight, fake_quant)
    scale = scale_of(weight, fake_quant, step_size)
    quantized = matrix_of(quantize(weight.detach(), fake_quant.grid, noise, scale, fake_quant.global_scale))
    trained = fake_quantize_weight(weight.detach(), fake_quant, step_size).values
    if not torch.equal(quantized.dequantize().to(trained.dtype), trained.cpu()):
        raise ValueError("its stored values and scales do not give the weight that training computed with")
    return quantized


def check_quantized(weight: torch.Tensor, fake_quant: FakeQuantConfig) -> None:
    """Raises ValueError where what training computed with is not on a grid."""
    if fake_quant.blend_ratio:
        raise ValueError(
            f"it is still a blend of {fake_quant.blend_ratio:.0%} real weights (fp16_mixed_quantize): train on until 0"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("it has NaN or Inf")


def scale_of(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None
) -> torch.Tensor | None:
    """The given scales of the grid that is quantized to now; None where they follow from the weight."""
    return None if step_size is None else step_size.to(working_dtype(weight)) * fake_quant.step_ratio


def matrix_of(stored: QuantizedWeight) -> QuantizedMatrix:
    """A quantized weight in the layout of all formats.

    Raises:
        ValueError: its scales do not fit the layout.
    """
    grid, shape, shared = stored.grid, tuple(stored.values.shape), stored.global_scale
    transposed = grid.channel_axis == 1
    columns = _columns(shape, transposed)
    matrix = (stored.values.t() if transposed else stored.values).reshape(-1, columns)
    rows = matrix.shape[0]
    scales = _by_row(stored.scale, grid, rows, columns)
    return QuantizedMatrix(
        values=matrix.contiguous().cpu(),
        scale=scales,
        offset=None if stored.offset is None else _by_row(stored.offset, grid, rows, columns),
        bits=_bits(grid, matrix),
        group_size=_group_size(grid, columns, scales.shape[1]),
        shape=shape,
        transposed=transposed,
        format=grid.format,
        granularity=_granularity(grid, scales),
        # A copy: layers that servers join share it, and no two tensors of a file may share memory.
        global_scale=shared if shared is None else shared.detach().to("cpu", torch.float32, copy=True),
    )


def quantize_rows(weight: torch.Tensor) -> QuantizedMatrix:
    """A weight that was not trained in integers, rounded to int8 with one scale per row: max|row| / 127."""
    grid = WeightGrid(bits=8, narrow_range=True, granularity=Granularity.PER_CHANNEL)
    return quantize_matrix(weight.float(), FakeQuantConfig(grid))


def _bits(grid: WeightGrid, values: torch.Tensor) -> int:
    if grid.levels is Levels.UNIFORM or grid.format != "int":
        return grid.bits
    return 1 if grid.levels is Levels.BINARY and bool((values != 0).all()) else 2


def _group_size(grid: WeightGrid, columns: int, groups: int) -> int:
    """Of floats what the grid says, also where it does not divide the columns."""
    in_groups = grid.granularity in (Granularity.PER_COLUMN_GROUP, Granularity.PER_BLOCK)
    return grid.group_size if grid.format != "int" and in_groups else columns // groups


def _granularity(grid: WeightGrid, scales: torch.Tensor) -> Granularity:
    if grid.format == "int":
        return Granularity.PER_COLUMN_GROUP
    if grid.granularity is not Granularity.PER_GROUP:
        return grid.granularity
    if grid.groups == 1:
        return Granularity.PER_TENSOR
    return Granularity.PER_CHANNEL if scales.shape[1] == 1 else Granularity.PER_COLUMN_GROUP


def _columns(shape: tuple[int, ...], transposed: bool) -> int:
    if transposed:
        return shape[0]
    return int(torch.Size(shape[1:]).numel())


def _by_row(scale: torch.Tensor, grid: WeightGrid, rows: int, columns: int) -> torch.Tensor:
    """fp32 scales of `QuantizedMatrix`, from those of `layout.scale_shape`."""
    scale = scale.float().cpu()
    is_float = grid.format != "int"
    if (
        is_float
        and scale.numel() == 1
        and grid.granularity in (Granularity.PER_TENSOR, Granularity.PER_GROUP)
    ):
        return scale.view(1, 1)
    match grid.granularity:
        case Granularity.PER_BLOCK if not is_float:
            raise ValueError(
                "square blocks are for floats: train with granularity per_channel or per_column_group"
            )
        case Granularity.PER_BLOCK:
            found = scale.t() if grid.channel_axis else scale
        case Granularity.PER_TENSOR:
            found = scale.view(1, 1).expand(rows, 1)
        case Granularity.PER_CHANNEL:
            found = scale.view(rows, 1)
        case Granularity.PER_COLUMN_GROUP:
            if not is_float and columns % grid.group_size and columns > grid.group_size:
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
