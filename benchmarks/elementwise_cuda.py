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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CACHE_BYTES = 60e6


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


# --- runs --------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """`calls`: the same operation on different memory; `bytes`: what one of them has to move."""

    name: str
    bytes: float
    calls: list[Callable[[], object]]


def rotated(name: str, bytes_: float, make: Callable[[int], Callable[[], object]]) -> Run:
    """`make(i)` makes the i-th call on memory of its own."""
    return Run(name, bytes_, [make(i) for i in range(max(2, int(4 * CACHE_BYTES / bytes_) + 1))])


SYMMETRIC = {"quant_min": -127, "quant_max": 127, "steps": 127, "symmetric": True}
ASYMMETRIC = {"quant_min": 0, "quant_max": 255, "steps": 256, "symmetric": False}
BLOCK, RANKS = {8: 512, 4: 128}, 2  # the blocks that a run has by default


def peers(numel: int, device: torch.device) -> Iterator[Run]:
    """Copies, of all elements first and of fewer, and what torch itself offers for a mask."""

    def copy(count: int) -> Run:
        def make(i: int) -> Callable[[], object]:
            source, target = torch.randn(count, device=device), torch.empty(count, device=device)
            return lambda: target.copy_(source)

        return rotated("copy_" if count == numel else f"copy_ of {8e-6 * count:.0f} MB", 8 * count, make)

    def multiply(i: int) -> Callable[[], object]:
        weights, keep = torch.randn(numel, device=device), torch.rand(numel, device=device) < 0.5
        return lambda: weights.mul_(keep)

    for part in (1, 2, 4, 8, 16):
        yield copy(numel // part)
    yield rotated("torch: mul_ by a bool mask", 9 * numel, multiply)


def mask_runs(ops: Any, numel: int, device: torch.device) -> Iterator[Run]:
    for dtype in (torch.float32, torch.bfloat16):
        size, name = torch.empty(0, dtype=dtype).element_size(), str(dtype)[6:]
        moved = 2 * size * numel + numel / 8

        def new(i: int, dtype: torch.dtype = dtype) -> Callable[[], object]:
            weights = torch.randn(numel, device=device).to(dtype)
            packed = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, device=device)
            fills = [0.0, 1.0]  # each call changes every element that is not kept

            def call() -> None:
                fills.reverse()
                ops.mask_apply_(weights, packed, 0, fills[0])

            return call

        def again(i: int, dtype: torch.dtype = dtype) -> Callable[[], object]:
            weights = torch.randn(numel, device=device).to(dtype)
            packed = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, device=device)
            return lambda: ops.mask_apply_(weights, packed, 0, 0.0)

        yield rotated(f"mask_apply_ {name}, a new mask", moved, new)
        yield rotated(f"mask_apply_ {name}, applied before", size * numel + numel / 8, again)

    def shifted(i: int) -> Callable[[], object]:
        weights = torch.randn(numel + 8, device=device)
        packed = torch.randint(0, 256, (numel // 8 + 2,), dtype=torch.uint8, device=device)
        return lambda: ops.mask_apply_(weights[3 : 3 + numel], packed, 3, 0.0)

    yield rotated("mask_apply_, 3 elements and bits off, before", 4 * numel + numel / 8, shifted)

    def pack(i: int) -> Callable[[], object]:
        keep = torch.rand(numel, device=device) < 0.5
        return lambda: ops.mask_pack(keep)

    def unpack(i: int) -> Callable[[], object]:
        packed = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, device=device)
        return lambda: ops.mask_unpack(packed, numel)

    def choose(i: int) -> Callable[[], object]:
        scores = torch.randn(numel // 4096, 4096, device=device).abs_()
        return lambda: ops.mask_n_of_m(scores, 2, 4)

    yield rotated("mask_pack", numel * 9 / 8, pack)
    yield rotated("mask_unpack", numel * 9 / 8, unpack)
    yield rotated("mask_n_of_m 2:4", 4 * numel + numel / 8, choose)


def fake_quantize_runs(ops: Any, numel: int, device: torch.device) -> Iterator[Run]:
    cases: list[tuple[str, torch.dtype, int, dict[str, Any], bool, bool]] = [
        ("rows of 128", torch.float32, 128, SYMMETRIC, False, False),
        ("rows of 768", torch.float32, 768, SYMMETRIC, False, False),
        ("rows of 4096", torch.float32, 4096, SYMMETRIC, False, False),
        ("rows of 4096, asymmetric", torch.float32, 4096, ASYMMETRIC, False, False),
        ("rows of 4096, mask", torch.float32, 4096, SYMMETRIC, True, False),
        ("rows of 4096", torch.bfloat16, 4096, SYMMETRIC, False, False),
        ("rows of 16384", torch.bfloat16, 16384, SYMMETRIC, False, False),
        ("rows of 4096, ranges given", torch.float32, 4096, SYMMETRIC, False, True),
        ("one row", torch.float32, numel, SYMMETRIC, False, False),
        ("one row, range given, mask", torch.float32, numel, SYMMETRIC, True, True),
    ]
    for title, dtype, columns, grid, keep, given in cases:
        columns = min(columns, numel)
        size, rows = torch.empty(0, dtype=dtype).element_size(), numel // columns
        passes = 2 if given or columns <= 16384 else 3  # the range of a long row is known after it was read
        moved = passes * size * rows * columns + (rows * columns / 8 if keep else 0)

        def make(
            i: int,
            rows: int = rows,
            columns: int = columns,
            dtype: torch.dtype = dtype,
            grid: dict[str, Any] = grid,
            keep: bool = keep,
            given: bool = given,
        ) -> Callable[[], object]:
            x = torch.randn(rows, columns, device=device).to(dtype)
            scale = torch.full((rows,), 0.03, device=device) if given else None
            return lambda: ops.fake_quantize(x, scale, **grid, with_mask=keep)

        yield rotated(f"fake_quantize {str(dtype)[6:]}, {title}", moved, make)


def block_runs(ops: Any, payload_bytes: Any, numel: int, device: torch.device) -> Iterator[Run]:
    for bits, dtype in ((8, torch.float32), (4, torch.float32), (8, torch.bfloat16), (4, torch.bfloat16)):
        size, name = torch.empty(0, dtype=dtype).element_size(), f"int{bits} of {str(dtype)[6:]}"
        bytes_ = payload_bytes(numel, bits, BLOCK[bits])

        def tensors(
            bits: int = bits, dtype: torch.dtype = dtype, bytes_: int = bytes_
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(numel, device=device).to(dtype)
            payload = torch.zeros(1, bytes_, dtype=torch.uint8, device=device)
            ops.block_quantize(x, payload, None, numel, bits, BLOCK[bits])
            return x, payload

        def quantize(i: int, bits: int = bits, tensors: Any = tensors) -> Callable[[], object]:
            x, payload = tensors()
            return lambda: ops.block_quantize(x, payload, None, numel, bits, BLOCK[bits])

        def feedback(i: int, bits: int = bits, tensors: Any = tensors) -> Callable[[], object]:
            x, payload = tensors()
            residual = torch.zeros(numel, device=device)
            return lambda: ops.block_quantize(x, payload, residual, numel, bits, BLOCK[bits])

        def dequantize(i: int, bits: int = bits, tensors: Any = tensors) -> Callable[[], object]:
            out, payload = tensors()
            return lambda: ops.block_dequantize(payload, out, numel, bits, BLOCK[bits])

        yield rotated(f"block_quantize {name}", size * numel + bytes_, quantize)
        yield rotated(f"block_quantize {name}, feedback", (8 + size) * numel + bytes_, feedback)
        yield rotated(f"block_dequantize {name}", size * numel + bytes_, dequantize)
        if dtype is not torch.float32:
            continue

        def parts(bits: int = bits, bytes_: int = bytes_) -> torch.Tensor:
            payloads = torch.zeros(RANKS, bytes_, dtype=torch.uint8, device=device)
            ops.block_quantize(
                torch.randn(RANKS * numel, device=device), payloads, None, numel, bits, BLOCK[bits]
            )
            return payloads

        def reduce(i: int, bits: int = bits, parts: Any = parts) -> Callable[[], object]:
            payloads, out = parts(), torch.empty(numel, device=device)
            return lambda: ops.block_reduce(payloads, out, bits, BLOCK[bits], 0.5)

        def requantize(i: int, bits: int = bits, parts: Any = parts) -> Callable[[], object]:
            payloads = parts()
            payload = torch.empty_like(payloads[0])
            return lambda: ops.block_reduce_quantize(payloads, payload, None, numel, bits, BLOCK[bits], 0.5)

        yield rotated(f"block_reduce int{bits}, {RANKS} payloads", RANKS * bytes_ + 4 * numel, reduce)
        yield rotated(f"block_reduce_quantize int{bits}, {RANKS} payloads", (RANKS + 1) * bytes_, requantize)


def many_runs(ops: Any, device: torch.device) -> Iterator[Run]:
    """200 tensors as a small model has them: in one launch, and one each."""

    def tensors() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sizes = [768, 768 * 768, 768, 3072 * 768] * 50
        weights = [torch.randn(size // 8, device=device) for size in sizes]
        return weights, [
            torch.randint(0, 256, (-(-w.numel() // 8),), dtype=torch.uint8, device=device) for w in weights
        ]

    bytes_ = sum(w.numel() * 4 + p.numel() for w, p in zip(*tensors(), strict=True))

    def together(i: int) -> Callable[[], object]:
        weights, packed = tensors()
        return lambda: ops.mask_apply_many_(weights, packed, [0] * len(weights))

    def one_by_one(i: int) -> Callable[[], object]:
        weights, packed = tensors()

        def call() -> None:
            for w, p in zip(weights, packed, strict=True):
                ops.mask_apply_(w, p)

        return call

    yield rotated("200 small tensors, mask_apply_many_", bytes_, together)
    yield rotated("200 small tensors, mask_apply_ each", bytes_, one_by_one)


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
