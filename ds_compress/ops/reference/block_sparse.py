"""The int8 linear layer whose weight has whole blocks of zeros, in plain torch: the formula, and the packed form.

A block is 4 outputs x 16 inputs, which is one AVX-512 register of weights; only blocks with a value other than 0 are
stored and multiplied. The packed form is the same for all implementations, so packing is done here for all of them:

    header        as of the other packed weights; "groups" is the number of blocks
    corrections   int32 [outputs]: -128 times the sum of an output's weights, for kernels that store x as q + 128
    ends          int32 [strips, chunks, 12]: blocks up to and with a group of 4 outputs, within a chunk of 2048 inputs
    inputs        uint16 [blocks]: position of a block, its first input / 16
    values        int8 [blocks, 4, 16]

Outputs are padded to strips of 48, inputs to 16. The order is by strip, chunk, group, input. Each array begins at a
multiple of 64 bytes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from ds_compress.ops.checks import check_block_count, check_quantized, described
from ds_compress.ops.reference.linear import MAGIC, int8_linear, int8_linear_pack
from ds_compress.ops.sizes import BLOCK_INPUTS as INPUTS
from ds_compress.ops.sizes import BLOCK_OUTPUTS as OUTPUTS
from ds_compress.ops.sizes import HEADER_BYTES, BlockSparseLayout

LAYOUT = 12
_STRIP_OUTPUTS, _CHUNK_INPUTS = 48, 2048
_GROUPS = _STRIP_OUTPUTS // OUTPUTS


def count_blocks(quantized: torch.Tensor) -> int:
    """Blocks of int8 values (N, K) in which not all are zero: what `block_sparse_int8_linear_pack` has to be told."""
    return int(_blocks_of(quantized).flatten(-2).any(-1).sum())


def block_sparse_int8_linear_pack(quantized: torch.Tensor, blocks: int) -> torch.Tensor:
    """int8 values (N, K) as a packed weight without its blocks of zeros, uint8 (bytes,).

    blocks: how many blocks of 4 outputs x 16 inputs have another value than 0, so that a trace knows the size.

    Raises:
        ValueError: wrong dtype or shape, or another number of blocks.

    >>> weight = torch.zeros(8, 32, dtype=torch.int8)
    >>> weight[5, 17] = 3
    >>> F.block_sparse_int8_linear_pack(weight, blocks=1).dtype
    torch.uint8
    """
    check_quantized(quantized)
    check_block_count(blocks)
    rows, columns = quantized.shape
    values = _blocks_of(quantized)
    present = values.flatten(-2).any(-1)
    found = int(present.sum())
    if found != blocks:
        raise ValueError(f"this weight has {found} blocks of 4 x 16 with a value other than 0, got {blocks}")
    layout = BlockSparseLayout.of(rows, columns, blocks)
    packed = quantized.new_zeros((layout.total,), dtype=torch.uint8)
    header = torch.tensor([MAGIC, LAYOUT, rows, columns, blocks, 0, 0, 0], dtype=torch.int64)
    sums = functional.pad(quantized.sum(1, dtype=torch.int32), (0, -rows % _STRIP_OUTPUTS))
    ends = present.sum(-1).flatten().cumsum(0).int()
    chunks, inside = present.shape[1], present.shape[3]
    position = torch.arange(chunks * inside, device=packed.device).view(chunks, 1, inside)
    inputs = position.expand(present.shape)[present].to(torch.uint16)
    for begin, array in (
        (0, header.to(packed.device)),
        (layout.corrections, sums * -128),
        (layout.ends, ends),
        (layout.inputs, inputs),
        (layout.values, values[present]),
    ):
        stored = array.reshape(-1).view(torch.uint8)
        packed[begin : begin + stored.numel()] = stored
    return packed


def block_sparse_int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    steps: int = 127,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`int8_linear`, to the last bit, with a weight from `block_sparse_int8_linear_pack`.

    Raises:
        ValueError: as `int8_linear`, or a packed weight of another kind, or one whose index is damaged.

    >>> weight = torch.zeros(4, 16, dtype=torch.int8)
    >>> weight[0, 0], weight[1, 1] = 127, -127
    >>> packed = F.block_sparse_int8_linear_pack(weight, blocks=1)
    >>> x = torch.tensor([[2.0, 1.0] + [0.0] * 14])
    >>> F.block_sparse_int8_linear(x, packed, torch.full((4,), 1 / 127), activation="relu").round()
    tensor([[2., 0., 0., 0.]])
    """
    dense = int8_linear_pack(unpacked(packed))
    return int8_linear(
        x, dense, weight_scale, bias, input_scale, steps=steps, activation=activation, out_dtype=out_dtype
    )


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The int8 values (N, K) of a packed weight.

    Raises:
        ValueError: it is no block-sparse weight, or damaged.
    """
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER_BYTES:
        raise ValueError(f"a packed weight is uint8 (bytes,), got {described(packed)}")
    magic, kind, rows, columns, blocks, *_ = packed[:HEADER_BYTES].view(torch.int64).tolist()
    if magic != MAGIC or kind != LAYOUT:
        raise ValueError("this is no packed block-sparse weight: pack it with block_sparse_int8_linear_pack")
    layout = BlockSparseLayout.of(rows, columns, blocks)
    if packed.numel() != layout.total:
        raise ValueError(
            f"a packed weight of ({rows}, {columns}) with {blocks} blocks has {layout.total} bytes, "
            f"got {packed.numel()}"
        )
    whole = _blocks_of(packed.new_zeros((rows, columns), dtype=torch.int8))
    strips, chunks, groups, inputs = whole.shape[:4]

    def array(begin: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return packed[begin : begin + count * dtype.itemsize].view(dtype)

    ends = array(layout.ends, strips * chunks * groups, torch.int32).long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    position = array(layout.inputs, blocks, torch.uint16).long()
    last = int(ends[-1]) if ends.numel() else 0
    if bool((counts < 0).any()) or last != blocks or bool((position * INPUTS >= columns).any()):
        raise ValueError("the index of this packed weight is damaged: pack it again")
    owner = torch.arange(ends.numel(), device=packed.device).repeat_interleave(counts)
    place = owner * inputs + position % max(1, inputs)
    whole.view(-1, OUTPUTS, INPUTS)[place] = array(layout.values, blocks * OUTPUTS * INPUTS, torch.int8).view(
        -1, OUTPUTS, INPUTS
    )
    matrix = whole.permute(0, 2, 4, 1, 3, 5).reshape(strips * _STRIP_OUTPUTS, chunks * inputs * INPUTS)
    return matrix[:rows, :columns].contiguous()


def _blocks_of(quantized: torch.Tensor) -> torch.Tensor:
    """(N, K) -> (strips, chunks, 12 groups, inputs of a chunk / 16, 4, 16), padded with zeros, contiguous."""
    rows, columns = quantized.shape
    strips, chunks = -(-rows // _STRIP_OUTPUTS), -(-columns // _CHUNK_INPUTS)
    inside = -(-min(columns, _CHUNK_INPUTS) // INPUTS)
    more = (0, chunks * inside * INPUTS - columns, 0, strips * _STRIP_OUTPUTS - rows)
    padded = functional.pad(quantized, more)
    by_strip = padded.view(strips, _GROUPS, OUTPUTS, chunks, inside, INPUTS)
    return by_strip.permute(0, 3, 1, 4, 2, 5).contiguous()
