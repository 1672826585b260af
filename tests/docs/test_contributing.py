"""A technique, a loss, an op and an export format are added by exactly the lines of docs/contributing.md."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_compress.config.schema import compression_training
from ds_compress.distill.losses import LOSSES
from ds_compress.export.write import FORMATS
from ds_compress.techniques import unregister_technique
from tests.docs import execution
from tests.docs.pages import DOCS, blocks_of
from tests.single import init_single_process

PAGE = DOCS / "contributing.md"
LONGEST = 75
"""Lines of the longest example: a technique and its config class."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Ops stay: torch keeps what was defined."""
    yield
    unregister_technique("weight_clipping")
    LOSSES.pop("similarity", None)
    compression_training.unregister_loss_config("similarity")
    FORMATS.pop("numpy", None)
    execution.forget_hugging_face()


def test_each_example_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init_single_process()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    printed = execution.run_page(PAGE)
    gc.collect()
    if execution.updating():
        execution.update(printed)
    assert len(printed) == 4
    differences = [found for block, text in printed if (found := execution.difference(block.text, text))]
    assert execution.updating() or not differences, differences


def test_examples_are_short() -> None:
    lengths = [
        len([line for line in block.text.splitlines() if line.strip()])
        for block in blocks_of(PAGE)
        if block.language == "python"
    ]
    assert max(lengths) <= LONGEST and sorted(lengths)[-2] <= 45, lengths
