"""The fused int8 linear layer beside every int8, fp32 and bf16 linear layer that can be had here.

    python -m benchmarks.int8_linear [--quick] [--json] [--threads 1,2] [--rounds 9]

Layers of BERT base, MiniLM and a Llama of 1B parameters; M rows from 1 (decoding) to 512; fp32 in and out. Counted for
ours: the scale of every row, quantizing it, the product, dequantizing, bias and activation. Weights are normal random
numbers, packed once. Columns: GOPS (10^9 multiplications and additions a second, 2 M N K to a call), the percentage
of the ceiling that was measured in the same run (for M = 1 the reading of N K bytes, else multiplications), what a
roofline of the two predicts, the error against fp32, and how many times longer a peer takes than ours (above 1: ours
is faster). With GELU, a peer is followed by torch's own. The summary compares with the fastest 8-bit peer of a shape.

A peer that is over ten times slower than ours at a small product is not measured at large ones, and one that fails is
listed with its reason. On a CUDA device the same runs are timed between events.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from ds_compress.ops.library import native

from . import record
from .bandwidth import keep_freed_memory
from .linear_peers import FP32, AbsentError, is_8_bit, peers, quantized_of
from .peaks import Peaks, read_bandwidth
from .timing import in_turns, seconds

LAYERS = {
    "BERT base": [(768, 768), (3072, 768), (768, 3072)],
    "MiniLM": [(384, 384), (1536, 384), (384, 1536)],
    "Llama 1B": [(2048, 2048), (8192, 2048), (2048, 8192)],
}
ROWS = (1, 16, 64, 256, 512)
QUICK_LAYERS = {"BERT base": [(768, 768), (3072, 768)], "MiniLM": [(384, 384)], "Llama 1B": [(2048, 2048)]}
QUICK_ROWS = (1, 16, 64, 256)
GROUP = 64
OURS, OURS_GELU, OURS_INT4 = "int8_linear", "int8_linear, GELU", f"int4_linear, groups of {GROUP}"
SMALL, LARGE = 5e7, 5e8  # operations of a call
HOPELESS = 10.0

Calls = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


class Bench:
    """What is kept from shape to shape on one number of threads."""

    def __init__(self, device: torch.device, threads: int, rounds: int, quick: bool) -> None:
        self.device, self.threads, self.rounds = device, threads, rounds
        self.makers = peers(device, quick)
        self.reasons: dict[str, str] = {}
        self.slowness: dict[str, float] = {}
        self.peaks = Peaks.measure(threads) if device.type == "cpu" else None
        self.against_best: dict[str, list[float]] = {"no activation": [], "GELU": [], FP32: []}

    def run(self, m: int, n: int, k: int) -> dict[str, dict[str, float]]:
        torch.manual_seed(m + n + k)
        x = torch.randn(m, k, device=self.device)
        weight, bias = torch.randn(n, k, device=self.device), torch.randn(n, device=self.device)
        calls, errors = self.our_calls(x, weight, bias)
        self.add_peers(calls, errors, x, weight, bias)
        times = measure(calls, self.rounds, self.device, self.threads)
        self.note_slow_peers(times, 2 * m * n * k)
        self.compare(times, m)
        return {name: self.figures(name, taken, times, errors, m, n, k) for name, taken in times.items()}

    def our_calls(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[Calls, dict[str, float]]:
        ops, (n, k) = native(), weight.shape
        quantized, scale = quantized_of(weight)
        packed = ops.int8_linear_pack(quantized)
        groups = weight.view(n, k // GROUP, GROUP)
        scale4 = groups.abs().amax(2) / 7
        packed4 = ops.int4_linear_pack(
            (groups / scale4.unsqueeze(2)).round().to(torch.int8).view(n, k), scale4
        )
        calls: Calls = {
            OURS: lambda: ops.int8_linear(x, packed, scale, bias),
            OURS_GELU: lambda: ops.int8_linear(x, packed, scale, bias, activation="gelu_erf"),
            OURS_INT4: lambda: ops.int4_linear(x, packed4, n, GROUP, bias),
        }
        exact = functional.linear(x, weight, bias)
        return calls, {name: _error(call(), exact) for name, call in calls.items() if name != OURS_GELU}

    def add_peers(
        self,
        calls: Calls,
        errors: dict[str, float],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> None:
        large = 2 * x.shape[0] * weight.numel() > LARGE
        exact = functional.linear(x, weight, bias)
        for name, make in self.makers.items():
            if name in self.reasons or (large and self.slowness.get(name, 0.0) > HOPELESS):
                continue
            try:
                call = make(weight, bias, x.shape[0])
                errors[name] = _error(call(x), exact)
            except AbsentError as absent:
                self.reasons[name] = str(absent)
                continue
            except Exception as error:  # whatever a peer fails with is a result
                self.reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                continue
            calls[name] = lambda call=call: call(x)  # type: ignore[misc]
            if is_8_bit(name):
                calls[f"{name}, GELU"] = lambda call=call: functional.gelu(call(x))  # type: ignore[misc]

    def note_slow_peers(self, times: Times, operations: int) -> None:
        if operations < SMALL or operations > LARGE:
            return
        for name in self.makers:
            if name in times:
                self.slowness[name] = statistics.median(times[name]) / statistics.median(times[OURS])

    def compare(self, times: Times, m: int) -> None:
        """Ours against the fastest of each round, medians over the rounds."""
        plain = [taken for name, taken in times.items() if name in self.makers and is_8_bit(name)]
        gelu = [times[f"{name}, GELU"] for name in self.makers if f"{name}, GELU" in times]
        for title, ours, theirs in (("no activation", OURS, plain), ("GELU", OURS_GELU, gelu)):
            if theirs:
                best = min(theirs, key=statistics.median)
                self.against_best[title].append(_median_ratio(best, times[ours]))
        if FP32 in times and m >= 64:
            self.against_best[FP32].append(_median_ratio(times[FP32], times[OURS]))

    def figures(
        self, name: str, taken: list[float], times: Times, errors: dict[str, float], m: int, n: int, k: int
    ) -> dict[str, float]:
        operations = 2.0 * m * n * k
        gops = operations / statistics.median(taken) / 1e9
        result = {"us": 1e6 * statistics.median(taken), "GOPS": gops}
        if name in errors:
            result["relative error"] = errors[name]
        if name in (OURS, OURS_GELU, OURS_INT4) and self.peaks is not None:
            int4 = name == OURS_INT4
            peak = self.peaks.int4 if int4 else self.peaks.int8
            size = n * k // 2 if int4 else n * k
            reading = operations / size * read_bandwidth(size, self.threads)
            result["roofline GOPS"] = min(peak, reading) / 1e9
            result["percent of ceiling"] = 100 * gops * 1e9 / (reading if m == 1 else peak)
        if name not in (OURS, OURS_GELU):
            ours = OURS_GELU if name.endswith(", GELU") else OURS
            result[f"times slower than {ours}"] = _median_ratio(taken, times[ours])
        return result


def measure(calls: Calls, rounds: int, device: torch.device, threads: int) -> Times:
    """Seconds per call. Each run of a round lasts about 2 ms."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(200, int(2e-3 / max(seconds(call, device, threads), 1e-6))))
    return in_turns(
        calls, lambda name: seconds(calls[name], device, threads, repeats[name]), rounds, warm_up=0
    )


