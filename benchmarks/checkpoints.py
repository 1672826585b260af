"""What a save that is whole or not there costs, and a load that verifies, beside DeepSpeed's own.

    python -m benchmarks.checkpoints [--rounds 5] [--folder FOLDER] [--json] [--record]

A BERT-base with random weights (109 M parameters) on ZeRO-2 with AdamW and pruning by magnitude, one process. The same
engine saves with DeepSpeed's own method and with ours, in turns, each time to a tag that is not there. Wall time: most
of it is waiting. DeepSpeed leaves its files to the page cache, where a loss of power loses them; "not synced" is our
save when it does the same, which is the like-for-like ratio, and "synced" waits for the disk. Loads read what was just
written, so from the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)
from ds_compress import files
from ds_compress.engine.checkpoint import transaction

from . import record, timing
from .engines import BERT_BASE, bert, deepspeed_config, random_batch, sparse_block, start_single_process

OWN, SYNCED, NOT_SYNCED = "DeepSpeed alone", "ds_compress, synced", "ds_compress, not synced"
LOAD_OWN, LOAD = "load, DeepSpeed alone", "load, verified"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder by default")
    record.add_output_arguments(parser)
    args = parser.parse_args()
    start_single_process()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measured(Path(folder), args.rounds)
    _print(figures)
    record.report("checkpoints", figures, args)


def measured(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """{variant: seconds, and ratio to DeepSpeed's own of the same round}."""
    engine = _engine()
    plain = type(engine)
    runs: dict[str, Callable[[], object]] = {
        OWN: lambda: plain.save_checkpoint(engine, str(folder), tag="measured"),
        SYNCED: lambda: engine.save_checkpoint(str(folder), tag="measured"),
        NOT_SYNCED: lambda: _not_synced(engine, folder, "measured"),
        LOAD_OWN: lambda: plain.load_checkpoint(engine, str(folder), tag="kept"),
        LOAD: lambda: engine.load_checkpoint(str(folder), tag="kept"),
    }
    engine.save_checkpoint(str(folder), tag="kept")

    def wall_s(name: str) -> float:
        _, wall = timing.measured(runs[name])
        shutil.rmtree(folder / "measured", ignore_errors=True)
        os.sync()  # what one leaves in the page cache is not written while another is measured
        return wall

    taken = timing.in_turns(runs, wall_s, rounds)
    bases = {name: LOAD_OWN if name.startswith("load") else OWN for name in runs}
    return {
        name: {"wall_s": statistics.median(times), "ratio": timing.ratio(times, taken[bases[name]]).median}
        for name, times in taken.items()
    }


def _engine() -> Any:
    import deepspeed

    model = bert(BERT_BASE)
    config = deepspeed_config(2, 1, sparse_block("l1", stride=100, dense_ratio=0.5, end=2))
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    for _ in range(3):
        engine.backward(engine(**random_batch(1, 16)).loss)
        engine.step()
    return engine


def _not_synced(engine: Any, folder: Path, tag: str) -> None:
    with mock.patch.object(files, "sync", _nothing), mock.patch.object(transaction, "sync", _nothing):
        engine.save_checkpoint(str(folder), tag=tag)


def _nothing(path: Path) -> None:
    """In place of `files.sync`."""


def _print(figures: dict[str, dict[str, float]]) -> None:
    table = Table("109 M parameters, ZeRO-2", "seconds", "of DeepSpeed's own")
    for name, numbers in figures.items():
        table.add_row(name, f"{numbers['wall_s']:.2f}", f"{numbers['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
