"""The experts' product of a mixture in integers, in one call, beside a loop over experts and torch's grouped product.

    python -m benchmarks.grouped_linear [--quick] [--json] [--record [FOLDER]] [--threads 1,2] [--rounds 7]

The first matrices (gate and up together) of the experts of real models, tokens sent at random to as many experts as the
model chooses. Counted for ours: the scale of every row, quantizing it, the product, dequantizing, bias. Weights are
normal random numbers, packed or cast once; fp32 rows in, for bf16 peers bf16 rows. The host knows beforehand where each
expert's rows end, which the loops need and the grouped products do not. "times slower" is the median over the rounds
against int8_grouped_linear: above 1, ours is faster. On a CUDA device the same runs are timed between events.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch.nn import functional

from ds_compress.ops.library import native

from . import record
from .bandwidth import keep_freed_memory
from .int8_linear import Calls, measure, table
from .linear_peers import quantized_of

MODELS = {
    "Granite 3 1B-A400M": (32, 8, 1024, 1024),
    "OLMoE 1B-7B": (64, 8, 2048, 2048),
    "Qwen1.5-MoE A2.7B": (60, 4, 2816, 2048),
}
"""{name: (experts, experts of a token, outputs, inputs)}"""
TOKENS = (1, 8, 64, 512)
QUICK_MODELS, QUICK_TOKENS = {"a small mixture": (8, 2, 256, 256)}, (1, 64)
GROUP = 64
OURS, OURS_INT4 = "int8_grouped_linear", f"int4_grouped_linear, groups of {GROUP}"


@dataclass(frozen=True)
class Weights:
    """One layer's experts in every form."""

    full: torch.Tensor
    half: torch.Tensor
    int8: torch.Tensor
    scale: torch.Tensor
    int4: torch.Tensor

    @classmethod
    def random(cls, experts: int, outputs: int, inputs: int, device: torch.device) -> Weights:
        full = torch.randn(experts, outputs, inputs, device=device)
        ops, packed, packed4, scales = native(), [], [], []
        for weight in full:
            values, scale = quantized_of(weight)
            packed.append(ops.int8_linear_pack(values))
            scales.append(scale)
            groups = weight.view(outputs, inputs // GROUP, GROUP)
            scale4 = groups.abs().amax(2) / 7
            values4 = (groups / scale4.unsqueeze(2)).round().to(torch.int8).view(outputs, inputs)
            packed4.append(ops.int4_linear_pack(values4, scale4))
        return cls(full, full.bfloat16(), torch.stack(packed), torch.stack(scales), torch.stack(packed4))


def looped(
    multiply: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor, ends: list[int], y: torch.Tensor
) -> torch.Tensor:
    """One product for each expert that has rows, into `y`."""
    begin = 0
    for expert, end in enumerate(ends):
        if begin < end:
            y[begin:end] = multiply(x[begin:end], expert)
        begin = end
    return y


def calls_of(weights: Weights, tokens: int, chosen: int) -> Calls:
    """{name: the product of all rows}; rows are sorted by expert."""
    ops, device = native(), weights.full.device
    experts, outputs, inputs = weights.full.shape
    ids = torch.rand(tokens, experts).topk(chosen).indices.flatten()
    counts = torch.bincount(ids, minlength=experts)
    offsets, ends = counts.cumsum(0).to(device, torch.int32), counts.cumsum(0).tolist()
    x, bias = torch.randn(len(ids), inputs, device=device), torch.randn(experts, outputs, device=device)
    y, half = x.new_empty(len(ids), outputs), x.bfloat16()
    half_y, half_bias = half.new_empty(len(ids), outputs), bias.bfloat16()
    transposed = weights.half.transpose(1, 2)
    return {
        OURS: partial(ops.int8_grouped_linear, x, weights.int8, weights.scale, offsets, bias),
        OURS_INT4: partial(ops.int4_grouped_linear, x, weights.int4, outputs, GROUP, offsets, bias),
        "int8_linear, one call for each expert": partial(
            looped,
            lambda rows, e: ops.int8_linear(rows, weights.int8[e], weights.scale[e], bias[e]),
            x,
            ends,
            y,
        ),
        "F.linear fp32, one call for each expert": partial(
            looped, lambda rows, e: functional.linear(rows, weights.full[e], bias[e]), x, ends, y
        ),
        "F.linear bf16, one call for each expert": partial(
            looped, lambda rows, e: functional.linear(rows, weights.half[e], half_bias[e]), half, ends, half_y
        ),
        "torch._grouped_mm bf16, without bias": partial(torch._grouped_mm, half, transposed, offsets),
    }


def figures_of(calls: Calls, taken: dict[str, list[float]], operations: float) -> dict[str, dict[str, float]]:
    found = {}
    for name in calls:
        seconds = statistics.median(taken[name])
        found[name] = {"us": 1e6 * seconds, "GOPS": operations / seconds / 1e9}
        if name != OURS:
            ratios = [other / own for other, own in zip(taken[name], taken[OURS], strict=True)]
            found[name]["times slower"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small mixture and few rounds: some seconds")
    record.add_output_arguments(parser)
    parser.add_argument("--threads", default="1", help="for example 1,2")
    parser.add_argument("--rounds", type=int, default=7, help="without --quick")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    keep_freed_memory()
    console, device = Console(width=120), torch.device(args.device)
    everything: dict[str, dict[str, float]] = {}
    for model, (experts, chosen, outputs, inputs) in (QUICK_MODELS if args.quick else MODELS).items():
        torch.manual_seed(experts)
        weights = Weights.random(experts, outputs, inputs, device)
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            for tokens in QUICK_TOKENS if args.quick else TOKENS:
                title = f"{model}, {tokens} token{'s' * (tokens > 1)}, {threads} thread{'s' * (threads > 1)}"
                calls = calls_of(weights, tokens, chosen)
                taken = measure(calls, 3 if args.quick else args.rounds, device, threads)
                found = figures_of(calls, taken, 2.0 * tokens * chosen * outputs * inputs)
                console.print(table(found, title))
                everything |= {f"{title}: {name}": figures for name, figures in found.items()}
    record.report("grouped_linear", everything, args)


if __name__ == "__main__":
    main()
