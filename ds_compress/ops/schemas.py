"""The contract of every op: its schema, and the shape and dtype of its results. No arithmetic lives here.

`torch.ops.ds_compress.<name>` exists as soon as this module is imported, and runs everywhere: `reference` gives each
op an implementation in plain torch, the compiled library (see `library`) a faster one for CPU and CUDA. The numerics
that all of them share, bit for bit, are stated in `csrc/README.md`.

linear        int8_linear and its relatives: quantize the rows of x, multiply integers, dequantize, add, activate
fake_quantize quantize and read back in one pass, with the bits of what was not clipped
mask          bit-packed keep-masks on flat fragments of any float dtype, in place
block         the parts of a quantized reduction: messages of scales and int8 or int4 codes
"""

from __future__ import annotations

import torch

NAMESPACE = "ds_compress"
HEADER_BYTES = 64
"""Packed weights begin with eight int64: magic, layout, rows N, columns K, group size, three spare."""

_LINEAR = (
    "Tensor? bias=None, Tensor? input_scale=None, *, int steps=127, str activation='none', "
    "ScalarType? out_dtype=None) -> Tensor"
)
SCHEMAS = {
    "int8_linear_pack": "(Tensor codes) -> Tensor",
    "int8_linear_quantize_pack": "(Tensor weight, Tensor scale, int steps) -> Tensor",
    "int8_linear": f"(Tensor x, Tensor packed, Tensor weight_scale, {_LINEAR}",
    "int4_linear_pack": "(Tensor codes, Tensor scale) -> Tensor",
    "int4_linear": f"(Tensor x, Tensor packed, int out_features, int group_size, {_LINEAR}",
    "sparse24_linear_pack": "(Tensor codes) -> Tensor",
    "sparse24_linear": f"(Tensor x, Tensor packed, Tensor weight_scale, {_LINEAR}",
    "fake_quantize": (
        "(Tensor x, Tensor? scale=None, Tensor? offset=None, *, int low, int high, int steps, bool symmetric, "
        "bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "mask_apply_": "(Tensor(a!) weights, Tensor packed, int bit_offset=0, float fill=0.0) -> ()",
    "mask_apply_count_": "(Tensor(a!) weights, Tensor packed, int bit_offset=0) -> Tensor",
    "mask_apply_adam_": (
        "(Tensor(a!) weights, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor packed, int bit_offset=0) -> ()"
    ),
    "mask_apply_many_": "(Tensor(a!)[] weights, Tensor[] packed, int[] bit_offsets, float fill=0.0) -> ()",
    "mask_pack": "(Tensor keep) -> Tensor",
    "mask_unpack": "(Tensor packed, int numel, int bit_offset=0) -> Tensor",
    "mask_n_of_m": "(Tensor scores, int n, int m) -> Tensor",
    "magnitude_histogram": "(Tensor values, int shift, int bins, int prefix_shift, int prefix) -> Tensor",
    "block_quantize": (
        "(Tensor x, Tensor(a!) messages, Tensor(b!)? residual, int chunk, int bits, int block) -> ()"
    ),
    "block_dequantize": "(Tensor messages, Tensor(a!) out, int chunk, int bits, int block) -> ()",
    "block_reduce": "(Tensor messages, Tensor(a!) out, int bits, int block, float multiplier) -> ()",
    "block_reduce_quantize": (
        "(Tensor messages, Tensor(a!) message, Tensor(b!)? residual, int numel, int bits, int block, "
        "float multiplier) -> ()"
    ),
}

_definitions = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _definitions.define(_name + _schema)


def message_bytes(numel: int, bits: int, block: int) -> int:
    """Bytes of the message of `numel` elements: one fp32 scale a block, then whole blocks of codes."""
    blocks = -(-numel // block)
    return blocks * 4 + blocks * block * bits // 8


def packed_bytes(rows: int, columns: int, bits: int = 8, groups: int = 0) -> int:
    """Bytes of a packed weight: enough for the layout of any instruction set, so that a trace knows the size.

    Rows are padded to 48 and columns to 64; each row has 8 bytes to spare, and 8 more per group of int4 weights.
    """
    padded_rows = -(-rows // 48) * 48
    return HEADER_BYTES + padded_rows * (-(-columns // 64) * 64 * bits // 8 + 8 + 8 * groups)


# --- fake implementations: shapes and dtypes only ------------------------------------------------------------------


def _flat_bytes(like: torch.Tensor, numel: int) -> torch.Tensor:
    return like.new_empty((numel,), dtype=torch.uint8)


def _linear_result(x: torch.Tensor, out_features: int, out_dtype: torch.dtype | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


@torch.library.register_fake(f"{NAMESPACE}::int8_linear_pack")
def _(codes: torch.Tensor) -> torch.Tensor:
    torch._check(codes.dim() == 2, lambda: "codes are (out_features, in_features)")
    return _flat_bytes(codes, packed_bytes(codes.shape[0], codes.shape[1]))


@torch.library.register_fake(f"{NAMESPACE}::int8_linear_quantize_pack")
def _(weight: torch.Tensor, scale: torch.Tensor, steps: int) -> torch.Tensor:
    torch._check(weight.dim() == 2, lambda: "weight is (out_features, in_features)")
    return _flat_bytes(weight, packed_bytes(weight.shape[0], weight.shape[1]))


@torch.library.register_fake(f"{NAMESPACE}::int4_linear_pack")
def _(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    torch._check(codes.dim() == 2, lambda: "codes are (out_features, in_features)")
    return _flat_bytes(codes, packed_bytes(codes.shape[0], codes.shape[1], bits=4, groups=scale.shape[1]))


@torch.library.register_fake(f"{NAMESPACE}::sparse24_linear_pack")
def _(codes: torch.Tensor) -> torch.Tensor:
    torch._check(codes.dim() == 2, lambda: "codes are (out_features, in_features)")
    return _flat_bytes(codes, packed_bytes(codes.shape[0], codes.shape[1]))


@torch.library.register_fake(f"{NAMESPACE}::int8_linear")
@torch.library.register_fake(f"{NAMESPACE}::sparse24_linear")
def _(
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
    return _linear_result(x, weight_scale.shape[0], out_dtype)


@torch.library.register_fake(f"{NAMESPACE}::int4_linear")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    group_size: int,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    steps: int = 127,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _linear_result(x, out_features, out_dtype)


@torch.library.register_fake(f"{NAMESPACE}::fake_quantize")
def _(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    low: int,
    high: int,
    steps: int,
    symmetric: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch._check(x.dim() == 2, lambda: "x is (rows, columns)")
    ranges = x.new_empty((x.shape[0],) if scale is None else scale.shape, dtype=torch.float32)
    offsets = x.new_empty((0,) if symmetric else ranges.shape, dtype=torch.float32)
    kept = _flat_bytes(x, -(-x.numel() // 8) if keep else 0)
    return torch.empty_like(x), ranges, offsets, kept


@torch.library.register_fake(f"{NAMESPACE}::mask_apply_")
def _(weights: torch.Tensor, packed: torch.Tensor, bit_offset: int = 0, fill: float = 0.0) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::mask_apply_count_")
def _(weights: torch.Tensor, packed: torch.Tensor, bit_offset: int = 0) -> torch.Tensor:
    return weights.new_empty((), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::mask_apply_adam_")
def _(
    weights: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    packed: torch.Tensor,
    bit_offset: int = 0,
) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::mask_apply_many_")
def _(
    weights: list[torch.Tensor], packed: list[torch.Tensor], bit_offsets: list[int], fill: float = 0.0
) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::mask_pack")
def _(keep: torch.Tensor) -> torch.Tensor:
    return _flat_bytes(keep, -(-keep.numel() // 8))


@torch.library.register_fake(f"{NAMESPACE}::mask_unpack")
def _(packed: torch.Tensor, numel: int, bit_offset: int = 0) -> torch.Tensor:
    return packed.new_empty((numel,), dtype=torch.bool)


@torch.library.register_fake(f"{NAMESPACE}::mask_n_of_m")
def _(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    return _flat_bytes(scores, -(-scores.numel() // 8))


@torch.library.register_fake(f"{NAMESPACE}::magnitude_histogram")
def _(values: torch.Tensor, shift: int, bins: int, prefix_shift: int, prefix: int) -> torch.Tensor:
    return values.new_empty((bins,), dtype=torch.int64)


@torch.library.register_fake(f"{NAMESPACE}::block_quantize")
def _(
    x: torch.Tensor,
    messages: torch.Tensor,
    residual: torch.Tensor | None,
    chunk: int,
    bits: int,
    block: int,
) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::block_dequantize")
def _(messages: torch.Tensor, out: torch.Tensor, chunk: int, bits: int, block: int) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::block_reduce")
def _(messages: torch.Tensor, out: torch.Tensor, bits: int, block: int, multiplier: float) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::block_reduce_quantize")
def _(
    messages: torch.Tensor,
    message: torch.Tensor,
    residual: torch.Tensor | None,
    numel: int,
    bits: int,
    block: int,
    multiplier: float,
) -> None:
    return None
