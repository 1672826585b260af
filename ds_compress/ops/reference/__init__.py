"""Every op in plain torch: what runs where nothing is compiled, and what the tests hold the kernels against.

The signatures here are those of the ops: schemas are inferred from them (see `ds_compress.ops.schemas`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_compress.ops.reference import (
    attention,
    block_quantize,
    block_sparse,
    fake_quantize,
    fake_quantize_float,
    grouped_linear,
    linear,
    mask,
    squares,
    weight_only,
    window,
)

_OPS: tuple[Callable[..., Any], ...] = (
    linear.int8_linear_pack,
    linear.int8_linear_quantize_pack,
    linear.int8_linear,
    linear.int4_linear_pack,
    linear.int4_linear,
    block_sparse.block_sparse_int8_linear_pack,
    block_sparse.block_sparse_int8_linear,
    grouped_linear.int8_grouped_linear,
    grouped_linear.int4_grouped_linear,
    weight_only.weight_only_linear_pack,
    weight_only.weight_only_linear,
    attention.attention,
    fake_quantize.fake_quantize,
    fake_quantize_float.fake_quantize_float,
    mask.mask_apply_,
    mask.mask_apply_many_,
    mask.mask_pack,
    mask.mask_unpack,
    mask.mask_n_of_m,
    window.mask_window,
    squares.mask_square_sums,
    block_quantize.block_quantize,
    block_quantize.block_dequantize,
    block_quantize.block_reduce,
    block_quantize.block_reduce_quantize,
)
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {op.__name__: op for op in _OPS}

MUTATED: dict[str, tuple[str, ...]] = {
    "mask_apply_": ("weights",),
    "mask_apply_many_": ("weights",),
    "block_quantize": ("payloads", "residual"),
    "block_dequantize": ("out",),
    "block_reduce": ("out",),
    "block_reduce_quantize": ("payload", "residual"),
}
"""The arguments that an op writes; the others write none."""
