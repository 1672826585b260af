from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import figures, record

PAGE = "# Page\n\n<!-- figures:shrink -->\nold\n<!-- end figures -->\n\nbehind\n"


@pytest.mark.parametrize("name", figures.TABLES)
def test_every_table_can_be_made_and_says_how_it_was_measured(name: str) -> None:
    head, rule, first, *rest = figures.TABLES[name]()
    assert head.count("|") == rule.count("|") == first.count("|")
    assert "<small>" in rest[-1] and "commit " in rest[-1]


def test_a_page_gets_the_table_between_its_markers_and_nothing_else() -> None:
    text = figures.filled(PAGE)
    assert text.startswith("# Page\n\n<!-- figures:shrink -->\n|") and text.endswith(
        "<!-- end figures -->\n\nbehind\n"
    )
    assert "old" not in text and "| ZeRO-1 | 0.44 |" in text
    assert figures.filled(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAGE.replace("shrink", "speed"), "no table 'speed': there are compression_curve"),
        (PAGE.replace("<!-- end figures -->", ""), "no <!-- end figures -->"),
    ],
)
def test_a_wrong_marker_is_an_error(text: str, message: str) -> None:
    with pytest.raises(figures.FigureError, match=message):
        figures.filled(text)


def test_the_newest_figure_counts_and_one_that_is_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.write("thing", "--steps 9", {"a": {"x": 1.0}}, tmp_path)
    record.write("thing", "", {"a": {"x": 2.0}}, tmp_path)
    results = figures.Results("thing")
    assert results.value("a", "x") == 2.0
    assert results.sources()[0].startswith("`python -m benchmarks.thing`; ")
    with pytest.raises(figures.FigureError, match=r"thing\.csv has no 'y' of 'a'"):
        results.value("a", "y")


class TestCommand:
    def test_check_fails_where_a_page_is_behind_and_changes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page = tmp_path / "page.md"
        page.write_text(PAGE)
        with pytest.raises(SystemExit, match=r"python -m benchmarks\.figures"):
            figures.main(["--check", str(page)])
        assert page.read_text() == PAGE and "-old" in capsys.readouterr().out
        figures.main([str(page)])
        figures.main(["--check", str(page)])

    def test_the_pages_of_the_repository_are_up_to_date(self) -> None:
        figures.main(["--check"])
