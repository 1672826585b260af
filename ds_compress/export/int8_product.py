"""Which kernel multiplies by an int8 weight: the dense one, or the one that leaves out blocks of zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_compress.ops import kernels
from ds_compress.ops.instructions import has_int8_tiles
from ds_compress.ops.reference.block_sparse import count_blocks
from ds_compress.ops.sizes import BLOCK_INPUTS, BLOCK_OUTPUTS

LEAST_ZERO_BLOCKS = 0.69
"""With this share of blocks of zeros and more, `block_sparse_int8_linear` takes less time at every size that
`benchmarks/sparse_linear.py` measures; with 60 % it does at most."""
LEAST_ZERO_BLOCKS_BESIDE_TILES = 0.89
"""Where AMX multiplies the dense weight, and 16 rows and more take half the time. One row wins with fewer, too, but how
many rows come is not known when a model is loaded."""


@dataclass(frozen=True)
class Int8Product:
    """A packed int8 weight and the kernel that it was packed for."""

    packed: torch.Tensor
    is_block_sparse: bool

    @classmethod
    def of(cls, values: torch.Tensor, blocks: int | None) -> Int8Product:
        """Of int8 values (out_features, in_features); blocks: what `blocks_worth_leaving_out` says of them.

        It looks at no value, so that torch.compile traces it.
        """
        ops = kernels()
        if blocks is None:
            return cls(ops.int8_linear_pack(values), False)
        return cls(ops.block_sparse_int8_linear_pack(values, blocks), True)

    def __call__(
        self,
        x: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        input_scale: torch.Tensor | None,
        steps: int,
        activation: str = "none",
    ) -> torch.Tensor:
        """The arguments are those of `int8_linear`; both kernels give the same bits."""
        ops = kernels()
        multiply = ops.block_sparse_int8_linear if self.is_block_sparse else ops.int8_linear
        y: torch.Tensor = multiply(
            x, self.packed, weight_scale, bias, input_scale, steps=steps, activation=activation
        )
        return y


def blocks_worth_leaving_out(values: torch.Tensor) -> int | None:
    """How many blocks of int8 values have one other than 0; None where so many have that the dense kernel is faster."""
    rows, columns = values.shape
    least = LEAST_ZERO_BLOCKS_BESIDE_TILES if has_int8_tiles() else LEAST_ZERO_BLOCKS
    if int(values.count_nonzero()) > (1 - least) * values.numel():
        return None
    blocks = count_blocks(values)
    total = -(-rows // BLOCK_OUTPUTS) * -(-columns // BLOCK_INPUTS)
    return blocks if blocks <= (1 - least) * total else None
