"""The argument checks of the weight-only linear layer, for the reference and for tracing alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_compress.ops.checks import ACTIVATIONS, FLOATS, described, require
from ds_compress.ops.sizes import STORAGE_BITS


def check_weight_only_pack(
    values: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, storage: str
) -> None:
    require(storage in STORAGE_BITS, lambda: f"storage is one of {', '.join(STORAGE_BITS)}, got {storage!r}")
    require(offset is None or storage != "e2m1", lambda: "e2m1 has no offsets")
    wanted = torch.uint8 if offset is not None or storage == "e2m1" else torch.int8
    require(
        values.dim() == 2 and values.dtype is wanted,
        lambda: (
            f"values are {str(wanted).removeprefix('torch.')} (out_features, in_features), got {described(values)}"
        ),
    )
    require(group_size >= 1, lambda: f"group_size is at least 1, got {group_size}")
    rows, groups = values.shape[0], -(-values.shape[1] // group_size)
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None:
            _check_scales(name, tensor, rows, groups)


def _check_scales(name: str, tensor: Tensor, rows: int, groups: int) -> None:
    require(
        tensor.dtype is torch.float32 and tuple(tensor.shape) == (rows, groups),
        lambda: f"{name} is float32 ({rows}, {groups}), got {described(tensor)}",
    )


def check_weight_only(
    x: Tensor, out_features: int, bias: Tensor | None, activation: str, out_dtype: torch.dtype | None
) -> None:
    require(
        x.dtype in FLOATS and x.dim() > 0,
        lambda: f"x is (..., in_features) in fp32, bf16 or fp16, got {described(x)}",
    )
    require(
        bias is None
        or (
            bias.dtype is torch.float32
            and bias.dim() == 1
            and bias.shape[0] == out_features
            and bias.is_contiguous()
        ),
        lambda: (
            f"bias is contiguous float32 ({out_features},), got {described(bias) if bias is not None else ''}"
        ),
    )
    require(
        activation in ACTIVATIONS,
        lambda: f"activation is one of {', '.join(ACTIVATIONS)}, got {activation!r}",
    )
    require(
        out_dtype is None or out_dtype in FLOATS, lambda: f"out_dtype is fp32, bf16 or fp16, got {out_dtype}"
    )
