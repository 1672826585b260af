"""The contract of every op: its schema, and the shape and dtype of its results. No arithmetic lives here.

`torch.ops.ds_compress.<name>` exists as soon as this module is imported, and runs everywhere: `reference` gives each
op its signature and an implementation in plain torch, the compiled library (see `library`) a faster one for CPU and
CUDA. The numerics that all of them share, bit for bit, are stated in `csrc/README.md`.

linear        int8_linear and int4_linear: quantize the rows of x, multiply integers, dequantize, add, activate;
              int8_grouped_linear, int4_grouped_linear: of all experts of a mixture, in one launch;
              block_sparse_int8_linear: without the blocks of zeros of its weight
weight_only   weight_only_linear: weights alone are quantized, and dequantized while they are multiplied
attention     of short sequences, beside integer linear layers
fake_quantize quantize and read back in one pass, with the mask of what was not clipped; _float: to small floats
mask          bit-packed masks on flat tensors of any float dtype, in place
block         the parts of a quantized reduction: payloads of scales and int8 or int4 values
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_compress.ops import checks
from ds_compress.ops.attention_checks import check_attention
from ds_compress.ops.reference import IMPLEMENTATIONS, MUTATED
from ds_compress.ops.sizes import BlockSparseLayout, packed_bytes, weight_only_bytes
from ds_compress.ops.weight_only_checks import check_weight_only, check_weight_only_pack

NAMESPACE = "ds_compress"


SCHEMAS: dict[str, str] = {}
_definitions = torch.library.Library(NAMESPACE, "DEF")


def define(implementation: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
    """`torch.ops.ds_compress.<name of the function>` has the signature of `implementation`; it writes `mutates`."""
    schema = torch.library.infer_schema(inspect.unwrap(implementation), mutates_args=tuple(mutates))
    schema = schema.replace("SymInt", "int")  # the kernels' stable ABI knows plain integers only
    _definitions.define(implementation.__name__ + schema)
    SCHEMAS[implementation.__name__] = schema


for _name, _implementation in IMPLEMENTATIONS.items():
    define(_implementation, MUTATED.get(_name, ()))


# --- fake implementations: the checks of the kernels, then shapes and dtypes -----------------------------------------


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the fake of the op `name`; it is called with every argument by its name."""
    signature = inspect.signature(IMPLEMENTATIONS[name])

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(**bound.arguments)

        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
        return function

    return register


def _bytes(like: Tensor, count: int) -> Tensor:
    return like.new_empty((count,), dtype=torch.uint8)


@_fake("int8_linear_pack")
def _(quantized: Tensor) -> Tensor:
    checks.check_quantized(quantized)
    return _bytes(quantized, packed_bytes(*quantized.shape))


@_fake("int8_linear_quantize_pack")
def _(weight: Tensor, scale: Tensor, steps: int) -> Tensor:
    checks.check_quantize_pack(weight, scale, steps)
    return _bytes(weight, packed_bytes(*weight.shape))


@_fake("int4_linear_pack")
def _(quantized: Tensor, scale: Tensor) -> Tensor:
    checks.check_quantized(quantized)
    checks.check_int4_scale(scale, quantized.shape[0])
    rows, columns = quantized.shape
    return _bytes(quantized, packed_bytes(rows, columns, bits=4, groups=scale.shape[1]))


@_fake("int8_linear")
def _(x: Tensor, packed: Tensor, weight_scale: Tensor, **rest: Any) -> Tensor:
    checks.check_weight_scale(weight_scale, weight_scale.numel())
    return _linear(x, packed, weight_scale.shape[0], 0, **rest)


@_fake("int4_linear")
def _(x: Tensor, packed: Tensor, out_features: int, group_size: int, **rest: Any) -> Tensor:
    groups = -(-x.shape[-1] // max(1, group_size))
    checks.check_groups(group_size, x.shape[-1], groups)
    return _linear(x, packed, out_features, groups, **rest)


def _linear(
    x: Tensor, packed: Tensor, rows: int, groups: int, *, out_dtype: torch.dtype | None, **rest: Any
) -> Tensor:
    checks.check_linear(x, rows, x.shape[-1], out_dtype=out_dtype, **rest)
    checks.check_packed(packed, rows, x.shape[-1], groups)
    return x.new_empty((*x.shape[:-1], rows), dtype=out_dtype or x.dtype)


@_fake("block_sparse_int8_linear_pack")
def _(quantized: Tensor, blocks: int) -> Tensor:
    checks.check_quantized(quantized)
    checks.check_block_count(blocks)
    rows, columns = quantized.shape
    return _bytes(quantized, BlockSparseLayout.of(rows, columns, blocks).total)


@_fake("block_sparse_int8_linear")
def _(
    x: Tensor, packed: Tensor, weight_scale: Tensor, *, out_dtype: torch.dtype | None, **rest: Any
) -> Tensor:
    rows = weight_scale.shape[0] if weight_scale.dim() else 0
    checks.check_weight_scale(weight_scale, rows)
    checks.check_linear(x, rows, x.shape[-1], out_dtype=out_dtype, **rest)
    checks.check_tensor("block_sparse_int8_linear", "packed", packed, 1, (torch.uint8,))
    return x.new_empty((*x.shape[:-1], rows), dtype=out_dtype or x.dtype)


@_fake("int8_grouped_linear")
def _(x: Tensor, packed: Tensor, weight_scale: Tensor, **rest: Any) -> Tensor:
    return _grouped_linear(x, packed, weight_scale.shape[-1], 0, weight_scale=weight_scale, **rest)


@_fake("int4_grouped_linear")
def _(x: Tensor, packed: Tensor, out_features: int, group_size: int, **rest: Any) -> Tensor:
    groups = -(-x.shape[-1] // max(1, group_size))
    checks.check_groups(group_size, x.shape[-1], groups)
    return _grouped_linear(x, packed, out_features, groups, **rest)


def _grouped_linear(
    x: Tensor,
    packed: Tensor,
    rows: int,
    groups: int,
    *,
    offsets: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    steps: int,
    out_dtype: torch.dtype | None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    checks.check_grouped(x, packed, offsets, rows, bias, input_scale, weight_scale)
    checks.check_linear(x, rows, x.shape[1], None, None, steps, "none", out_dtype)
    checks.check_packed_experts(packed, rows, x.shape[1], groups)
    return x.new_empty((x.shape[0], rows), dtype=out_dtype or x.dtype)


@_fake("weight_only_linear_pack")
def _(values: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, storage: str) -> Tensor:
    check_weight_only_pack(values, scale, offset, group_size, storage)
    rows, columns = values.shape
    return _bytes(values, weight_only_bytes(rows, columns, group_size, storage, offset is not None))


@_fake("weight_only_linear")
def _(x: Tensor, packed: Tensor, out_features: int, *, out_dtype: torch.dtype | None, **rest: Any) -> Tensor:
    check_weight_only(x, out_features, out_dtype=out_dtype, **rest)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


@_fake("attention")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Tensor:
    check_attention(query, key, value, mask)
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3]))