def _median_ratio(values: list[float], base: list[float]) -> float:
    return statistics.median(v / b for v, b in zip(values, base, strict=True))


def _error(result: object, exact: torch.Tensor) -> float:
    assert isinstance(result, torch.Tensor)
    if result.dtype is torch.int32:  # a product only
        return math.nan
    return ((result.float() - exact).norm() / exact.norm()).item()


def table(result: Mapping[str, Mapping[str, float]], title: str) -> Table:
    made = Table(title=title)
    made.add_column("")
    for column in ("us", "GOPS", "roofline", "% of ceiling", "error", "times slower"):
        made.add_column(column, justify="right")
    formats = {"us": ".1f", "GOPS": ".1f", "roofline GOPS": ".0f", "percent of ceiling": ".0f"}
    formats["relative error"] = ".1e"
    for name, figures in result.items():
        slower = next((value for figure, value in figures.items() if figure.startswith("times")), None)
        cells = [f"{figures[f]:{spec}}" if f in figures else "" for f, spec in formats.items()]
        made.add_row(name, *cells, "" if slower is None else f"{slower:.2f}")
    return made


def summary(bench: Bench) -> dict[str, dict[str, float]]:
    """{what it is compared with: geometric mean and least of the ratios over shapes}."""
    return {
        f"ours against {'the best 8-bit peer, ' if title != FP32 else ''}{title}": {
            "geometric mean": math.exp(statistics.fmean(map(math.log, ratios))),
            "least": min(ratios),
            "shapes": len(ratios),
        }
        for title, ratios in bench.against_best.items()
        if ratios
    }


