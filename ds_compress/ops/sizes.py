"""How many bytes packed weights and payloads have: what a trace must know before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

HEADER_BYTES = 64
"""Packed weights begin with eight int64: magic, layout, rows N, columns K, groups, three spare."""


BLOCK_OUTPUTS, BLOCK_INPUTS = 4, 16
"""Of a block of a block-sparse weight."""


def payload_bytes(numel: int, bits: int, block: int) -> int:
    """Bytes of the payload of `numel` elements: one fp32 scale a block, then whole blocks of quantized values."""
    blocks = -(-numel // block)
    return blocks * 4 + blocks * block * bits // 8


CHUNK_ELEMENTS = 1 << 20
"""Of a bucket that are sent at a time by few processes."""
ENOUGH_PAYLOAD = 1 << 16
"""Bytes from one process to one other below which the time of a message is latency (10 us at 50 Gbit/s)."""


def chunk_elements(given: int | None, world_size: int, bits: int) -> int:
    """Elements of all slices of a bucket that are sent at a time.

    given: what the config asks for. Otherwise `CHUNK_ELEMENTS`, and more for many processes, so that each gets no less
    than `ENOUGH_PAYLOAD` from each other one.
    """
    return given or max(CHUNK_ELEMENTS, world_size * ENOUGH_PAYLOAD * 8 // bits)


def packed_bytes(rows: int, columns: int, bits: int = 8, groups: int = 0) -> int:
    """Bytes of a packed weight: enough for the layout of any instruction set, so that a trace knows the size.

    Rows are padded to 48 and columns to 64; each row has 8 bytes to spare, and 8 more per group of int4 weights.
    """
    padded_rows = -(-rows // 48) * 48
    return HEADER_BYTES + padded_rows * (-(-columns // 64) * 64 * bits // 8 + 8 + 8 * groups)


@dataclass(frozen=True)
class BlockSparseLayout:
    """Where the arrays of a packed block-sparse weight begin, and its bytes; see `reference.block_sparse`."""

    corrections: int
    ends: int
    inputs: int
    values: int
    total: int

    @classmethod
    def of(cls, rows: int, columns: int, blocks: int) -> BlockSparseLayout:
        """Of a weight (rows, columns) with so many blocks of 4 x 16."""

        def lines(size: int) -> int:
            return -(-size // 64) * 64

        outputs = -(-rows // 48) * 48
        ends = HEADER_BYTES + lines(4 * outputs)
        inputs = ends + lines(outputs * -(-columns // 2048))
        values = inputs + lines(2 * blocks)
        return cls(HEADER_BYTES, ends, inputs, values, values + 64 * blocks)


STORAGE_BITS = {"int2": 2, "int4": 4, "int8": 8, "e2m1": 4}
"""Of weight-only values, in the order of their numbers in packed weights."""


def weight_only_bytes(rows: int, columns: int, group_size: int, storage: str, has_offset: bool) -> int:
    """Bytes of a packed weight of `weight_only_linear`: rows are padded to 64, the inputs of each group to 16."""
    groups = -(-columns // group_size)
    inputs = -(-group_size // 16) * 16 * STORAGE_BITS[storage] // 8
    return HEADER_BYTES + -(-rows // 64) * 64 * groups * (inputs + 4 + 4 * has_offset)
