"""The part of R1 about single processes: SIGKILL while an export, or an encrypted copy of one, replaces another."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification

import ds_compress
from benchmarks.reliability import runs
from benchmarks.reliability.faults import after, before
from benchmarks.reliability.trial import Trial, Verdict
from ds_compress import files, secure

FORMATS = ("hf", "torch")
POINTS = ("anywhere", "in a file", "before the rename", "in the rename", "after the rename")
_COMPARED = "classifier.weight"


def writer_trials(rng: random.Random) -> Sequence[Trial]:
    """20 exports and 20 encryptions: both formats, each point twice."""
    found = []
    for what, format, point, _ in itertools.product(("export", "encrypt"), FORMATS, POINTS, range(2)):
        run = partial(_trial, what, format, point, rng.random())
        found.append(Trial(f"{what} {format}, kill, {point}", run))
    return found


def _trial(what: str, format: str, point: str, delay: float, folder: Path) -> Verdict:
    writer = _Writer(what, format, folder)
    writer.write(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(runs.PRELOADED)
    process = context.Process(target=_write_and_die, args=(writer, point))
    process.start()
    if point == "anywhere":
        deadline = time.monotonic() + 60
        while not (folder / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.5 * delay)
        process.kill()
    process.join(60)
    if process.exitcode != -signal.SIGKILL and point != "anywhere":
        process.kill()
        return Verdict(False, "the trial itself failed", f"exit code {process.exitcode}")
    # In the moment between two renames, where a kernel cannot exchange names, the next writer puts things right.
    files.restore_folder(writer.out)
    if writer.seed_of_out() not in (0, 1):
        return Verdict(False, "lost", f"{writer.out} holds neither the old model nor the new one")
    writer.write(1)
    if writer.seed_of_out() != 1:
        return Verdict(False, "silently different", "the model that was written last is not there")
    if rubbish := [path.name for path in folder.glob(".*")]:
        return Verdict(False, "left rubbish", ", ".join(rubbish))
    return Verdict(True, "old or new")


class _Writer:
    """Writes the model of a seed to `out`, whatever is there, and knows which one is there."""

    def __init__(self, what: str, format: str, folder: Path) -> None:
        self.what, self.format, self.folder = what, format, folder
        self.out = folder / "out"

    def write(self, seed: int) -> None:
        plain = self.out if self.what == "export" else self.folder / "plain"
        ds_compress.export(runs.tiny_bert(seed), plain, self.format, check=False, overwrite=True)
        if self.what == "encrypt":
            key, _, _, recipient = self._keys()
            secure.sign(plain, key)
            secure.encrypt(plain, self.out, [recipient], key, overwrite=True)

    def seed_of_out(self) -> int | None:
        """None where it cannot be read, or holds something else."""
        try:
            if self.what == "encrypt":
                _, public_key, identity, _ = self._keys()
                loaded = secure.load_verified(self.out, public_key, identity)
            elif self.format == "torch":
                loaded = ds_compress.from_pretrained(self.out)
            else:
                loaded = BertForSequenceClassification.from_pretrained(self.out)
        except Exception:
            return None
        found = loaded.get_parameter(_COMPARED)
        for seed in (0, 1):
            if torch.equal(found, runs.tiny_bert(seed).get_parameter(_COMPARED)):
                return seed
        return None

    def _keys(self) -> tuple[Path, Path, Path, Path]:
        """To sign, to verify, to decrypt, to encrypt."""
        if not (self.folder / "signing.key").exists():
            secure.generate(self.folder / "signing")
            secure.generate(self.folder / "reader", "encryption")
        ends = ("signing.key", "signing.pub", "reader.identity", "reader.recipient")
        key, public_key, identity, recipient = (self.folder / end for end in ends)
        return key, public_key, identity, recipient


def _write_and_die(writer: _Writer, point: str) -> None:
    """In a process of its own."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(self: Any) -> None:
        """The files are there, one of them cut."""
        largest = max(self.path.rglob("*"), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        die()

    # Of an encryption the last folder is meant, not the export that it reads.
    match point:
        case "in a file":
            before(
                files.UnfinishedFolder, "finish", lambda self: half(self) if self.out == writer.out else None
            )
        case "before the rename":
            before(files, "replace_folder", lambda new, out: die() if out == writer.out else None)
        case "in the rename":
            after(files, "_exchange", lambda new, out: die() if out == writer.out else None)
        case "after the rename":
            after(files, "replace_folder", lambda new, out: die() if out == writer.out else None)
    (writer.folder / "began").touch()
    writer.write(1)
