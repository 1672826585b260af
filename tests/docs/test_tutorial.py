"""The tutorial, command by command: its files are those of the page, and it ends with a smaller model that works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_compress.examples.launch import free_port
from tests.docs import execution
from tests.docs.pages import DOCS, ROOT, Block, blocks_of

PAGE = DOCS / "tutorial.md"
FOLDER = DOCS / "tutorial"


def test_the_page_shows_the_files() -> None:
    shown = {b.options["title"]: b.text for b in blocks_of(PAGE) if "title" in b.options}
    files = {path.name: path.read_text() for path in FOLDER.iterdir() if path.suffix in (".py", ".json")}
    assert shown == files


def commands_and_outputs() -> list[tuple[Block, Block | None]]:
    found = list(blocks_of(PAGE))
    return [
        (block, after if after is not None and after.language == "text" else None)
        for block, after in zip(found, [*found[1:], None], strict=True)
        if block.language == "bash"
    ]


def run(line: str, folder: Path) -> str:
    """A command of the page in `folder`; the launcher is told to leave out what takes minutes to compile."""
    words = shlex.split(line)
    bin_folder = Path(sys.executable).parent
    if words[0] == "deepspeed":
        at = words.index("train.py")
        words[at:at] = ["--master_port", str(free_port()), "--module", "tests.docs.without_builds"]
    words[0] = sys.executable if words[0] == "python" else str(bin_folder / words[0])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    folder = tmp_path / "tutorial"
    shutil.copytree(FOLDER, folder)
    printed = []
    for block, output in commands_and_outputs():
        lines = [line for line in block.text.splitlines() if not line.startswith("cd ")]
        text = "".join(run(line, folder) for line in lines)
        if output is not None:
            printed.append((output, execution.without_launcher(text)))
    if execution.updating():
        execution.update(printed)
        return
    for output, text in printed:
        # Losses of a hundred steps differ between CPUs: the words are compared here, the numbers below.
        assert not execution.difference(output.text, text, numbers=False)
    teacher, student = (float(n) for n in re.findall(r"held-out accuracy: ([\d.]+)", printed_text(printed)))
    assert teacher > 0.8 and student > 0.8
    right = dict(re.findall(r"(\w+): (\d+) of 100 right", printed_text(printed)))
    assert int(right["small"]) == pytest.approx(100 * student, abs=3)
    (smaller,) = re.findall(r"([\d.]+)x smaller", printed_text(printed))
    assert float(smaller) > 4


def printed_text(printed: list[tuple[Block, str]]) -> str:
    return "".join(text for _, text in printed)
