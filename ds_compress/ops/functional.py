"""The kernels as plain functions: typed, documented, and on whichever implementation is preferred (see `library`).

    >>> import torch
    >>> from ds_compress.ops import functional as F
    >>> F.mask_unpack(F.mask_pack(torch.tensor([True, False, True])), 3)
    tensor([ True, False,  True])

Integer linear layers    int8_linear, int4_linear, and a `_pack` for the weight of each: layouts differ between CPUs, so
                         pack where you multiply, and store the quantized values; int8_grouped_linear and
                         int4_grouped_linear multiply the rows of all experts of a mixture at once;
                         block_sparse_int8_linear leaves out blocks of 4 outputs x 16 inputs that are zero
Weight-only layers       weight_only_linear and its _pack: weights of 2 to 8 bits, inputs in floats
Attention                attention: of short sequences, where most of a served model's time would be torch's
Fake quantization        fake_quantize (integers), fake_quantize_float
Bit masks                mask_pack, mask_unpack, mask_n_of_m, mask_window, mask_square_sums, mask_apply_,
                         mask_apply_many_: bit i of byte j is element 8 j + i; a trailing underscore writes in place
Quantized payloads       block_quantize, block_dequantize, block_reduce, block_reduce_quantize: a payload is one fp32
                         scale per block, then whole blocks of quantized values; `payload_bytes` gives its size

Signatures and docstrings are those of the reference in plain torch (`ds_compress.ops.reference`), whose bits the
kernels reproduce. All functions take CPU and CUDA tensors, and none records gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ds_compress.ops import reference
from ds_compress.ops.library import kernels
from ds_compress.ops.sizes import payload_bytes

F = TypeVar("F", bound=Callable[..., Any])


def _preferred(function: F) -> F:
    """`function` of the reference, on the implementation that is preferred when it is called."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(kernels(), function.__name__)(*args, **kwargs)

    return cast(F, call)


int8_linear_pack = _preferred(reference.linear.int8_linear_pack)
int8_linear_quantize_pack = _preferred(reference.linear.int8_linear_quantize_pack)
int8_linear = _preferred(reference.linear.int8_linear)
int4_linear_pack = _preferred(reference.linear.int4_linear_pack)
int4_linear = _preferred(reference.linear.int4_linear)
block_sparse_int8_linear_pack = _preferred(reference.block_sparse.block_sparse_int8_linear_pack)
block_sparse_int8_linear = _preferred(reference.block_sparse.block_sparse_int8_linear)
int8_grouped_linear = _preferred(reference.grouped_linear.int8_grouped_linear)
int4_grouped_linear = _preferred(reference.grouped_linear.int4_grouped_linear)
weight_only_linear_pack = _preferred(reference.weight_only.weight_only_linear_pack)
weight_only_linear = _preferred(reference.weight_only.weight_only_linear)
attention = _preferred(reference.attention.attention)
fake_quantize = _preferred(reference.fake_quantize.fake_quantize)
fake_quantize_float = _preferred(reference.fake_quantize_float.fake_quantize_float)
mask_apply_ = _preferred(reference.mask.mask_apply_)
mask_apply_many_ = _preferred(reference.mask.mask_apply_many_)
mask_pack = _preferred(reference.mask.mask_pack)
mask_unpack = _preferred(reference.mask.mask_unpack)
mask_n_of_m = _preferred(reference.mask.mask_n_of_m)
mask_square_sums = _preferred(reference.squares.mask_square_sums)
mask_window = _preferred(reference.window.mask_window)
block_quantize = _preferred(reference.block_quantize.block_quantize)
block_dequantize = _preferred(reference.block_quantize.block_dequantize)
block_reduce = _preferred(reference.block_quantize.block_reduce)
block_reduce_quantize = _preferred(reference.block_quantize.block_reduce_quantize)

__all__ = ["payload_bytes", *reference.IMPLEMENTATIONS]


def __dir__() -> list[str]:
    return sorted(__all__)
