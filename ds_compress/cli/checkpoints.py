"""Commands for checkpoints of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_compress.cli.output import AsJson, output


def universal(
    checkpoint: Annotated[Path, typer.Argument(help="folder of engine.save_checkpoint, or of one tag in it")],
    out: Annotated[Path, typer.Argument(help="folder to load with load_universal; may be the same")],
    workers: Annotated[int, typer.Option(min=1, help="processes that convert at a time")] = 1,
    trust_pickle: Annotated[
        bool,
        typer.Option("--trust-pickle", help="read pickles that hold more than data: they can run any code"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Converts a checkpoint of ZeRO 1 to 3 for another number of processes, or another stage."""
    with output(as_json) as printed:
        from ds_compress.engine.checkpoint.universal import to_universal

        made = to_universal(checkpoint, out, workers=workers, trust_pickle=trust_pickle)
        printed.say(f'{made}: load {made.parent} with "checkpoint": {{"load_universal": true}}')
        printed.done(folder=str(made), load_from=str(made.parent))
