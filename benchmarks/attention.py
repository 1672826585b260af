"""Attention of short sequences beside `scaled_dot_product_attention` of torch, on one thread.

    python -m benchmarks.attention [--quick] [--json] [--record] [--rounds 9]

Query, key and value are parts of one product, as a served encoder has them; results lie head beside head on both
sides. A shape is: sequences x tokens, heads of so many numbers, and how many heads of keys where there are fewer. For
each of fp32 and bf16, with and without a mask: the time over torch's in the same round, the median and its quartiles;
below 1: faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from ds_compress.ops.library import native

from . import record
from .bandwidth import keep_freed_memory
from .timing import in_turns, ratio, seconds

Figures = dict[str, dict[str, float]]
Shape = tuple[int, int, int, int, int]
"""Sequences, tokens, heads, heads of keys, width of a head."""

SHAPES: tuple[Shape, ...] = (
    (32, 40, 12, 12, 32),
    (1, 40, 12, 12, 32),
    (1, 16, 12, 12, 64),
    (8, 128, 12, 12, 64),
    (1, 128, 32, 8, 64),
    (1, 512, 12, 12, 64),
    (1, 1024, 12, 12, 64),
    (1, 2048, 4, 4, 128),
)
QUICK_SHAPES = SHAPES[:2]
OURS, TORCH = "ours", "torch"
_SECONDS_OF_A_TURN = 0.02


def title_of(shape: Shape) -> str:
    batch, tokens, heads, groups, width = shape
    return f"{batch} x {tokens}, {heads} heads of {width}" + f", {groups} of keys" * (groups != heads)


def figures_of(shape: Shape, dtype: torch.dtype, masked: bool, rounds: int) -> dict[str, float]:
    batch, tokens, heads, groups, width = shape
    torch.manual_seed(tokens)
    product = torch.randn(batch, tokens, (heads + 2 * groups) * width, dtype=dtype)
    parts = product.split([heads * width, groups * width, groups * width], -1)
    query, key, value = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
    mask = torch.rand(batch, 1, tokens, tokens) < 0.9 if masked else None
    ops = native()

    def by_torch() -> torch.Tensor:
        k, v = key, value
        if groups != heads and masked:  # as transformers does: torch shares keys without a mask only
            k, v = (each.repeat_interleave(heads // groups, 1) for each in (key, value))
        y = scaled_dot_product_attention(query, k, v, mask, enable_gqa=groups != heads and not masked)
        return y.transpose(1, 2).contiguous()

    calls: dict[str, Callable[[], torch.Tensor]] = {
        OURS: lambda: ops.attention(query, key, value, mask, scale=width**-0.5),
        TORCH: by_torch,
    }
    torch.testing.assert_close(
        calls[OURS](), calls[TORCH](), rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5
    )
    device = torch.device("cpu")
    repeats = {
        name: max(1, round(_SECONDS_OF_A_TURN / seconds(call, device, 1))) for name, call in calls.items()
    }
    taken = in_turns(calls, lambda name: seconds(calls[name], device, 1, repeats[name]), rounds)
    relative = ratio(taken[OURS], taken[TORCH])
    return {
        "us": 1e6 * sorted(taken[OURS])[rounds // 2],
        "us, torch": 1e6 * sorted(taken[TORCH])[rounds // 2],
        "time over torch": relative.median,
        "lower quartile": relative.low,
        "upper quartile": relative.high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds")
    record.add_output_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9, help="without --quick")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(1)
    figures: Figures = {}
    with torch.inference_mode():
        for shape in QUICK_SHAPES if args.quick else SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for masked in (False, True):
                    name = f"{title_of(shape)}: {str(dtype).removeprefix('torch.')}{', masked' * masked}"
                    figures[name] = figures_of(shape, dtype, masked, 3 if args.quick else args.rounds)
    shown = Table(title="attention, one thread")
    shown.add_column("", no_wrap=True)
    for column in next(iter(figures.values())):
        shown.add_column(column, justify="right")
    for name, own in figures.items():
        shown.add_row(name, *(f"{value:.3g}" for value in own.values()))
    Console(width=120).print(shown)
    record.report("attention", figures, args)


if __name__ == "__main__":
    main()