@_fake("fake_quantize")
def _(
    x: Tensor, scale: Tensor | None, offset: Tensor | None, *, symmetric: bool, with_mask: bool, **rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.check_fake_quantize(x, scale, offset, symmetric=symmetric, **rest)
    ranges = x.new_empty((x.shape[0],) if scale is None else scale.shape, dtype=torch.float32)
    offsets = x.new_empty((0,) if symmetric else ranges.shape, dtype=torch.float32)
    return torch.empty_like(x), ranges, offsets, _bytes(x, -(-x.numel() // 8) if with_mask else 0)


@_fake("fake_quantize_float")
def _(
    x: Tensor, scale: Tensor | None, *, block: int, with_mask: bool, **rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_fake_quantize_float(x, scale, block=block, **rest)
    chosen = (x.shape[0], x.shape[1] // block)
    scales = x.new_empty(chosen if scale is None else scale.shape, dtype=torch.float32)
    return torch.empty_like(x), scales, _bytes(x, -(-x.numel() // 8) if with_mask else 0)


@_fake("mask_apply_")
def _(weights: Tensor, packed: Tensor, bit_offset: int, fill: float) -> None:
    checks.check_masked("mask_apply_", weights, packed, bit_offset)


@_fake("mask_apply_many_")
def _(weights: list[Tensor], packed: list[Tensor], bit_offsets: list[int], fill: float) -> None:
    checks.check_all_masked("mask_apply_many_", weights, packed, bit_offsets)


@_fake("mask_pack")
def _(mask: Tensor) -> Tensor:
    checks.check_tensor("mask_pack", "mask", mask, 1, (torch.bool,))
    return _bytes(mask, -(-mask.numel() // 8))


@_fake("mask_unpack")
def _(packed: Tensor, numel: int, bit_offset: int) -> Tensor:
    checks.check_bits("mask_unpack", packed, numel, bit_offset)
    return packed.new_empty((numel,), dtype=torch.bool)


@_fake("mask_n_of_m")
def _(scores: Tensor, n: int, m: int) -> Tensor:
    checks.check_n_of_m("mask_n_of_m", scores, n, m)
    return _bytes(scores, -(-scores.numel() // 8))


@_fake("mask_window")
def _(
    scores: Tensor, competing: Tensor | None, low: int, high: int, magnitude: bool, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.check_window(scores, competing, low, high, capacity)
    keys, places = (scores.new_empty((capacity,), dtype=torch.int32) for _ in range(2))
    return _bytes(scores, -(-scores.numel() // 8)), keys, places, scores.new_empty((3,), dtype=torch.int64)


@_fake("mask_square_sums")
def _(values: Tensor, packed: Tensor | None) -> Tensor:
    checks.check_square_sums(values, packed)
    return values.new_empty((2,), dtype=torch.float64)


@_fake("block_quantize")
def _(x: Tensor, payloads: Tensor, residual: Tensor | None, chunk: int, bits: int, block: int) -> None:
    checks.check_block_quantize(x, payloads, residual, chunk, bits, block)


@_fake("block_dequantize")
def _(payloads: Tensor, out: Tensor, chunk: int, bits: int, block: int) -> None:
    checks.check_block_dequantize(payloads, out, chunk, bits, block)


@_fake("block_reduce")
def _(payloads: Tensor, out: Tensor, bits: int, block: int, multiplier: float) -> None:
    checks.check_block_reduce(payloads, out, bits, block)


@_fake("block_reduce_quantize")
def _(
    payloads: Tensor,
    payload: Tensor,
    residual: Tensor | None,
    numel: int,
    bits: int,
    block: int,
    multiplier: float,
) -> None:
    checks.check_block_reduce_quantize(payloads, payload, residual, numel, bits, block)
