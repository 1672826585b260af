"""Measures the peers in turns; see the package.

    python -m benchmarks.peers [--only encoder_ours encoder_nncf] [--rounds 15] [--record]

Reported per run: CPU and wall milliseconds (medians), and how many times as fast it is as the fastest run without
quantization in the same rounds (median and quartiles), for torch's fp32 alone would flatter everybody. The fastest come
first, ours or not.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.timing import Timing, in_turns, ratio

from . import encoder, environments
from .process import Peer, PeerError

Figures = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(encoder.PEERS), default=list(encoder.PEERS))
    parser.add_argument("--rounds", type=int, default=15)
    record.add_output_arguments(parser)
    args = parser.parse_args()
    chosen = {module: encoder.PEERS[module] for module in args.only}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        encoder.prepare(Path(folder))
        peers = started(chosen, Path(folder), stack)
        timings = measured(peers, args.rounds)
        figures: Figures = {}
        for shape in encoder.SHAPES:
            figures |= figures_of(shape, timings, {run: peer for peer in peers for run in peer.runs})
    versions = {package: v for peer in peers for package, v in peer.versions.items()}
    print_result(figures)
    print(", ".join(f"{package} {v}" for package, v in sorted(versions.items())))
    record.report("peers", figures, args, versions=versions)


def started(chosen: dict[str, str], folder: Path, stack: contextlib.ExitStack) -> list[Peer]:
    """Those that could be prepared, one after the other; the others are named."""
    peers = []
    for module, environment in chosen.items():
        try:
            peer = stack.enter_context(Peer(module, environment, [str(folder)]))
            peer.ready()
        except (environments.UnavailableError, PeerError) as error:
            print(f"left out: {module}: {error}", file=sys.stderr)
        else:
            peers.append(peer)
    return peers


def measured(peers: list[Peer], rounds: int) -> dict[str, Timing]:
    by_run = {run: peer for peer in peers for run in peer.runs}
    taken = in_turns(by_run, lambda run: by_run[run].run(run), rounds, warm_up=3)
    return {
        run: Timing([cpu for cpu, _ in times], [wall for _, wall in times]) for run, times in taken.items()
    }


def figures_of(shape: str, timings: dict[str, Timing], peers: dict[str, Peer]) -> Figures:
    """Of all runs of one shape, the fastest first."""
    runs = sorted((r for r in timings if r.endswith(f", {shape}")), key=lambda r: timings[r].median_cpu)
    bases = [run for run in runs if run.removesuffix(f", {shape}") in encoder.UNQUANTIZED]
    figures: Figures = {}
    for run in runs:
        figures[run] = {"CPU ms": 1e3 * timings[run].median_cpu, "wall ms": 1e3 * timings[run].median_wall}
        if bases:
            faster = ratio(timings[bases[0]].cpu, timings[run].cpu)
            figures[run] |= {
                "times as fast as the best unquantized": faster.median,
                "times as fast, lower quartile": faster.low,
                "times as fast, upper quartile": faster.high,
            }
        figures[run] |= peers[run].facts.get(run.removesuffix(f", {shape}"), {})
    return figures


def print_result(figures: Figures) -> None:
    table = Table()
    for column in ("", "CPU ms", "wall ms", "of the best unquantized", "quartiles", "MB"):
        table.add_column(column, justify="right" if column else "left")
    for run, values in figures.items():
        faster = [values.get(f"times as fast{which}") for which in (" as the best unquantized", ", lower quartile",
                                                                    ", upper quartile")]  # fmt: skip
        middle, low, high = ("" if value is None else f"{value:.2f}" for value in faster)
        size = f"{values['bytes'] / 1e6:.1f}" if "bytes" in values else ""
        table.add_row(
            run, f"{values['CPU ms']:.2f}", f"{values['wall ms']:.2f}", middle, f"{low} - {high}", size
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
