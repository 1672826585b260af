"""The quantized matrices of fused experts: one `QuantizedMatrix` for each expert, from one pass over the stack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_compress.export.quantized_matrix import QuantizedMatrix, check_quantizable, matrix_of
from ds_compress.quant.arithmetic import working_dtype
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight, rounding_noise
from ds_compress.quant.layout import of_one_matrix
from ds_compress.quant.weights import QuantizedWeight, quantize


@dataclass(frozen=True)
class QuantizedStack:
    """One parameter of a module of fused experts. matrices: of each expert, in order."""

    matrices: tuple[QuantizedMatrix, ...]

    def dequantize(self) -> torch.Tensor:
        """fp32, in the shape of the parameter."""
        return torch.stack([matrix.dequantize() for matrix in self.matrices])

    def numel(self) -> int:
        return sum(matrix.values.numel() for matrix in self.matrices)

    def count_nonzero(self) -> int:
        """Of the dequantized matrices."""
        return sum(matrix.count_nonzero() for matrix in self.matrices)

    def cut(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedStack:
        """What is left of it after `apply`, which removes experts, and entries of their matrices.

        Raises:
            ValueError: columns are removed, but not by whole groups that share a scale.
        """
        shape = (len(self.matrices), *self.matrices[0].shape)
        position = torch.arange(torch.Size(shape).numel(), dtype=torch.int64).view(shape)
        left = apply(position)
        size = position[0].numel()
        return QuantizedStack(tuple(self._part(own, size) for own in left))

    def _part(self, left: torch.Tensor, size: int) -> QuantizedMatrix:
        inside = left % size
        return self.matrices[int(left.flatten()[0]) // size].cut(lambda entries: entries.reshape(-1)[inside])


def quantize_stack(
    stack: torch.Tensor, fake_quant: FakeQuantConfig, step_size: torch.Tensor | None = None
) -> QuantizedStack:
    """The integers or codes behind `quant.layers.quantized_weight`; checked to give the same when dequantized.

    Raises:
        ValueError: the stack has none (still blended, NaN), or its scales do not fit the layout.
    """
    check_quantizable(stack, fake_quant)
    grid = fake_quant.grid
    scale = None if step_size is None else step_size.to(working_dtype(stack)) * fake_quant.step_ratio
    noise = rounding_noise(stack, fake_quant)
    stored = quantize(stack.detach(), grid, noise, scale, fake_quant.global_scale)
    found = QuantizedStack(tuple(matrix_of(_of_one(stored, expert)) for expert in range(len(stack))))
    trained = fake_quantize_weight(stack.detach(), fake_quant, step_size).values
    if not torch.equal(found.dequantize().to(trained.dtype), trained.cpu()):
        raise ValueError("its stored values and scales do not give the weight that training computed with")
    return found


def _of_one(stored: QuantizedWeight, expert: int) -> QuantizedWeight:
    shared = stored.global_scale
    return QuantizedWeight(
        values=stored.values[expert],
        scale=stored.scale[expert],
        offset=None if stored.offset is None else stored.offset[expert],
        grid=of_one_matrix(stored.grid),
        global_scale=shared if shared is None or shared.numel() == 1 else shared[expert : expert + 1],
    )
