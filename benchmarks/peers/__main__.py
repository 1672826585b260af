"""Measures the peers in turns; see the package.

    python -m benchmarks.peers [--job training] [--only encoder_ours encoder_nncf] [--rounds 15] [--record]

Reported per run: CPU and wall milliseconds (medians), and, with quartiles, how it compares with the fastest run without
quantization in the same rounds. A service is so many times as fast as the best of any kind, for torch's fp32 alone
would flatter everybody; a step of training is so many times as long as the fastest in fp32. The fastest come first,
ours or not.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from benchmarks.timing import Timing, in_turns

from . import environments
from .figures import Figures, figures_of, print_result
from .jobs import JOBS, Job
from .process import Peer, PeerError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    modules = [module for job in JOBS.values() for module in job.peers]
    parser.add_argument("--job", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--only", nargs="*", choices=modules, default=modules)
    parser.add_argument("--rounds", type=int, default=15)
    record.add_output_arguments(parser)
    args = parser.parse_args()
    figures: Figures = {}
    versions: dict[str, str] = {}
    for job in (JOBS[name] for name in args.job):
        chosen = {module: job.peers[module] for module in args.only if module in job.peers}
        if chosen:
            found, used = measured(job, chosen, args.rounds)
            if found:
                print_result(job, found)
            figures, versions = figures | found, versions | used
    if not figures:
        sys.exit("no peer ran")
    print(", ".join(f"{package} {v}" for package, v in sorted(versions.items())))
    record.report("peers", figures, args, versions=versions)


def measured(job: Job, chosen: dict[str, str], rounds: int) -> tuple[Figures, dict[str, str]]:
    """(figures, {package: version}) of the chosen peers of a job."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        job.prepare(Path(folder))
        peers = started(chosen, Path(folder), stack)
        if not peers:
            return {}, {}
        facts = {run: values for peer in peers for run, values in peer.facts.items()}
        figures = figures_of(job, timings(peers, rounds), facts)
    return figures, {package: v for peer in peers for package, v in peer.versions.items()}


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


def timings(peers: list[Peer], rounds: int) -> dict[str, Timing]:
    by_run = {run: peer for peer in peers for run in peer.runs}
    taken = in_turns(by_run, lambda run: by_run[run].run(run), rounds, warm_up=3)
    return {
        run: Timing([cpu for cpu, _ in times], [wall for _, wall in times]) for run, times in taken.items()
    }


if __name__ == "__main__":
    main()
