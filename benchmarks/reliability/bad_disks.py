"""R6: full and read-only disks, what dead processes left, signals, and a process whose save fails."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reliability import runs
from benchmarks.reliability.faults import before
from benchmarks.reliability.trial import Trial, Verdict

NAME = "R6"
WHAT = "full and read-only disks, leftovers, signals, one process whose save fails"
PASS = "old data whole, the path named, no process hangs, rubbish gone at the next start"

AT_STEP = 6
_FILE_LIMIT = 60_000
_LONGEST_END_S = 60


def trials(rng: random.Random) -> Sequence[Trial]:
    """24 of them."""
    found = []
    for stage, who in itertools.product((2, 3), ("one", "all")):
        for what in ("full disk", "read-only disk"):
            run = partial(_failing_save, what, stage, who, False)
            found.append(Trial(f"{what} for {who}, ZeRO {stage}", run))
        for name in ("SIGTERM", "SIGINT"):
            run = partial(_signalled, getattr(signal, name), stage, who, rng.random())
            found.append(Trial(f"{name} to {who}, ZeRO {stage}", run))
    for stage in (2, 3):
        run = partial(_failing_save, "full disk", stage, "one", True)
        found.append(Trial(f"a save of one fails and the script goes on, ZeRO {stage}", run))
        found.append(Trial(f"stale temporary tag, ZeRO {stage}", partial(_stale_tag, stage)))
    for what in ("an export", "a teacher cache"):
        found.append(Trial(f"full disk for {what}", partial(_failing_writer, what)))
    found.append(Trial("stale build lock", partial(_stale_lock, False)))
    found.append(Trial("build lock of a killed process", partial(_stale_lock, True)))
    return found


# -- saves that fail ------------------------------------------------------------------------------------------------


def _failing_save(what: str, stage: int, who: str, goes_on: bool, folder: Path) -> Verdict:
    fill = partial(_fill if what == "full disk" else _make_read_only, who)
    run = _run(stage, folder, prepare=fill, goes_on=goes_on)
    codes, traces, log = runs.finished(run, _LONGEST_END_S)
    if None in codes:
        return Verdict(False, "a process hung", log)
    failed = [trace.failed for trace in traces]
    if not all(failed) or any(str(run.folder) not in words for words, *_ in failed):
        return Verdict(False, "not told", f"{failed} {log}")
    if goes_on:
        # The disk has room again after that save: the run ends as if nothing had been.
        difference = runs.differences(traces, runs.unbroken(run.name, stage))
        good = not any(codes) and not difference and runs.Run.steps in traces[0].saved
        return Verdict(good, "went on" if good else "did not go on", f"{codes} {difference} {log}")
    return runs.resumed(run, traces, runs.unbroken(run.name, stage))


def _run(stage: int, folder: Path, **more: Any) -> runs.Run:
    block = runs.block("ramp", folder)
    return runs.Run("ramp", stage, folder / "checkpoints", folder / "traces", block, **more)


def _fill(who: str, engine: Any, run: runs.Run, rank: int) -> None:
    """In the save at AT_STEP no file may become longer than a few pages (the kernel's answer is EFBIG)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _at_the_save(who, engine, rank, partial(_limit_files, _FILE_LIMIT), _limit_files)


def _limit_files(bytes_: int = resource.RLIM_INFINITY) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


def _make_read_only(who: str, engine: Any, run: runs.Run, rank: int) -> None:
    """In the save at AT_STEP nothing can be created; permissions would not keep root from it."""
    state = {"is_on": False}

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        if state["is_on"] and str(path).startswith(str(run.folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for target, name in ((Path, "mkdir"), (Path, "touch"), (engine.checkpoint_engine, "save")):
        before(target, name, refuse if name != "save" else lambda _, path, *__: refuse(path))
    _at_the_save(who, engine, rank, lambda: state.update(is_on=True), lambda: state.update(is_on=False))


def _at_the_save(
    who: str, engine: Any, rank: int, begin: Callable[[], object], end: Callable[[], object]
) -> None:
    """Between the ends of the steps AT_STEP and AT_STEP + 1, in one process or all."""
    if who == "one" and rank != runs.PROCESSES - 1:
        return

    def look(*_: Any, **__: Any) -> None:
        begin() if engine.global_steps == AT_STEP else end()

    before(engine, "forward", lambda *_, **__: end())
    before(engine, "save_checkpoint", look)


def _failing_writer(what: str, folder: Path) -> Verdict:
    """The folder that was there before is read again after a writer that finds no room."""
    import ds_compress
    from ds_compress.distill.cache_read import TeacherCache

    out = folder / "out"
    batches = [{k: v for k, v in runs.batch(0, 0).items() if k != "labels"}]

    def write(seed: int) -> None:
        if what == "an export":
            ds_compress.export(runs.tiny_bert(seed), out, "torch", check=False, overwrite=True)
        else:
            ds_compress.cache_teacher(runs.tiny_bert(seed), batches * 200, out, top_k=2, overwrite=True)

    write(0)
    listed = sorted((path.name, path.stat().st_size) for path in out.iterdir())
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _limit_files(256)
    try:
        write(1)
    except Exception as error:
        words = str(error)
    else:
        return Verdict(False, "not told")
    finally:
        _limit_files()
        signal.signal(signal.SIGXFSZ, old)
    if rubbish := [path.name for path in folder.glob(".*")]:
        return Verdict(False, "left rubbish", ", ".join(rubbish))
    if listed != sorted((path.name, path.stat().st_size) for path in out.iterdir()):
        return Verdict(False, "lost")
    ds_compress.from_pretrained(out) if what == "an export" else TeacherCache(out)
    write(1)
    return Verdict(True, "old data whole", words)


# -- signals and what is left ---------------------------------------------------------------------------------------


def _signalled(number: signal.Signals, stage: int, who: str, delay: float, folder: Path) -> Verdict:
    run = _run(stage, folder, pause_s=0.02)
    with runs.Launch(run) as launch:
        runs.until(lambda: AT_STEP in launch.traces()[0].saving or launch.has_ended())
        time.sleep(0.15 * delay)
        for process in launch.processes if who == "all" else launch.processes[-1:]:
            os.kill(process.pid or 0, number)
        codes = launch.wait(_LONGEST_END_S)
        before_it = launch.traces()
        if None in codes:
            return Verdict(False, "a process hung", launch.log(codes.index(None)))
    return runs.resumed(run, before_it, runs.unbroken(run.name, stage))


def _stale_tag(stage: int, folder: Path) -> Verdict:
    """Half a tag of a dead process, and an old tag in the middle of its replacement."""
    run = _run(stage, folder)
    for name in (".global_step3.unfinished-dead", ".global_step9.replaced"):
        (run.folder / name / "ds_compress").mkdir(parents=True)
        (run.folder / name / "half").write_text("")
    (run.folder / ".latest.unfinished-dead").write_text("glo")
    codes, traces, log = runs.finished(run)
    if any(codes):
        return Verdict(False, "did not run", log)
    return runs.resumed(run, traces, runs.unbroken(run.name, stage))


_BUILD = """
import sys, time
from pathlib import Path
from ds_compress.ops import build
with build._turn(Path(sys.argv[1]), lambda line: None):
    print("has its turn", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _stale_lock(is_held_by_a_killed_one: bool, folder: Path) -> Verdict:
    """The next build has its turn at once."""
    lock = folder / "library.lock"
    lock.write_text("")
    if is_held_by_a_killed_one:
        with subprocess.Popen(
            [sys.executable, "-c", _BUILD, str(lock), "600"], stdout=subprocess.PIPE, text=True
        ) as first:
            assert first.stdout is not None
            next(line for line in first.stdout if "has its turn" in line)
            with open(lock) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return Verdict(False, "the trial itself failed", "the first process holds no lock")
                except BlockingIOError:
                    pass
            first.kill()
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(lock), "0"], capture_output=True, text=True, timeout=_LONGEST_END_S
    )
    return Verdict("has its turn" in done.stdout, "built", done.stderr[-300:])
