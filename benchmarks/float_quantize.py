"""`fake_quantize_float` in the benchmark `fake_quantize`: schemes of compressed_tensors, and what else does them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ds_compress.ops import reference
from ds_compress.ops.library import native
from ds_compress.ops.reference.float_formats import (
    E2M1,
    E4M3,
    FloatFormat,
    ScaleKind,
    global_scale_of,
)

from .bandwidth import Run


@dataclass(frozen=True)
class Scheme:
    """`name` as compressed_tensors has it; `block` 0: a row."""

    name: str
    number: FloatFormat
    kind: ScaleKind
    block: int

    @property
    def ours(self) -> str:
        return f"fake_quantize_float, {self.name}"

    def global_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        return global_scale_of(x.abs().amax(), self.number).view(1) if self.kind is ScaleKind.E4M3 else None

    def call(self, op: Callable[..., object], x: torch.Tensor, keep: bool = False) -> Callable[[], object]:
        return partial(
            op,
            x,
            None,
            self.global_scale(x),
            exponent_bits=self.number.exponent_bits,
            mantissa_bits=self.number.mantissa_bits,
            largest=self.number.largest,
            scale_kind=int(self.kind),
            block=self.block or x.shape[1],
            with_mask=keep,
        )


SCHEMES = (
    Scheme("MXFP4", E2M1, ScaleKind.E8M0, 32),
    Scheme("NVFP4", E2M1, ScaleKind.E4M3, 16),
    Scheme("FP8_DYNAMIC", E4M3, ScaleKind.FP32, 0),
)


def moved_by(x: torch.Tensor) -> int:
    return 2 * x.numel() * x.element_size()


def float_runs(x: torch.Tensor) -> Mapping[str, Run]:
    """Scales are chosen in the call; the global one of NVFP4 is given."""
    runs = {}
    for scheme in SCHEMES:
        op = native().fake_quantize_float
        runs[scheme.ours] = Run(scheme.call(op, x), moved_by(x))
        runs[f"{scheme.ours}, mask"] = Run(scheme.call(op, x, keep=True), moved_by(x) + x.numel() // 8)
    return runs


def float_peers(x: torch.Tensor) -> Mapping[str, Run]:
    """The reference and, where it is installed, compressed_tensors. Its time is with minimum and maximum of the blocks,
    which its observer gives it."""
    runs = {}
    plain = reference.fake_quantize_float.fake_quantize_float
    for scheme in SCHEMES:
        calls = {"the reference in torch": scheme.call(plain, x), "compressed_tensors": theirs(x, scheme)}
        for peer, call in calls.items():
            if call is not None:
                runs[f"{peer}, {scheme.name}"] = Run(call, moved_by(x), peer_of=scheme.ours)
    return runs


def theirs(x: torch.Tensor, scheme: Scheme) -> Callable[[], torch.Tensor] | None:
    try:
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams
    except ImportError:
        return None
    arguments = preset_name_to_scheme(scheme.name, ["Linear"]).weights
    blocks = x.view(x.shape[0], -1, scheme.block or x.shape[1])
    wanted = scheme.global_scale(x)

    def call() -> torch.Tensor:
        least, greatest = blocks.amin(2), blocks.amax(2)
        scale, zero_point = calculate_qparams(least, greatest, arguments, global_scale=wanted)
        return fake_quantize(x, scale, zero_point, arguments, global_scale=wanted)

    return call
