"""Weights with zeros: what they cost in the folder of format "torch", and in time where whole blocks are zero.

    python -m benchmarks.sparse_linear [--quick] [--json] [--record] [--threads 1] [--rounds 9]

First the kernel: `block_sparse_int8_linear` with blocks of 4 outputs x 16 inputs of which 50 to 90 % are zero, beside
`int8_linear` of the same dense weight and torch's fp32 and bf16 `F.linear`, all interleaved; quantizing the rows of x,
dequantizing and bias are counted. Figures: microseconds, and the time over that of `int8_linear` (below 1: faster), the
median over rounds with its quartiles.

Then the folder of an encoder of MiniLM's size (6 layers of 384, 30,522 words) whose linear layers, or whose tables as
well, are pruned in single weights or in blocks, and exported with int8 weights or with floats: bytes of the weight
files, of the linear layers alone, how many times smaller than without zeros, and seconds of `from_pretrained`. The
weights are normal random numbers of which the smallest are zero, by magnitude, of blocks by its mean.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from ds_compress.api import export
from ds_compress.export.load import from_pretrained
from ds_compress.ops.library import native
from ds_compress.ops.reference.block_sparse import count_blocks
from ds_compress.select.patterns import BlockGrid

from . import record
from .bandwidth import keep_freed_memory
from .linear_peers import quantized_of
from .timing import in_turns, interleave, ratio, seconds

SHAPES = [(1536, 384), (384, 1536), (3072, 768), (768, 3072), (5632, 2048), (2048, 5632)]
QUICK_SHAPES = [(1536, 384), (768, 3072)]
ROWS, QUICK_ROWS = (1, 16, 128, 1280), (1, 128)
ZEROS = (0.5, 0.6, 0.7, 0.8, 0.9)
FOLDER_ZEROS = (0.5, 0.7, 0.8, 0.9)
BLOCK = "4x16"
DENSE = "int8_linear"
_SECONDS_OF_A_TURN = 2e-3

Figures = dict[str, dict[str, float]]


def prune(weight: torch.Tensor, zeros: float, pattern: str) -> torch.Tensor:
    """`weight` without the share `zeros` of its smallest weights or blocks."""
    rows, columns = weight.shape
    grid = BlockGrid.of(pattern, (rows, columns), transposed=False)
    scores = grid.block_scores(weight.abs().flatten())
    kept = scores.argsort(descending=True)[: round((1 - zeros) * scores.numel())]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[kept] = True
    whole = grid.expand_block_mask(mask, weight.numel()).view(rows, columns)
    return torch.where(whole, weight, 0.0)


def kernel_figures(m: int, n: int, k: int, rounds: int, threads: int) -> Figures:
    """{variant: its figures} of one shape."""
    torch.manual_seed(m + n + k)
    ops, x, weight, bias = native(), torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    quantized, scale = quantized_of(weight)
    packed, half, half_x = ops.int8_linear_pack(quantized), weight.bfloat16(), x.bfloat16()
    half_bias = bias.bfloat16()
    calls: dict[str, Callable[[], object]] = {
        DENSE: lambda: ops.int8_linear(x, packed, scale, bias),
        "F.linear fp32": lambda: functional.linear(x, weight, bias),
        "F.linear bf16": lambda: functional.linear(half_x, half, half_bias),
    }
    for zeros in ZEROS:
        own, own_scale = quantized_of(prune(weight, zeros, BLOCK))
        blocks = ops.block_sparse_int8_linear_pack(own, count_blocks(own))

        def sparse(blocks: torch.Tensor = blocks, scale: torch.Tensor = own_scale) -> object:
            return ops.block_sparse_int8_linear(x, blocks, scale, bias)

        calls[f"block_sparse_int8_linear, {zeros:.0%} zeros"] = sparse
    device = torch.device("cpu")
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(_SECONDS_OF_A_TURN / seconds(call, device, threads)))
    taken = in_turns(calls, lambda name: seconds(calls[name], device, threads, repeats[name]), rounds)
    figures: Figures = {}
    for name, times in taken.items():
        relative = ratio(times, taken[DENSE])
        figures[name] = {
            "us": 1e6 * sorted(times)[len(times) // 2],
            f"time over {DENSE}": relative.median,
            "lower quartile": relative.low,
            "upper quartile": relative.high,
        }
    return figures


# --- the folder ------------------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval()


def folder_figures(
    zeros: float, pattern: str, kinds: tuple[type[nn.Module], ...], scheme: str | None, rounds: int
) -> dict[str, float]:
    """Of one export of an encoder whose modules of these kinds are pruned; scheme: None stores floats."""
    model = encoder()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, kinds):
                module.weight.copy_(prune(module.weight, zeros, pattern))  # type: ignore[operator, arg-type]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "out"
        report = export(model, folder, "torch", scheme=scheme, check=False)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        loading = interleave({"load": lambda: from_pretrained(folder)}, rounds)["load"]
        return {
            "MB": report.bytes / 1e6,
            "MB of linear layers": sum(report.modules[name]["bytes"] for name in names) / 1e6,
            "seconds to load": loading.median_wall,
            "CPU seconds to load": loading.median_cpu,
        }


def all_folders(rounds: int, quick: bool) -> Figures:
    figures: Figures = {}
    kinds = {"linear layers": (nn.Linear,), "all matrices": (nn.Linear, nn.Embedding)}
    for scheme, title in (("W8A8", "int8"), (None, "fp32")):
        dense = folder_figures(0.0, "unstructured", (), scheme, rounds)
        figures[f"folder, {title}, no zeros"] = dense
        for zeros in (0.8,) if quick else FOLDER_ZEROS:
            for pattern in ("unstructured", BLOCK):
                for where, which in kinds.items():
                    found = folder_figures(zeros, pattern, which, scheme, rounds)
                    for what in ("MB", "MB of linear layers"):
                        found[f"times smaller, {what}"] = dense[what] / found[what]
                    figures[f"folder, {title}, {zeros:.0%} of {where}, {pattern}"] = found
    return figures


def table(figures: Figures, title: str) -> Table:
    columns = list(dict.fromkeys(name for own in figures.values() for name in own))
    made = Table(title=title)
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    for name, own in figures.items():
        made.add_row(name, *(f"{own[column]:.3f}" if column in own else "" for column in columns))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, one share of zeros, three rounds")
    record.add_output_arguments(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="without --quick")
    parser.add_argument("--part", choices=("all", "kernel", "folder"), default="all")
    args = parser.parse_args()

    keep_freed_memory()  # the result is allocated in every call
    torch.set_num_threads(args.threads)
    console, rounds = Console(width=150), 3 if args.quick else args.rounds
    everything: Figures = {}
    if args.part != "folder":
        for n, k in QUICK_SHAPES if args.quick else SHAPES:
            for m in QUICK_ROWS if args.quick else ROWS:
                title = f"M {m}, N {n}, K {k}, {args.threads} thread{'s' * (args.threads > 1)}"
                figures = kernel_figures(m, n, k, rounds, args.threads)
                console.print(table(figures, title))
                everything |= {f"{title}: {name}": own for name, own in figures.items()}
    if args.part != "kernel":
        folders = all_folders(rounds, args.quick)
        console.print(table(folders, 'format "torch" of an encoder of MiniLM\'s size'))
        everything |= folders
    record.report("sparse_linear", everything, args)


if __name__ == "__main__":
    main()
