"""Tables that fit their terminal, with names that stay whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ds_compress.export.report import ExportReport
from ds_compress.sheet import Sheet, folded, uncut

NAME = "model.decoder.layers.{0-23}.self_attention_block.query_key_value_projection.dense"


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def printed(renderable: object) -> list[str]:
    paper = io.StringIO()
    uncut(paper).print(renderable)
    return [line.rstrip() for line in paper.getvalue().splitlines()]


def sheet() -> Sheet:
    made = Sheet(("module", "shape", "bytes"), ("bytes",))
    made.add(NAME, "1024 x 4096", "4,194,304")
    made.add("head", "-", "12")
    return made


def test_columns_where_they_fit() -> None:
    paper = io.StringIO()
    Console(file=paper, width=140).print(sheet())
    heading, rule, first, second = [line.rstrip() for line in paper.getvalue().splitlines()]
    assert heading.split() == ["module", "shape", "bytes"] and set(rule) == {"─"}
    assert first.split("  ")[0] == NAME and first.endswith("4,194,304") and second.endswith("       12")


def test_names_with_values_below_where_they_do_not() -> None:
    assert printed(sheet()) == [NAME, "    shape 1024 x 4096; bytes 4,194,304", "head", "    bytes 12"]


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_only_a_name_is_longer_than_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = printed(sheet())
    assert all(len(line) <= width or line == NAME for line in lines)
    assert any(NAME in line for line in lines)


def test_a_narrow_console_of_rich_loses_nothing() -> None:
    paper = io.StringIO()
    Console(file=paper, width=40).print(sheet())
    assert NAME in paper.getvalue().replace("\n", "")


def test_folding_keeps_words() -> None:
    assert folded("a word-that-is-long and more", 10) == ["a", "  word-that-is-long", "  and more"]


def test_an_export_report_at_80_columns() -> None:
    report = ExportReport("out", "torch", "BertForSequenceClassification")
    report.modules[NAME] = {"parameters": 3, "sparsity": 0.5, "bytes": 12, "scheme": {"weight": {"bits": 8}}}
    report.notes = [
        "a note that is so long that it does not fit into one line of a terminal of eighty columns"
    ]
    lines = printed(report)
    assert NAME in lines and "    stored as int8; parameters 3; zeros 50.0%; bytes 12" in lines
    assert all(len(line) <= 80 or line == NAME for line in lines)
