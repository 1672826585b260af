"""R1: SIGKILL at a random moment or aimed into a save; what is resumed must be the unbroken run, bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reliability import runs
from benchmarks.reliability.faults import after, before
from benchmarks.reliability.killed_writers import writer_trials
from benchmarks.reliability.trial import Trial, Verdict

NAME = "R1"
WHAT = "SIGKILL of one or all processes, random and aimed into the save"
PASS = "nothing lost, the resumed run bit-equal to the unbroken one"

BLOCKS, STAGES, TAGS, WHO = ("ramp", "QAT", "KD"), (2, 3), ("same tag", "new tags"), ("one", "all")
RANDOM = ("anywhere", "in a save")
# By name: whether any process gets there, or only the one that writes for all.
AIMED = {
    "before our fragments": True,
    "before a file of DeepSpeed": True,
    "in a file of DeepSpeed": True,
    "before the manifest": False,
    "before the rename": False,
    "in the rename": False,
    "after the rename": False,
    "before latest": False,
    "in latest": False,
}
AT_STEP = 6
_LONGEST_END_S = 60


def trials(rng: random.Random) -> Sequence[Trial]:
    """120 trainings, then 40 exports and encryptions."""
    found = []
    aimed = itertools.cycle(rng.sample(sorted(AIMED), len(AIMED)))
    for name, stage, tag, who in itertools.product(BLOCKS, STAGES, TAGS, WHO):
        for where in (*RANDOM, *(next(aimed) for _ in range(3))):
            victim = rng.randrange(runs.PROCESSES) if AIMED.get(where, True) else 0
            delay = rng.random()
            found.append(
                Trial(
                    f"{name}, ZeRO {stage}, {tag}, kill {who}, {where}",
                    partial(_trial, name, stage, tag, who, where, victim, delay),
                )
            )
    return [*found, *writer_trials(rng)]


def _trial(
    name: str, stage: int, tag: str, who: str, where: str, victim: int, delay: float, folder: Path
) -> Verdict:
    run = runs.Run(
        name,
        stage,
        folder / "checkpoints",
        folder / "traces",
        runs.block(name, folder),
        tag="same" if tag == "same tag" else None,
        prepare=partial(_aim, where, victim, who) if where in AIMED else None,
        pause_s=0.02,
    )
    with runs.Launch(run) as launch:
        if where in AIMED:
            runs.until(lambda: (run.traces / "die").exists() or launch.has_ended(), 60)
        else:
            _wait_for_moment(launch, where, delay)
        victims = launch.processes if who == "all" else [launch.processes[victim]]
        for process in victims:
            process.kill()
        codes = launch.wait(_LONGEST_END_S)
        before = launch.traces()
        if None in codes:
            return Verdict(False, "a process hung", launch.log(codes.index(None)))
        if where in AIMED and -signal.SIGKILL not in codes:
            return Verdict(False, "the trial itself failed", f"nobody got to the point: {launch.log()}")
    return runs.resumed(run, before, runs.unbroken(name, stage))


def _wait_for_moment(launch: runs.Launch, where: str, delay: float) -> None:
    """ "anywhere": up to the length of a run after its start; "in a save": up to the length of one after one began."""
    if where == "anywhere":
        runs.until(lambda: launch.traces()[0].start is not None or launch.has_ended(), 60)
        time.sleep(1.5 * delay)
    else:
        runs.until(lambda: AT_STEP in launch.traces()[0].saving or launch.has_ended(), 60)
        time.sleep(0.15 * delay)


# -- in the process that is to die ----------------------------------------------------------------------------------


def _aim(where: str, victim: int, who: str, engine: Any, run: runs.Run, rank: int) -> None:
    """Dies at the point `where` of the save at AT_STEP."""
    if rank != victim:
        return
    from ds_compress import files
    from ds_compress.engine.checkpoint import state, transaction

    def die(*_: Any, **__: Any) -> None:
        if engine.global_steps != AT_STEP:
            return
        (run.traces / "die").touch()
        if who == "one":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_LONGEST_END_S)

    def half(state_dict: Any, path: str, *_: Any, **__: Any) -> None:
        if engine.global_steps == AT_STEP:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def when_latest(_: Any, target: Any) -> None:
        if Path(target).name == "latest":
            die()

    writer = engine.checkpoint_engine
    match where:
        case "before our fragments":
            before(state, "_write_fragments", die)
        case "before a file of DeepSpeed":
            before(writer, "save", die)
        case "in a file of DeepSpeed":
            after(writer, "save", half)
        case "before the manifest":
            before(transaction.Manifest, "write", die)
        case "before the rename":
            before(files, "replace_folder", die)
        case "in the rename":
            # Behind the exchange of names, or where there is none to exchange with behind the one rename.
            before(files, "sync", lambda path, *_: die() if path == run.folder else None)
        case "after the rename":
            after(files, "replace_folder", die)
        case "before latest":
            before(transaction, "atomic_write", die)
        case "in latest":
            before(files.os, "replace", when_latest)
