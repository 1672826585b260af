"""`ds_compress report`: a page about one run, or several beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ds_compress.cli.output import AsJson, output


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="folders: a checkpoint, an export, or a folder that has both")
    ],
    out: Annotated[
        Path, typer.Option(help="page to write; its data go beside it, with the suffix .json")
    ] = Path("report.html"),
    accuracy: Annotated[
        list[str] | None,
        typer.Option(help="RUN=NUMBER, what you have measured of a run; may be given for each"),
    ] = None,
    latency_ms: Annotated[
        list[str] | None, typer.Option(help="RUN=NUMBER, milliseconds that you have measured")
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="what `ds_compress sensitivity` wrote of the model, to show beside it")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT and its data")] = False,
    as_json: AsJson = False,
) -> None:
    """Writes a page about what a training and its export reached: schedules, losses, layers, runs compared.

    One file for any browser, without scripts or anything to load, and the same as JSON. What nobody measured is absent.
    """
    with output(as_json) as printed:
        from ds_compress.files import atomic_write
        from ds_compress.report import html
        from ds_compress.report import report as make
        from ds_compress.sensitivity.table import Sensitivity

        data_file = out.with_suffix(".json")
        if data_file == out:
            raise ValueError(
                f"--out {out}: the page needs another suffix, such as .html; .json is that of its data"
            )
        for path in (out, data_file):
            if path.exists() and not overwrite:
                raise ValueError(f"{path} exists: give another file by --out, or say --overwrite")
        made = make(runs, accuracy or (), latency_ms or ())
        measured = None if sensitivity is None else Sensitivity.read(sensitivity)
        page = html(made, measured)
        table = None if measured is None else measured.as_data()
        data = {"runs": made, "sensitivity": table}
        atomic_write(data_file, json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n")
        atomic_write(out, page)
        printed.say(f"{out}: {len(made)} run{'s' if len(made) > 1 else ''}; data in {data_file}")
        for run in made:
            for note in run["notes"]:
                printed.say(f"note: {run['name']}: {note}")
        printed.done(html=str(out), json=str(data_file), **data)
