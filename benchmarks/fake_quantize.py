"""Fused fake quantization beside the same formulas in eager torch and beside torch's own fake-quantize ops.

    python -m benchmarks.fake_quantize [--quick] [--json] [--threads 1,2] [--device cuda]

Activations of a batch of 32 x 40 tokens (per token) and weights of BERT-base's size (per channel), 8 bits, ranges
measured in the same call, with and without the bits of what was not clipped. The peers are `quant.grid` (what layers
ran on before), the reference, and `torch.fake_quantize_per_channel_affine`, once with its ranges given, which is less
work, and once with a scale measured first. Floats of 4 and 8 bits have the reference and the fake_quantize of
compressed_tensors for peers. The result is allocated in all of them, as a layer does.

On CUDA the same runs are timed between events; that has never been tried on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ds_compress.ops import reference
from ds_compress.ops.library import native
from ds_compress.quant.arithmetic import dequantize_, quantize_block
from ds_compress.quant.grid import Grid
from ds_compress.quant.qparams import choose_qparams

from .bandwidth import COPY, Run, run_benchmark
from .float_quantize import float_peers, float_runs

SHAPES = {
    "activation 1280 x 384": (1280, 384),
    "activation 1280 x 1536": (1280, 1536),
    "weight 3072 x 768": (3072, 768),
}
SYMMETRIC, ASYMMETRIC = Grid(8, True, True), Grid(8, False)


def runs_of(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    x = torch.randn(shape, device=device).to(dtype)
    target = torch.empty_like(x)
    moved = 2 * x.numel() * x.element_size()
    zeros = torch.zeros(shape[0], dtype=torch.int32, device=device)
    ours = "fake_quantize"
    measured = (x.float().abs().amax(1) / 127).clamp_min(2.0**-126)

    def fused(grid: Grid, keep: bool) -> object:
        return native().fake_quantize(
            x,
            quant_min=grid.quant_min,
            quant_max=grid.quant_max,
            steps=grid.scale_divisor,
            symmetric=grid.symmetric,
            with_mask=keep,
        )

    def eager(grid: Grid) -> torch.Tensor:
        exact = x.float()
        qparams = choose_qparams(exact, (1,), grid)
        return dequantize_(quantize_block(exact, qparams, grid), qparams).to(dtype)

    def per_channel(scale: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, -127, 127)

    runs = {
        COPY: Run(lambda: target.copy_(x), moved),
        "clone": Run(lambda: x.clone(), moved),
        ours: Run(lambda: fused(SYMMETRIC, False), moved),
        f"{ours}, mask": Run(lambda: fused(SYMMETRIC, True), moved + x.numel() // 8),
        f"{ours}, asymmetric": Run(lambda: fused(ASYMMETRIC, False), moved),
        f"{ours}, range given": Run(
            lambda: native().fake_quantize(
                x, measured, quant_min=-127, quant_max=127, steps=127, symmetric=True, with_mask=False
            ),
            moved,
        ),
        **float_runs(x),
        "quant.grid, eager": Run(lambda: eager(SYMMETRIC), moved, peer_of=ours),
        "quant.grid, eager, asymmetric": Run(lambda: eager(ASYMMETRIC), moved, peer_of=f"{ours}, asymmetric"),
        "the reference in torch": Run(
            lambda: reference.fake_quantize.fake_quantize(
                x, quant_min=-127, quant_max=127, steps=127, symmetric=True, with_mask=False
            ),
            moved,
            peer_of=ours,
        ),
        "torch per channel, range given": Run(
            lambda: per_channel(measured), moved, peer_of=f"{ours}, range given"
        ),
        "torch per channel, range measured": Run(
            lambda: per_channel(x.abs().amax(1).float().div_(127).clamp_min_(2.0**-126)), moved, peer_of=ours
        ),
        **float_peers(x),
    }
    return runs


def cases(device: torch.device, quick: bool) -> Mapping[str, Callable[[], Mapping[str, Run]]]:
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    return {
        f"{name}, {str(dtype).removeprefix('torch.')}": partial(runs_of, shape, device, dtype)
        for dtype in dtypes
        for name, shape in SHAPES.items()
    }


if __name__ == "__main__":
    run_benchmark("fake_quantize", __doc__ or "", cases, rounds=51, quick_rounds=15)
