"""Sparsity patterns on a fragment: single weights, NxM blocks that are kept or pruned whole, and N:M groups.

A weight is seen as a matrix (d0, d1) in storage order, d1 = numel / d0. A *block row* is the b0 matrix rows that one
row of blocks covers. A fragment is completed to full block rows (a halo exchange) before its blocks are scored, so
every process that holds a part of a block computes the same score, to the last bit. A stack of experts is the matrix of
all its rows; its blocks must divide the matrix of each expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ds_compress.ops import kernels


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of one weight. `kept_per_group` is None for blocks that are kept or pruned whole, N for N:M groups."""

    rows: int
    columns: int
    block_rows: int = 1
    block_columns: int = 1
    kept_per_group: int | None = None

    @classmethod
    def of(cls, pattern: str, shape: tuple[int, ...], transposed: bool, stacked: bool = False) -> BlockGrid:
        """`pattern` is "unstructured", "NxM" (N outputs x M inputs) or "N:M" (N of M inputs kept).

        transposed: the weight is stored as (inputs, outputs), as in GPT-2's Conv1D. stacked: `shape` is that of a
        stack of matrices, of which the first axis counts.
        """
        if stacked:
            shape = (shape[0] * shape[1], *shape[2:])
        rows = shape[0]
        columns = math.prod(shape[1:])
        if pattern == "unstructured":
            return cls(rows, columns)
        if ":" in pattern:
            kept, group = (int(part) for part in pattern.split(":"))
            block = (group, 1) if transposed else (1, group)
            return cls(rows, columns, *block, kept_per_group=kept)
        outputs, inputs = (int(part) for part in pattern.lower().split("x"))
        block = (inputs, outputs) if transposed else (outputs, inputs)
        return cls(rows, columns, *block)

    @property
    def is_elementwise(self) -> bool:
        return self.block_rows == 1 and self.block_columns == 1

    @property
    def block_row_numel(self) -> int:
        """Weights of a block row; 1 where every weight is scored for itself."""
        return 1 if self.is_elementwise else self.block_rows * self.columns

    @property
    def blocks_per_row(self) -> int:
        return -(-self.columns // self.block_columns)

    @property
    def units(self) -> int:
        """How many units a threshold selects from: weights, or blocks (a partial block at the edge counts as one)."""
        if self.is_elementwise:
            return self.rows * self.columns
        return -(-self.rows // self.block_rows) * self.blocks_per_row

    def first_unit(self, start: int) -> int:
        """Index of the unit that begins the block row in which the element `start` lies."""
        return start if self.is_elementwise else start // self.block_row_numel * self.blocks_per_row

    @property
    def num_kept(self) -> int:
        """Weights that an N:M pattern keeps (the last group of a row may be short)."""
        assert self.kept_per_group is not None
        size = self.block_rows * self.block_columns
        lines, length = (self.columns, self.rows) if self.block_rows > 1 else (self.rows, self.columns)
        return lines * (length // size * self.kept_per_group + min(self.kept_per_group, length % size))

    def _tiled(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """(block rows, rows, blocks, columns) of full block rows, padded with `fill` at the edges."""
        rows = values.numel() // self.columns
        block_rows = -(-rows // self.block_rows)
        matrix = values.view(rows, self.columns)
        pad_rows = block_rows * self.block_rows - rows
        pad_columns = self.blocks_per_row * self.block_columns - self.columns
        if pad_rows or pad_columns:
            matrix = torch.nn.functional.pad(matrix, (0, pad_columns, 0, pad_rows), value=fill)
        return matrix.view(block_rows, self.block_rows, self.blocks_per_row, self.block_columns)

    def block_scores(self, values: torch.Tensor) -> torch.Tensor:
        """Mean score of each block, flat; `values` are the element scores of full block rows.

        Summed in a fixed order, one element of the block after another: the result does not depend on
        how many block rows a process happens to hold.
        """
        if self.is_elementwise:
            return values
        total, size = self._ordered_sum(values), self._ordered_sum(torch.ones_like(values))
        return (total / size).flatten()

    def _ordered_sum(self, values: torch.Tensor) -> torch.Tensor:
        tiles = self._tiled(values)
        by_column = tiles[:, 0].clone()
        for row in range(1, self.block_rows):
            by_column += tiles[:, row]
        total = by_column[..., 0].clone()
        for column in range(1, self.block_columns):
            total += by_column[..., column]
        return total

    def expand_block_mask(self, block_mask: torch.Tensor, numel: int) -> torch.Tensor:
        """Element mask, bool (numel,), of full block rows, from the mask of their blocks."""
        if self.is_elementwise:
            return block_mask
        block_rows = -(-numel // self.block_row_numel)
        tiles = block_mask.view(block_rows, 1, self.blocks_per_row, 1)
        tiles = tiles.expand(-1, self.block_rows, -1, self.block_columns)
        matrix = tiles.reshape(block_rows * self.block_rows, self.blocks_per_row * self.block_columns)
        return matrix[: numel // self.columns, : self.columns].reshape(-1)

    def n_of_m_mask(self, values: torch.Tensor) -> torch.Tensor:
        """N:M: the element mask that keeps the N largest of each group; of equal ones that with the lower index."""
        assert self.kept_per_group is not None
        along_columns = self.block_rows == 1
        matrix = values.view(-1, self.columns)
        lines = (matrix if along_columns else matrix.t()).contiguous()
        packed = kernels().mask_n_of_m(lines, self.kept_per_group, self.block_rows * self.block_columns)
        mask = kernels().mask_unpack(packed, values.numel()).view(lines.shape)
        return (mask if along_columns else mask.t()).reshape(-1)
