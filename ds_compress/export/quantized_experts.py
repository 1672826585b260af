"""Quantized fused experts: one `QuantizedMatrix` for each expert of a stack, as formats store and loaders read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ds_compress.export.quantized_matrix import QuantizedMatrix, check_quantized, matrix_of, scale_of
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight, rounding_noise
from ds_compress.quant.layout import of_one_matrix
from ds_compress.quant.weights import QuantizedWeight, quantize


@dataclass(frozen=True)
class QuantizedExperts:
    """The matrices of all experts, all quantized alike."""

    matrices: tuple[QuantizedMatrix, ...]

    @property
    def first(self) -> QuantizedMatrix:
        return self.matrices[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the stack."""
        return (len(self.matrices), *self.first.shape)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def count_nonzero(self) -> int:
        return sum(matrix.count_nonzero() for matrix in self.matrices)

    def dequantize(self) -> torch.Tensor:
        """fp32, of `shape`."""
        return self.as_stack(QuantizedMatrix.dequantize)

    def as_stack(self, values: Callable[[QuantizedMatrix], torch.Tensor]) -> torch.Tensor:
        """fp32 [experts, ...]: `values` of each matrix."""
        first = values(self.first)
        stack = first.new_empty(len(self.matrices), *first.shape)
        for expert, matrix in enumerate(self.matrices):
            stack[expert] = values(matrix)
        return stack

    def cut(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedExperts:
        """What is left of it after `apply`, which removes experts, or entries of each, from tensors of `shape`.

        Raises:
            ValueError: columns (of square blocks, rows too) are removed, but not by whole groups.
        """
        size = torch.Size(self.first.shape).numel()
        # Which entries of which experts stay shows in their numbers.
        numbers = torch.arange(size * len(self.matrices), dtype=torch.int64).view(self.shape)
        left = apply(numbers)
        if left.shape == numbers.shape:
            return self
        return QuantizedExperts(tuple(self._cut(own, size) for own in left))

    def _cut(self, left: torch.Tensor, size: int) -> QuantizedMatrix:
        expert, entries = int(left.flatten()[0]) // size, left % size
        return self.matrices[expert].cut(lambda tensor: tensor.reshape(-1)[entries])


def quantize_experts(
    weight: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None = None
) -> QuantizedExperts:
    """What training computed with, matrix by matrix; weight: [experts, ...], the grid of `fake_quant` is stacked.

    Raises:
        ValueError: the weight has no integers or codes (still blended, NaN), or its scales do not fit the layout.
    """
    check_quantized(weight, fake_quant)
    noise = rounding_noise(weight, fake_quant)
    scale = scale_of(weight, fake_quant, step_size)
    found = experts_of(quantize(weight.detach(), fake_quant.grid, noise, scale, fake_quant.global_scale))
    trained = fake_quantize_weight(weight.detach(), fake_quant, step_size).values
    if not torch.equal(found.dequantize().to(trained.dtype), trained.cpu()):
        raise ValueError("its stored values and scales do not give the weight that training computed with")
    return found


def experts_of(stored: QuantizedWeight) -> QuantizedExperts:
    """A quantized stack, matrix by matrix."""
    grid, shared = of_one_matrix(stored.grid), stored.global_scale
    return QuantizedExperts(
        tuple(
            matrix_of(
                QuantizedWeight(
                    values,
                    stored.scale[expert],
                    None if stored.offset is None else stored.offset[expert],
                    grid,
                    shared if shared is None or shared.numel() == 1 else shared[expert : expert + 1],
                )
            )
            for expert, values in enumerate(stored.values)
        )
    )


def rows_of(matrix: QuantizedMatrix, rows: torch.Tensor) -> QuantizedMatrix:
    """Some of its outputs, not transposed any more; rows: increasing int64.

    Raises:
        ValueError: square blocks are cut.
    """
    outputs, inputs = matrix.values.shape
    # A copy: no two tensors of a file may share memory.
    shared = None if matrix.global_scale is None else matrix.global_scale.clone()
    plain = replace(matrix, shape=(outputs, inputs), transposed=False, global_scale=shared)
    return plain if rows.numel() == outputs else plain.cut(lambda tensor: tensor[rows])
