"""Runs the python of a page, and compares what it prints with the page.

    DS_COMPRESS_UPDATE_DOCS=1 python -m pytest tests/docs      # writes what was printed into the pages

A page's blocks run in their order, in one namespace, in a folder of their own. The folder holds the files that the page
shows (`title="..."`) and, under the names that the pages use, tiny models in place of real ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.docs.pages import Block, blocks_of, given
from tests.models import tiny_bert
from tests.multirank.common import batches

UPDATE = "DS_COMPRESS_UPDATE_DOCS"
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_OF_OTHERS = re.compile(
    r"^\[\d{4}-|^\[rank\d|^\s*$|Warning|warnings\.warn|^DeepSpeed |return func\(|train_runtime"
)
"""Lines that others add: times, ports and process ids of DeepSpeed, warnings of torch, times of the Trainer."""
_BAR = re.compile(r"[^\r\n]*(?:\d+%\||\d+it )[^\r\n\]]*\]")
"""A progress bar; what follows it on its line is another line."""
_CLOSE = 0.2
_ANOTHER_SCRIPT = "<!-- another script -->"
"""Before a block that belongs to another script than those above it."""

GIVEN: dict[str, Callable[[], Any]] = {
    "model": lambda: tiny_bert(layers=6),
    "teacher": lambda: tiny_bert(seed=1, layers=6),
    "batches": lambda: list(batches(6)),
    "dataset": lambda: [
        {name: values[row] for name, values in batch.items()} for batch in batches(4) for row in range(4)
    ],
}
"""What a page may take for granted by `<!-- given: NAME -->`: tiny stand-ins for a model and data of the reader."""


def python_and_output(page: Path) -> Iterator[tuple[Block, Block | None]]:
    """Each python block of a page and, if the next block is text that follows it directly, what it should print."""
    found = list(blocks_of(page))
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language == "python":
            yield block, after if after is not None and _directly(block, after) else None


def _directly(block: Block, after: Block) -> bool:
    between = block.page.read_text(encoding="utf-8").splitlines()[block.end : after.line - 1]
    return after.language == "text" and not any(line.strip() for line in between)


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows."""
    for block in blocks_of(page):
        if "title" in block.options:
            path = folder / block.options["title"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)


def run_page(page: Path) -> list[tuple[Block, str]]:
    """Executes the page's python in the current folder; what each block with an output on the page printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    namespace |= {name: GIVEN[name]() for name in given(page)}
    printed = []
    for block, output in python_and_output(page):
        before = "\n".join(page.read_text(encoding="utf-8").splitlines()[: block.line - 1])
        if _ANOTHER_SCRIPT in before.split("```")[-1]:
            forget_hugging_face()
        paper = io.StringIO()
        code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(paper), contextlib.redirect_stderr(paper), _log_lines(paper):
            exec(code, namespace)
        if output is not None:
            printed.append((output, without_launcher(paper.getvalue())))
    return printed


@contextlib.contextmanager
def _log_lines(paper: io.StringIO) -> Iterator[None]:
    """The lines of our logger, which pytest's own handlers would keep from standard error."""
    handler = logging.StreamHandler(paper)
    ours = logging.getLogger("ds_compress").handlers
    handler.setFormatter(next((own.formatter for own in ours if own.formatter), None))
    logging.getLogger("ds_compress").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("ds_compress").removeHandler(handler)


def forget_hugging_face() -> None:
    """What accelerate and transformers keep for a whole process: which DeepSpeed config it has."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()


def without_launcher(text: str) -> str:
    lines = _BAR.sub("\n", text).splitlines()
    lines = [line.rstrip() for line in lines if not _OF_OTHERS.search(line)]
    return "\n".join(lines) + "\n"


def difference(expected: str, got: str, numbers: bool = True) -> str:
    """Where two outputs differ; empty when they do not. Numbers may be 20 % apart, or anything without `numbers`."""
    ours, theirs = (without_launcher(text) for text in (expected, got))
    if _NUMBER.sub("#", ours) != _NUMBER.sub("#", theirs):
        return f"on the page:\n{ours}\nprinted:\n{theirs}"
    if not numbers:
        return ""
    for one, other in zip(_NUMBER.findall(ours), _NUMBER.findall(theirs), strict=True):
        here, there = (float(text.replace(",", "")) for text in (one, other))
        if abs(here - there) > _CLOSE * max(abs(here), abs(there)):
            return f"{one} on the page, {other} printed, in:\n{theirs}"
    return ""


def update(printed: list[tuple[Block, str]]) -> None:
    """Writes outputs into their page, the last one first: line numbers before it stay true."""
    for block, text in reversed(printed):
        lines = block.page.read_text(encoding="utf-8").splitlines(keepends=True)
        lines[block.line : block.end - 1] = [text]
        block.page.write_text("".join(lines), encoding="utf-8")


def updating() -> bool:
    return bool(os.environ.get(UPDATE))
