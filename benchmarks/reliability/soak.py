"""R8: a long run that is killed again and again, started anew each time, beside one that is left alone."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.reliability import runs
from benchmarks.reliability.trial import Trial, Verdict

NAME = "R8"
WHAT = "2,000 steps, a save every 20, a kill about every 100"
PASS = "final accuracy within 0.3 points of the unbroken run, memory growth < 5 %, no orphan"

STEPS, EVERY, BETWEEN_KILLS = 2000, 20, 100
_MOST_GROWTH = 1.05
_LONGEST_STEP_S = 30


def trials(rng: random.Random) -> Sequence[Trial]:
    return [_soak(rng, STEPS)]


def tenth(rng: random.Random) -> Sequence[Trial]:
    """200 steps, for tests."""
    return [_soak(rng, STEPS // 10)]


def _soak(rng: random.Random, steps: int) -> Trial:
    moments = [rng.uniform(0.5, 1.5) * BETWEEN_KILLS for _ in range(2 * steps // BETWEEN_KILLS)]
    return Trial(f"{steps} steps, ramp, ZeRO 2", partial(_trial, steps, moments))


def _trial(steps: int, moments: Sequence[float], folder: Path) -> Verdict:
    run = runs.Run(
        "ramp",
        2,
        folder / "checkpoints",
        folder / "traces",
        runs.block("ramp", folder),
        steps,
        EVERY,
        resumes=True,
        asks_accuracy=True,
    )
    kills, started, memory = 0, 0, []
    for moment in [*moments, float("inf")]:
        with runs.Launch(run) as launch:
            end = started + moment
            runs.until(
                lambda launch=launch, end=end: (
                    max(launch.traces()[0].steps, default=0) >= end  # type: ignore[misc]
                    or launch.has_ended()
                ),
                _LONGEST_STEP_S * steps,
            )
            if not launch.has_ended():  # where one has, the other is about to
                for process in launch.processes:
                    process.kill()
            codes = launch.wait(60)
            trace = launch.traces()[0]
            memory += [size for _, size in sorted(trace.memory.items())][1:]
            log = launch.log()
        if any(os.path.exists(f"/proc/{process.pid}") for process in launch.processes):
            return Verdict(False, "left an orphan")
        if trace.final is not None:
            break
        if codes[0] is None or codes[0] > 0:
            return Verdict(False, "did not resume", log)
        kills, started = kills + 1, max(trace.steps, default=started)
    else:
        return Verdict(False, "did not end", log)
    whole = runs.unbroken("ramp", 2, steps, asks_accuracy=True)
    growth = max(memory) / memory[0] if memory else 1.0
    accuracy, expected = trace.accuracy or 0.0, whole[0].accuracy or 0.0
    told = f"{kills} kills, accuracy {accuracy:.2%} and {expected:.2%} unbroken, memory x {growth:.3f}"
    print(f"  {told}", flush=True)
    same = trace.final == whole[0].final
    good = abs(accuracy - expected) <= 0.003 and growth < _MOST_GROWTH
    return Verdict(good, f"{'bit-equal' if same else 'not bit-equal'} after {kills} kills", told)
