"""The argument checks of attention, for the reference and for tracing alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_compress.ops.checks import FLOATS, described, require


def check_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    require(
        query.dim() == 4 and query.dtype in FLOATS,
        lambda: f"query is (batch, heads, tokens, width) in fp32, bf16 or fp16, got {described(query)}",
    )
    for name, tensor in (("key", key), ("value", value)):
        require(
            tensor.dim() == 4 and tensor.dtype is query.dtype,
            lambda name=name, tensor=tensor: _misfit(name, tensor),  # type: ignore[misc]
        )
        require(tensor.shape[0] == query.shape[0], lambda name=name, tensor=tensor: _misfit(name, tensor))  # type: ignore[misc]
    require(
        key.shape[3] == query.shape[3],
        lambda: f"key is as wide as query, {query.shape[3]}, got {described(key)}",
    )
    for dim in (1, 2):
        require(
            value.shape[dim] == key.shape[dim],
            lambda: (
                f"value has the heads and tokens of key, {key.shape[1]} and {key.shape[2]}, got {described(value)}"
            ),
        )
    require(
        key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0,
        lambda: f"heads of query are a multiple of those of key, got {query.shape[1]} and {key.shape[1]}",
    )
    if mask is not None:
        _check_mask(mask, query, key.shape[2])


def _misfit(name: str, tensor: Tensor) -> str:
    return f"{name} is (batch, heads, tokens, width) in the dtype and with the batch of query, got {described(tensor)}"


def _check_mask(mask: Tensor, query: Tensor, keys: int) -> None:
    def message() -> str:
        return (
            f"mask is bool or float32 (batch or 1, heads or 1, queries or 1, {keys}), got {described(mask)}"
        )

    require(mask.dim() == 4 and mask.dtype in (torch.bool, torch.float32), message)
    require(mask.shape[3] == keys, message)
    for dim in range(3):
        if mask.shape[dim] != 1:
            require(mask.shape[dim] == query.shape[dim], message)
