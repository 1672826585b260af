"""The argument checks of all ops in plain torch, for the reference and for tracing alike; the kernels have the same.

Each raises ValueError; a condition on symbolic sizes is checked when they are known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_compress.ops.sizes import packed_bytes, payload_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MASKED = (*FLOATS, torch.float64)
ACTIVATIONS = ("none", "relu", "gelu_erf", "gelu_tanh", "silu")
LARGEST_BLOCK = 8192
LARGEST_SUM = 2**31 - 1


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    if isinstance(condition, torch.SymBool):
        torch._check_value(condition, message)
    elif not condition:  # so that torch.compile can trace the references, which `_check_value` would break
        raise ValueError(message())


def check_tensor(op: str, name: str, tensor: Tensor, dim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    allowed = ", ".join(_name_of(dtype) for dtype in dtypes)
    require(tensor.dtype in dtypes, lambda: f"{op}: {name} is {allowed}, got {_name_of(tensor.dtype)}")
    require(
        tensor.dim() == dim and tensor.is_contiguous(),
        lambda: f"{op}: {name} is a contiguous tensor of {dim} dimensions, got {tuple(tensor.shape)}",
    )


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    require(
        tensor.device == like.device,
        lambda: f"{op}: {name} is on another device than the other arguments",
    )


def described(tensor: Tensor) -> str:
    """ "float32 (2, 3)"."""
    return f"{_name_of(tensor.dtype)} {tuple(tensor.shape)}"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- masks ---------------------------------------------------------------------------------------------------


def check_masked(op: str, weights: Tensor, packed: Tensor, bit_offset: int) -> None:
    check_tensor(op, "weights", weights, 1, MASKED)
    require(
        packed.device == weights.device,
        lambda: f"{op}: packed is on {packed.device}, weights on {weights.device}",
    )
    check_bits(op, packed, weights.numel(), bit_offset)


def check_all_masked(op: str, weights: list[Tensor], packed: list[Tensor], bit_offsets: list[int]) -> None:
    require(
        len(weights) == len(packed) == len(bit_offsets),
        lambda: f"{op}: {len(weights)} weights, {len(packed)} masks and {len(bit_offsets)} bit_offsets",
    )
    for values, mask, bit_offset in zip(weights, packed, bit_offsets, strict=True):
        check_masked(op, values, mask, bit_offset)
        check_device(op, "weights", values, weights[0])


def check_bits(op: str, packed: Tensor, count: int, bit_offset: int) -> None:
    check_tensor(op, "packed", packed, 1, (torch.uint8,))
    require(
        count >= 0 and bit_offset >= 0,
        lambda: f"{op}: a count of {count} or a bit_offset of {bit_offset} is negative",
    )
    require(
        bit_offset + count <= 8 * packed.numel(),
        lambda: f"{op}: bits {bit_offset} to {bit_offset + count} of a mask of {packed.numel()} bytes",
    )


def check_n_of_m(op: str, scores: Tensor, n: int, m: int) -> None:
    check_tensor(op, "scores", scores, 2, (torch.float32,))
    require(0 <= n <= m and m >= 1, lambda: f"{op}: 0 <= n <= m and m >= 1 are needed, got n = {n}, m = {m}")


def check_window(scores: Tensor, competing: Tensor | None, low: int, high: int, capacity: int) -> None:
    op, numel = "mask_window", scores.numel()
    check_tensor(op, "scores", scores, 1, (torch.float32,))
    require(numel <= LARGEST_SUM, lambda: f"{op}: scores has at most 2^31 - 1 elements, got {numel}")
    if competing is not None:
        check_device(op, "competing", competing, scores)
        check_bits(op, competing, numel, 0)
    require(-(2**31) <= low <= high < 2**31, lambda: f"{op}: low <= high are int32, got {low} and {high}")
    require(capacity >= 0, lambda: f"{op}: a capacity of {capacity} is negative")


def check_square_sums(values: Tensor, packed: Tensor | None) -> None:
    op = "mask_square_sums"
    check_tensor(op, "values", values, 1, FLOATS)
    if packed is not None:
        check_device(op, "packed", packed, values)
        check_bits(op, packed, values.numel(), 0)


# --- fake quantization -----------------------------------------------------------------------------------------


def check_fake_quantize(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    quant_min: int,
    quant_max: int,
    steps: int,
    symmetric: bool,
) -> None:
    op, rows = "fake_quantize", x.shape[0] if x.dim() else 0
    require(x.dtype in FLOATS, lambda: f"{op}: x is float32, bfloat16 or float16, got {_name_of(x.dtype)}")
    require(
        x.dim() == 2 and x.is_contiguous(),
        lambda: f"{op}: x is a contiguous matrix (R, C), got {tuple(x.shape)}",
    )
    require(
        -128 <= quant_min <= quant_max <= 255 and steps >= 1,
        lambda: (
            f"{op}: -128 <= quant_min <= quant_max <= 255 and steps >= 1, got {quant_min}, {quant_max}, {steps}"
        ),
    )
    for name, values in (("scale", scale), ("offset", offset)):
        if values is not None:
            _check_range_values(op, name, values, x.device, rows)
    require(
        offset is None or (scale is not None and not symmetric),
        lambda: f"{op}: an offset belongs to a given scale of an asymmetric range",
    )
    require(
        scale is None or offset is not None or symmetric,
        lambda: f"{op}: an asymmetric range with a given scale needs its offset",
    )
    if scale is not None and offset is not None:
        require(scale.numel() == offset.numel(), lambda: f"{op}: scale and offset have the same length")


def check_fake_quantize_float(
    x: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    exponent_bits: int,
    mantissa_bits: int,
    largest: float,
    scale_kind: int,
    block: int,
) -> None:
    op = "fake_quantize_float"
    check_tensor(op, "x", x, 2, FLOATS)
    require(
        2 <= exponent_bits <= 5 and 1 <= mantissa_bits <= 3 and 0.0 < largest <= 2.0**16,
        lambda: (
            f"{op}: a number has 2 to 5 exponent bits, 1 to 3 mantissa bits and a largest value up to 2^16, got "
            f"{exponent_bits}, {mantissa_bits} and {largest}"
        ),
    )
    require(scale_kind in (0, 1, 2), lambda: f"{op}: scale_kind is 0, 1 or 2, got {scale_kind}")
    rows, columns = x.shape
    require(
        block >= 1 and columns % block == 0,
        lambda: f"{op}: block divides the {columns} columns, got {block}",
    )
    if scale is not None:
        check_tensor(op, "scale", scale, 2, (torch.float32,))
        check_device(op, "scale", scale, x)
        shape = (rows, columns // block)
        require(
            scale.numel() == 1 or tuple(scale.shape) == shape,
            lambda: f"{op}: scale is {shape} or (1, 1), got {tuple(scale.shape)}",
        )
    require(
        (global_scale is not None) == (scale is None and scale_kind == 2),
        lambda: f"{op}: a global_scale belongs to scales of kind 2 that are to be chosen",
    )
    if global_scale is not None:
        check_tensor(op, "global_scale", global_scale, 1, (torch.float32,))
        check_device(op, "global_scale", global_scale, x)
        require(global_scale.numel() == 1, lambda: f"{op}: global_scale is one number")


def _check_range_values(op: str, name: str, values: Tensor, device: torch.device, rows: int) -> None:
    require(
        values.dtype is torch.float32 and values.is_contiguous() and values.device == device,
        lambda: f"{op}: {name} is contiguous float32 on {device}",
    )
    require(
        values.dim() == 1 and (values.numel() == 1 or values.numel() == rows),
        lambda: f"{op}: {name} is ({rows},) or (1,), got {tuple(values.shape)}",
    )


# --- payloads --------------------------------------------------------------------------------------------------


def check_format(op: str, bits: int, block: int) -> None:
    require(bits in (8, 4), lambda: f"{op}: bits is 8 or 4, got {bits}")
    require(
        block % 32 == 0 and 32 <= block <= LARGEST_BLOCK,
        lambda: f"{op}: block is a multiple of 32 up to {LARGEST_BLOCK}, got {block}",
    )


def check_payloads(op: str, payloads: Tensor, numel: int, chunk: int, bits: int, block: int) -> None:
    check_tensor(op, "payloads", payloads, 2, (torch.uint8,))
    size = payload_bytes(max(chunk, 0), bits, block)
    require(
        chunk >= 0 and payloads.shape[1] == size,
        lambda: f"{op}: a payload of {chunk} elements has {size} bytes, got rows of {payloads.shape[1]}",
    )
    require(
        payloads.shape[0] * chunk >= numel,
        lambda: f"{op}: {payloads.shape[0]} payloads of {chunk} elements do not hold {numel}",
    )


def check_summands(op: str, payloads: Tensor, numel: int, bits: int, block: int) -> None:
    require(payloads.dim() != 2 or payloads.shape[0] >= 1, lambda: f"{op}: there is no payload to add up")
    check_payloads(op, payloads, 0, numel, bits, block)


def check_residual(op: str, residual: Tensor | None, numel: int, like: Tensor) -> None:
    if residual is None:
        return
    check_tensor(op, "residual", residual, 1, (torch.float32,))
    check_device(op, "residual", residual, like)
    require(
        residual.numel() == numel,
        lambda: f"{op}: residual has {residual.numel()} elements for {numel} values",
    )


def check_block_quantize(
    x: Tensor, payloads: Tensor, residual: Tensor | None, chunk: int, bits: int, block: int
) -> None:
    op = "block_quantize"
    check_format(op, bits, block)
    check_tensor(op, "x", x, 1, FLOATS)
    check_payloads(op, payloads, x.numel(), chunk, bits, block)
    check_device(op, "payloads", payloads, x)
    check_residual(op, residual, x.numel(), x)


def check_block_dequantize(payloads: Tensor, out: Tensor, chunk: int, bits: int, block: int) -> None:
    op = "block_dequantize"
    check_format(op, bits, block)
    check_tensor(op, "out", out, 1, FLOATS)
    check_payloads(op, payloads, out.numel(), chunk, bits, block)
    check_device(op, "payloads", payloads, out)


def check_block_reduce(payloads: Tensor, out: Tensor, bits: int, block: int) -> None:
    op = "block_reduce"
    check_format(op, bits, block)
    check_tensor(op, "out", out, 1, (torch.float32,))
    check_summands(op, payloads, out.numel(), bits, block)
    check_device(op, "payloads", payloads, out)


def check_block_reduce_quantize(
    payloads: Tensor, payload: Tensor, residual: Tensor | None, numel: int, bits: int, block: int
) -> None:
    op = "block_reduce_quantize"
    check_format(op, bits, block)
    check_summands(op, payloads, numel, bits, block)
    check_tensor(op, "payload", payload, 1, (torch.uint8,))
    check_device(op, "payload", payload, payloads)
    require(
        payload.numel() == payloads.shape[1],
        lambda: f"{op}: payload has {payload.numel()} bytes, the summands {payloads.shape[1]}",
    )
    check_residual(op, residual, numel, payloads)


# --- integer linear layers -------------------------------------------------------------------------------------


def check_quantized(weight: Tensor) -> None:
    require(
        weight.dtype is torch.int8 and weight.dim() == 2,
        lambda: f"a quantized weight is int8 (out_features, in_features), got {described(weight)}",
    )


def check_int4_scale(scale: Tensor, rows: int) -> None:
    require(
        scale.dtype is torch.float32 and scale.dim() == 2 and scale.shape[0] == rows,
        lambda: f"scale is float32 ({rows}, groups), got {described(scale)}",
    )


def check_quantize_pack(weight: Tensor, scale: Tensor, steps: int) -> None:
    check_steps(steps)
    require(
        weight.dim() == 2 and weight.dtype in FLOATS,
        lambda: f"weight is (out_features, in_features) in fp32, bf16 or fp16, got {described(weight)}",
    )
    rows = weight.shape[0]
    require(
        scale.dtype is torch.float32 and scale.dim() == 1 and (scale.numel() == 1 or scale.numel() == rows),
        lambda: f"scale is contiguous float32 ({rows},) or (1,), got {described(scale)}",
    )


def check_steps(steps: int) -> None:
    require(steps in (127, 128), lambda: f"steps are 127 or 128, got {steps}")


def check_packed(packed: Tensor, rows: int, columns: int, groups: int = 0) -> None:
    size = packed_bytes(rows, columns, 4 if groups else 8, groups)
    require(
        packed.dtype is torch.uint8 and packed.dim() == 1 and packed.numel() == size,
        lambda: f"a packed weight of ({rows}, {columns}) is uint8 ({size},), got {described(packed)}",
    )


def check_weight_scale(weight_scale: Tensor, rows: int) -> None:
    require(
        weight_scale.dtype is torch.float32 and weight_scale.dim() == 1 and weight_scale.shape[0] == rows,
        lambda: f"weight_scale is contiguous float32 ({rows},), got {described(weight_scale)}",
    )


def check_groups(group_size: int, columns: int, groups: int) -> None:
    require(
        group_size >= 32 and group_size % 32 == 0 and -(-columns // group_size) == groups,
        lambda: (
            f"group_size is a multiple of 32 that makes {groups} groups of {columns} columns, got {group_size}"
        ),
    )


def check_linear(
    x: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    steps: int,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    """What a call of int8_linear or int4_linear must be, once the shape of its weight is known."""
    require(
        x.dim() > 0 and x.shape[-1] == columns and x.dtype in FLOATS,
        lambda: f"x is (..., {columns}) in fp32, bf16 or fp16, got {described(x)}",
    )
    for name, vector, length in (("bias", bias, rows), ("input_scale", input_scale, 1)):
        if vector is not None:
            _check_vector(name, vector, length)
    check_steps(steps)
    require(
        activation in ACTIVATIONS,
        lambda: f"activation is one of {', '.join(ACTIVATIONS)}, got {activation!r}",
    )
    require(
        out_dtype is None or out_dtype in FLOATS, lambda: f"out_dtype is fp32, bf16 or fp16, got {out_dtype}"
    )
    most = LARGEST_SUM // (128 * steps)
    require(
        columns <= most,
        lambda: f"{columns} columns may overflow an int32 sum: at most {most} with {steps} steps",
    )


def _check_vector(name: str, vector: Tensor, length: int) -> None:
    require(
        vector.dtype is torch.float32 and vector.dim() == 1 and vector.shape[0] == length,
        lambda: f"{name} is contiguous float32 ({length},), got {described(vector)}",
    )


def check_block_count(blocks: int) -> None:
    require(blocks >= 0, lambda: f"blocks is how many have a value other than 0, got {blocks}")


# --- integer linear layers of many experts ----------------------------------------------------------------------


def check_grouped(
    x: Tensor,
    packed: Tensor,
    offsets: Tensor,
    rows: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    weight_scale: Tensor | None = None,
) -> None:
    """What a call for many experts has beyond that for one; `rows`: of each expert's weight."""
    require(
        packed.dtype is torch.uint8 and packed.dim() == 2 and packed.shape[0] > 0 and packed.is_contiguous(),
        lambda: f"packed weights of experts are contiguous uint8 (experts, bytes), got {described(packed)}",
    )
    experts = packed.shape[0]
    require(
        x.dim() == 2 and x.dtype in FLOATS,
        lambda: f"x is (rows, in_features) in fp32, bf16 or fp16, got {described(x)}",
    )
    require(
        offsets.dtype in (torch.int32, torch.int64) and offsets.dim() == 1 and offsets.shape[0] == experts,
        lambda: f"offsets are int32 or int64 ({experts},), got {described(offsets)}",
    )
    require(
        x.device == packed.device == offsets.device, lambda: "x, packed and offsets are on the same device"
    )
    for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
        if tensor is not None:
            _check_expert_rows(name, tensor, experts, rows)
    if input_scale is not None:
        _check_vector("input_scale", input_scale, experts)


def check_packed_experts(packed: Tensor, rows: int, columns: int, groups: int = 0) -> None:
    size = packed_bytes(rows, columns, 4 if groups else 8, groups)
    require(
        packed.shape[1] == size,
        lambda: f"packed weights of ({rows}, {columns}) have {size} bytes each, got {described(packed)}",
    )


def _check_expert_rows(name: str, tensor: Tensor, experts: int, rows: int) -> None:
    require(
        tensor.dtype is torch.float32
        and tensor.dim() == 2
        and tensor.shape[0] == experts
        and tensor.shape[1] == rows
        and tensor.is_contiguous(),
        lambda: f"{name} is contiguous float32 ({experts}, {rows}), got {described(tensor)}",
    )


def check_offset_values(ends: list[int], rows: int) -> None:
    before = 0
    for expert, end in enumerate(ends):
        require(
            before <= end <= rows,
            lambda expert=expert, before=before, end=end: (  # type: ignore[misc]
                f"offsets never decrease and end within the {rows} rows of x, got {end} for expert {expert} "
                f"behind {before}"
            ),
        )
        before = end
