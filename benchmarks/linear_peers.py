"""Every way to run a linear layer with 8-bit weights, or in fp32 and bf16, that this torch or an installed package has.

A peer is made from a fp32 weight and bias for one number of rows, and then called with fp32 rows; it returns fp32
(or bf16). Quantizing the rows is part of the call, unless the name says "product only". What fails to be made, or fails
at its first call, is reported with its reason.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Call = Callable[[torch.Tensor], torch.Tensor]
Maker = Callable[[torch.Tensor, torch.Tensor, int], Call]


class AbsentError(Exception):
    """The package is not installed."""


def quantized_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values (N, K), fp32 scales (N,)) of a symmetric grid per row."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


def linear_fp32(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
    return lambda x: functional.linear(x, weight, bias)


def linear_bf16(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
    half, half_bias = weight.bfloat16(), bias.bfloat16()
    return lambda x: functional.linear(x.bfloat16(), half, half_bias)


def onednn_packed_fp32(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def int_mm_product_only(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
    quantized = quantized_of(weight)[0].t()
    left = torch.randint(-127, 128, (rows, weight.shape[1]), dtype=torch.int8, device=weight.device)
    return lambda x: torch._int_mm(left, quantized)


def int_mm(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
    quantized, weight_scale = quantized_of(weight)
    transposed = quantized.t()

    def call(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(1, keepdim=True) / 127
        left = (x / scale).round_().to(torch.int8)
        return torch._int_mm(left, transposed).float().mul_(scale * weight_scale).add_(bias)

    return call


def onednn_qlinear(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
    quantized, weight_scale = quantized_of(weight)
    packed = torch.ops.onednn.qlinear_prepack(quantized, [rows, weight.shape[1]])
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)

    def call(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax().item() / 127
        unsigned = x.div(scale).round_().add_(128.0).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            unsigned, scale, 128, packed, weight_scale, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )

    return call


def linear_dynamic(engine: str) -> Maker:
    def make(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated, the op is not
            if engine == "qnnpack":  # it has no per-row scales here
                quantized = torch.quantize_per_tensor(weight, weight.abs().max().item() / 127, 0, torch.qint8)
            else:
                zeros = torch.zeros(weight.shape[0], dtype=torch.long)
                quantized = torch.quantize_per_channel(weight, quantized_of(weight)[1], zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, bias)
        # As torch.ao's modules call it: fbgemm and x86 take one bit less, for their 16-bit sums saturate.
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)

    return make


def torchao_dynamic(compiled: bool) -> Maker:
    def make(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
        torchao = _imported("torchao.quantization")
        module: torch.nn.Module = _module(weight, bias)
        torchao.quantize_(module, torchao.Int8DynamicActivationInt8WeightConfig())
        if compiled:
            torch._dynamo.reset()  # it gives up compiling at its ninth shape
            module = torch.compile(module)  # type: ignore[assignment]
        return torch.no_grad()(module)

    return make


def bitsandbytes_int8(weight: torch.Tensor, bias: torch.Tensor, rows: int) -> Call:
    module = _imported("bitsandbytes.nn").Linear8bitLt(
        weight.shape[1], weight.shape[0], has_fp16_weights=False
    )
    module.load_state_dict(_module(weight, bias).state_dict())
    return torch.no_grad()(module.to(weight.device))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(f"{name.partition('.')[0]} is not installed") from error


def _module(weight: torch.Tensor, bias: torch.Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module.requires_grad_(False)


FP32 = "oneDNN packed fp32"


def peers(device: torch.device, quick: bool) -> dict[str, Maker]:
    """{name: maker}; on CUDA only what runs there."""
    made: dict[str, Maker] = {
        "F.linear fp32": linear_fp32,
        "F.linear bf16": linear_bf16,
        "_int_mm, product only": int_mm_product_only,
        "_int_mm, eager quantization": int_mm,
        "torchao dynamic": torchao_dynamic(compiled=False),
        "bitsandbytes int8": bitsandbytes_int8,
    }
    if not quick:
        made["torchao dynamic, compiled"] = torchao_dynamic(compiled=True)
    if device.type == "cpu":
        made[FP32] = onednn_packed_fp32
        made["onednn.qlinear u8, eager quantization"] = onednn_qlinear
        for engine in torch.backends.quantized.supported_engines:
            if engine != "none":
                made[f"linear_dynamic {engine}"] = linear_dynamic(engine)
    return made


def is_8_bit(name: str) -> bool:
    """Whether a peer does what int8_linear does, quantization counted."""
    return "fp32" not in name and "bf16" not in name and "product only" not in name
