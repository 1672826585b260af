"""The parts of a quantized gradient reduction: quantize, add up, requantize, read back; 25 million elements.

    python -m benchmarks.block_quantize [--quick] [--json] [--threads 1,2] [--device cuda]

int8 and int4 in blocks of 512, fp32 and bf16 gradients, with and without error feedback, two ranks in a reduction. The
peers are the formulas in eager torch: naively, a pass per operation over all elements, and as the reference does them,
a piece at a time in cache.

On CUDA the same runs are timed between events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ds_compress.ops import reference
from ds_compress.ops.library import native
from ds_compress.ops.sizes import payload_bytes

from .bandwidth import COPY, Run, run_benchmark

NUMEL, BLOCK, RANKS = 25_165_824, 512, 2


def naive_quantize(x: torch.Tensor, payload: torch.Tensor) -> None:
    """int8, whole blocks, nothing special: what an eager implementation does at least."""
    blocks = x.float().view(-1, BLOCK)
    scale = blocks.abs().amax(1) / 127
    quantized = (blocks / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    payload[: 4 * scale.numel()].copy_(scale.view(torch.uint8))
    payload[4 * scale.numel() :].copy_(quantized.view(torch.uint8).view(-1))


def naive_sum(payloads: torch.Tensor, out: torch.Tensor) -> None:
    blocks = out.numel() // BLOCK
    out.zero_()
    for payload in payloads:
        scale = payload[: 4 * blocks].view(torch.float32)
        quantized = payload[4 * blocks :].view(torch.int8).view(blocks, BLOCK)
        out.view(blocks, BLOCK).add_(quantized.float().mul_(scale[:, None]))


def runs_of(bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    ops, plain = native(), reference.block_quantize
    x = torch.randn(NUMEL, device=device).to(dtype)
    values, target = torch.randn(NUMEL, device=device), torch.empty(NUMEL, device=device)
    out, residual = torch.empty_like(x), torch.zeros(NUMEL, device=device)
    size = payload_bytes(NUMEL, bits, BLOCK)
    payload = torch.empty(1, size, dtype=torch.uint8, device=device)
    read = x.element_size() * NUMEL
    part = NUMEL // RANKS
    parts = torch.empty(RANKS, payload_bytes(part, bits, BLOCK), dtype=torch.uint8, device=device)
    ops.block_quantize(x, payload, None, NUMEL, bits, BLOCK)
    ops.block_quantize(x, parts, None, part, bits, BLOCK)
    total, reduced = torch.empty(part, device=device), torch.empty_like(parts[0])
    form = (bits, BLOCK)
    runs = {
        COPY: Run(lambda: target.copy_(values), 8 * NUMEL),
        "quantize": Run(lambda: ops.block_quantize(x, payload, None, NUMEL, *form), read + size),
        "quantize, error feedback": Run(
            lambda: ops.block_quantize(x, payload, residual, NUMEL, *form), read + 8 * NUMEL + size
        ),
        "dequantize": Run(lambda: ops.block_dequantize(payload, out, NUMEL, *form), read + size),
        "reduce": Run(lambda: ops.block_reduce(parts, total, *form, 0.5), parts.numel() + 4 * part),
        "reduce and quantize": Run(
            lambda: ops.block_reduce_quantize(parts, reduced, None, part, *form, 0.5),
            parts.numel() + reduced.numel(),
        ),
        "quantize, reference": Run(
            lambda: plain.block_quantize(x, payload, None, NUMEL, *form), read + size, peer_of="quantize"
        ),
        "dequantize, reference": Run(
            lambda: plain.block_dequantize(payload, out, NUMEL, *form), read + size, peer_of="dequantize"
        ),
        "reduce, reference": Run(
            lambda: plain.block_reduce(parts, total, *form, 0.5),
            parts.numel() + 4 * part,
            peer_of="reduce",
        ),
    }
    if bits == 8:
        runs["quantize, naive eager"] = Run(
            lambda: naive_quantize(x, payload[0]), read + size, peer_of="quantize"
        )
        runs["reduce, naive eager"] = Run(
            lambda: naive_sum(parts, total), parts.numel() + 4 * part, peer_of="reduce"
        )
    return runs


def cases(device: torch.device, quick: bool) -> Mapping[str, Callable[[], Mapping[str, Run]]]:
    made: dict[str, Callable[[], Mapping[str, Run]]] = {
        "int8 of fp32": lambda: runs_of(8, torch.float32, device),
        "int4 of fp32": lambda: runs_of(4, torch.float32, device),
    }
    if not quick:
        made["int8 of bf16"] = lambda: runs_of(8, torch.bfloat16, device)
    return made


if __name__ == "__main__":
    run_benchmark("block_quantize", __doc__ or "", cases, rounds=9, quick_rounds=4)
