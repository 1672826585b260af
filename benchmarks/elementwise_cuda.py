"""Every elementwise op on a CUDA device, beside a copy of as many bytes: milliseconds, percent of a copy, roofline.

    python -m benchmarks.elementwise_cuda [--out FILE] [--rounds 20] [--numel 25165824] [--device cuda]

A run's *bytes* are those that the operation has to read and write, each once. The roofline predicts that they pass
as fast as those of `Tensor.copy_` on 100 MB; "% of a copy" compares with a copy of as many bytes, which for few of them
is slower: every kernel needs time to begin and to end. Copies of several sizes are timed in the same rounds. Each
sample is the time of several calls between two CUDA events, on inputs that rotate through more memory than the
second-level cache has, with the queue filled first, so that nothing waits for Python. Medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .elementwise_runs import (
    ASYMMETRIC,
    BLOCK,
    FLOATS,
    SYMMETRIC,
    Run,
    block_runs,
    fake_quantize_runs,
    float_runs,
    many_runs,
    mask_runs,
    peers,
)

ROOT = Path(__file__).resolve().parents[1]


def import_ops() -> tuple[Any, Any]:
    """`ds_compress.ops` and its reference; where DeepSpeed is not installed, without the package around them."""
    try:
        import ds_compress  # noqa: F401
    except ImportError:
        package = types.ModuleType("ds_compress")
        package.__path__ = [str(ROOT / "ds_compress")]
        sys.modules["ds_compress"] = package
    from ds_compress.ops import library, reference

    return library, reference


# --- timing --------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(runs: list[Run], rounds: int, device: torch.device, calls: int = 4) -> list[list[float]]:
    """Seconds of one call, by run and round. The first two rounds are not counted."""
    taken: list[list[float]] = [[] for _ in runs]
    position = [0] * len(runs)
    for round_number in range(-2, rounds):
        pending = []
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # about 10 ms, in which the queue fills
        shift = round_number % len(runs)
        for index in [*range(shift, len(runs)), *range(shift)]:
            run = runs[index]
            chosen = [run.calls[(position[index] + i) % len(run.calls)] for i in range(calls)]
            position[index] += calls
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for call in chosen:
                    call()
                end.record()
                pending.append((index, start, end))
            else:
                begin = time.perf_counter()
                for call in chosen:
                    call()
                if round_number >= 0:
                    taken[index].append((time.perf_counter() - begin) / calls)
        wait(device)
        if round_number >= 0:
            for index, start, end in pending:
                taken[index].append(start.elapsed_time(end) / 1e3 / calls)
    return taken


def copy_time(copies: list[tuple[float, float]], bytes_: float) -> float:
    """Seconds that a copy of `bytes_` takes, between or beyond those of (bytes, seconds), from large to small."""
    for (high, after), (low, before) in pairwise(copies):
        if bytes_ >= low or low == copies[-1][0]:
            return before + (after - before) * (bytes_ - low) / (high - low)
    raise ValueError("at least two copies are needed")


def report(runs: list[Run], taken: list[list[float]]) -> dict[str, dict[str, float]]:
    """By run. The first ones are copies, from large to small. Ratios are taken within a round."""
    copies = [index for index, run in enumerate(runs) if run.name.startswith("copy_")]
    rounds = [[(runs[c].bytes, taken[c][r]) for c in copies] for r in range(len(taken[0]))]
    result = {}
    for run, times in zip(runs, taken, strict=True):
        possible = [
            t * r[0][0] / r[0][1] for r, t in zip(rounds, times, strict=True)
        ]  # bytes, at the rate of a copy
        result[run.name] = {
            "ms": 1e3 * statistics.median(times),
            "roofline ms": 1e3 * run.bytes * statistics.median(taken[0]) / runs[0].bytes,
            "GB/s": 1e-9 * run.bytes / statistics.median(times),
            "percent of a copy": 100
            * statistics.median(copy_time(r, run.bytes) / t for r, t in zip(rounds, times, strict=True)),
            "percent of the roofline": 100 * statistics.median(run.bytes / bytes_ for bytes_ in possible),
        }
    return result


def groups(ops: Any, payload_bytes: Any, numel: int, device: torch.device) -> Iterator[Iterator[Run]]:
    """Groups of runs whose memory is taken at a time."""
    yield mask_runs(ops, numel, device)
    yield fake_quantize_runs(ops, numel, device)
    yield float_runs(ops, numel, device)
    yield block_runs(ops, payload_bytes, numel, device)
    yield many_runs(ops, device)


def run_all(
    ops: Any, payload_bytes: Any, numel: int, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    everything: dict[str, dict[str, float]] = {}
    for group in groups(ops, payload_bytes, numel, device):
        runs = [*peers(numel, device), *group]
        everything |= {
            name: row
            for name, row in report(runs, measure(runs, rounds, device)).items()
            if name not in everything
        }
    return everything


def print_table(result: dict[str, dict[str, float]]) -> None:
    print(f"{'':52}{'ms':>9}{'roofline':>10}{'GB/s':>8}{'% of roofline':>15}{'% of a copy':>13}")
    for name, row in result.items():
        print(
            f"{name:52}{row['ms']:9.4f}{row['roofline ms']:10.4f}{row['GB/s']:8.0f}"
            f"{row['percent of the roofline']:15.1f}{row['percent of a copy']:13.1f}"
        )


# --- a quick look whether they are right --------------------------------------------------------


def wrong(ops: Any, reference: Any, payload_bytes: Any, device: torch.device) -> list[str]:
    """What differs from the reference in plain torch, on a few sizes; long checks are those of `pytest -m gpu`."""
    found = []
    implementations = reference.IMPLEMENTATIONS

    def same(name: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        a, b = mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
        if a.shape != b.shape or not torch.equal(a, b):
            found.append(name)

    for numel, off in ((1_000_003, 0), (1 << 20, 0), (300_007, 3)):
        data = torch.randn(numel + off, device=device)
        packed = torch.randint(0, 256, (-(-(numel + off) // 8),), dtype=torch.uint8, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            mine, theirs = data.to(dtype)[off:].clone(), data.to(dtype)[off:].clone()
            ops.mask_apply_(mine, packed, off, 0.0)
            implementations["mask_apply_"](theirs, packed, off, 0.0)
            same(f"mask_apply_ {numel} {dtype}", mine, theirs)
            for bits in (8, 4):
                size = payload_bytes(numel, bits, BLOCK[bits])
                a, b = (torch.zeros(1, size, dtype=torch.uint8, device=device) for _ in range(2))
                x = data.to(dtype)[off:]
                rest_a, rest_b = (torch.full((numel,), 0.01, device=device) for _ in range(2))
                ops.block_quantize(x, a, rest_a, numel, bits, BLOCK[bits])
                implementations["block_quantize"](x, b, rest_b, numel, bits, BLOCK[bits])
                same(f"block_quantize {numel} {dtype} int{bits}", a, b)
                same(f"block_quantize {numel} {dtype} int{bits}: residual", rest_a, rest_b)
                out_a, out_b = (torch.empty(numel, dtype=dtype, device=device) for _ in range(2))
                ops.block_dequantize(a, out_a, numel, bits, BLOCK[bits])
                implementations["block_dequantize"](b, out_b, numel, bits, BLOCK[bits])
                same(f"block_dequantize {numel} {dtype} int{bits}", out_a, out_b)
                sum_a, sum_b = (torch.empty(numel, device=device) for _ in range(2))
                both = torch.cat([b, b])
                ops.block_reduce(both, sum_a, bits, BLOCK[bits], 0.5)
                implementations["block_reduce"](both, sum_b, bits, BLOCK[bits], 0.5)
                same(f"block_reduce {numel} int{bits}", sum_a, sum_b)
        keep = data > 0
        same(f"mask_pack {numel}", ops.mask_pack(keep), implementations["mask_pack"](keep))
        same(
            f"mask_unpack {numel}",
            ops.mask_unpack(packed, numel, off),
            implementations["mask_unpack"](packed, numel, off),
        )
    for rows, columns in (
        (1000, 128),
        (999, 768),
        (37, 4096),
        (11, 16384),
        (3, 50_001),
        (1, 1 << 20),
        (77, 100),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, columns, device=device).to(dtype)
            for grid in (SYMMETRIC, ASYMMETRIC):
                got, expected = (
                    [t for t in f(x, **grid, with_mask=True) if t.numel()]
                    for f in (ops.fake_quantize, implementations["fake_quantize"])
                )
                for part, a, b in zip(("y", "scale", "offset or mask", "mask"), got, expected, strict=False):
                    same(f"fake_quantize {rows}x{columns} {dtype} {grid['symmetric']}: {part}", a, b)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(333, 4096, device=device).to(dtype)
        for title, block, form in FLOATS:
            wanted = torch.full((1,), 500.0, device=device) if form["scale_kind"] == 2 else None
            got, expected = (
                f(x, None, wanted, **form, block=block or 4096, with_mask=True)
                for f in (ops.fake_quantize_float, implementations["fake_quantize_float"])
            )
            for part, a, b in zip(("y", "scale", "mask"), got, expected, strict=True):
                same(f"fake_quantize_float {dtype} {title}: {part}", a, b)
    scores = torch.randn(64, 4096, device=device)
    same("mask_n_of_m", ops.mask_n_of_m(scores, 2, 4), implementations["mask_n_of_m"](scores, 2, 4))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--numel", type=int, default=25_165_824)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    library, reference = import_ops()
    from ds_compress.ops.sizes import payload_bytes

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ops = library.native()
    record: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "numel": args.numel,
        "rounds": args.rounds,
    }
    record["wrong"] = wrong(ops, reference, payload_bytes, device)
    record["figures"] = run_all(ops, payload_bytes, args.numel, args.rounds, device)
    print(f"{name}; wrong: {record['wrong'] or 'nothing'}")
    print_table(record["figures"])
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