def essentials(everything: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """For the committed file: of ours without what follows from the rest, and of the peers of a shape how many times
    slower than ours the fastest 8-bit one is, without and with GELU, and oneDNN's fp32."""
    recorded: dict[str, dict[str, float]] = {}
    fastest: dict[tuple[str, str], tuple[float, str]] = {}
    for variant, figures in everything.items():
        title, _, name = variant.rpartition(": ")
        slower = {figure: value for figure, value in figures.items() if figure.startswith("times slower")}
        if name == OURS_INT4 or not slower:
            recorded[variant] = {f: v for f, v in figures.items() if f not in ("us", "roofline GOPS")}
        elif name == FP32:
            recorded[variant] = slower
        elif is_8_bit(name.removesuffix(", GELU")):
            key, value = (title, next(iter(slower))), next(iter(slower.values()))
            fastest[key] = min(fastest.get(key, (math.inf, "")), (value, variant))
    for (_, figure), (value, variant) in fastest.items():
        recorded.setdefault(variant, {})[figure] = value
    return recorded


def _listed(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds: under 50 seconds")
    record.add_output_arguments(parser)
    parser.add_argument("--threads", default="1", help="for example 1,2")
    parser.add_argument("--rounds", type=int, default=9, help="without --quick")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    keep_freed_memory()  # in all of them the result is allocated
    console, device = Console(width=120), torch.device(args.device)
    everything: dict[str, dict[str, float]] = {}
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        where = f"{threads} thread{'s' if threads > 1 else ''}"
        bench = Bench(device, threads, 3 if args.quick else args.rounds, args.quick)
        if bench.peaks is not None:
            ceilings = {f"{name} GOPS": getattr(bench.peaks, name) / 1e9 for name in ("fp32", "int8", "int4")}
            everything[f"{where}: ceilings"] = ceilings
            console.print(f"{where}, {record.instruction_set()}, measured ceilings: {_listed(ceilings)}")
        for model, layers in (QUICK_LAYERS if args.quick else LAYERS).items():
            for n, k in layers:
                for m in QUICK_ROWS if args.quick else ROWS:
                    title = f"{model}, M {m}, N {n}, K {k}, {where}"
                    result = bench.run(m, n, k)
                    console.print(table(result, title))
                    everything |= {f"{title}: {name}": figures for name, figures in result.items()}
        for name, reason in bench.reasons.items():
            console.print(f"not measured: {name}: {reason}")
        for name, times in bench.slowness.items():
            if times > HOPELESS:
                console.print(f"not measured beyond {LARGE:.0e} operations: {name}: {times:.0f} times slower")
        for title, figures in summary(bench).items():
            console.print(f"{title}, {where}: {_listed(figures)}")
            everything[f"{title}, {where}"] = figures
    record.report("int8_linear", everything, args, essentials(everything))


if __name__ == "__main__":
    main()
