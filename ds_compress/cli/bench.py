"""`ds_compress bench`: how fast the kernels are on this machine, beside everything else that can be had there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

import ds_compress
from ds_compress.cli.output import AsJson, output


class KernelName(StrEnum):
    """The microbenchmarks that a wheel carries."""

    BLOCK_QUANTIZE = "block_quantize"
    FAKE_QUANTIZE = "fake_quantize"
    INT8_LINEAR = "int8_linear"
    MASK_APPLY = "mask_apply"


class _Place(NamedTuple):
    """Where the microbenchmarks are. package: by which they are run. above: the folder that holds the package."""

    package: str
    folder: Path
    above: Path


def bench(
    kernel: Annotated[
        KernelName | None, typer.Argument(help="what to measure; without one the list of them")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer shapes and rounds: under a minute")] = False,
    threads: Annotated[str, typer.Option(help="numbers of threads, e.g. 1,2")] = "1",
    rounds: Annotated[int | None, typer.Option(min=1, help="of turns, without --quick")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where it is there")] = None,
    as_json: AsJson = False,
) -> None:
    """Measures a kernel on this machine, in turns with its peers: other libraries, and the same in plain torch.

    What decides is CPU time, on a GPU the time between events. Close other programs: they take turns with it, too.
    """
    with output(as_json) as printed:
        place = _place()
        if kernel is None:
            measures = {name.value: _measures(place.folder / f"{name}.py") for name in KernelName}
            for name, what in measures.items():
                printed.say(f"{name:16} {what}")
            printed.done(benchmark=None, conditions={}, figures={}, measures=measures)
            return
        words = ["--threads", threads, *(["--quick"] if quick else []), *(["--json"] if as_json else [])]
        words += ["--rounds", str(rounds)] if rounds is not None else []
        words += ["--device", device] if device is not None else []
        line = _run(place, kernel, words, as_json)
        if line is not None:
            found = json.loads(line)
            name, figures = found.pop("benchmark"), found.pop("figures")
            printed.done(benchmark=name, conditions=found, figures=figures, measures={})


def _place() -> _Place:
    """Inside of an installed package, or beside it in a checkout.

    Raises:
        ValueError: neither is there.
    """
    package = Path(ds_compress.__file__).resolve().parent
    if (package / "benchmarks" / "record.py").is_file():
        return _Place("ds_compress.benchmarks", package / "benchmarks", package.parent)
    if (package.parent / "benchmarks" / "record.py").is_file():
        return _Place("benchmarks", package.parent / "benchmarks", package.parent)
    raise ValueError(
        "this install has no microbenchmarks: install a wheel of ds_compress, or a whole checkout"
    )


def _measures(file: Path) -> str:
    """The first line of its docstring, without an import: that would take seconds."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]


def _run(place: _Place, kernel: KernelName, words: list[str], wants_line: bool) -> str | None:
    """A process of its own, because the threads of torch are set once; its last line where that is wanted.

    Raises:
        ValueError: it failed; what it said is on standard error.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"{place.package}.{kernel}", *words],
        cwd=place.above,  # Python looks there first: a folder `benchmarks` of the user's is another one
        stdout=subprocess.PIPE if wants_line else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"the benchmark of {kernel} ended with exit status {done.returncode}")
    return done.stdout.splitlines()[-1] if wants_line else None
