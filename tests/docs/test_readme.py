"""README is a front page, shows the quickstart as it is, and the Chinese one says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import execution
from tests.docs.pages import DOCS, README, README_ZH, ROOT, blocks_of, pages, without_blocks

LONGEST = 150
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_LANGUAGES = {"README.md", "README.zh-CN.md"}


def code(page: Path) -> list[tuple[str, str]]:
    return [(block.language, block.text) for block in blocks_of(page)]


def links(page: Path) -> list[str]:
    return _LINK.findall(without_blocks(page))


def headings(page: Path) -> list[int]:
    return [len(found) for found in re.findall(r"^(#+) ", without_blocks(page), re.MULTILINE)]


def rows(page: Path) -> list[int]:
    """Columns of every line of a table."""
    return [line.count("|") for line in without_blocks(page).splitlines() if line.startswith("|")]


def figures(page: Path) -> list[str]:
    """Every number in the text, links left out."""
    return sorted(_NUMBER.findall(_LINK.sub("]", without_blocks(page))))


@pytest.mark.parametrize("page", [README, README_ZH])
def test_it_is_a_front_page(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= LONGEST


def test_its_quickstart_is_the_one_that_runs() -> None:
    """`test_python` runs the page; what README shows of it is the same, its output included."""
    if execution.updating():
        output = next(block for block in blocks_of(DOCS / "quickstart.md") if block.language == "text")
        for page in (README, README_ZH):
            execution.update([(b, output.text) for b in blocks_of(page) if b.language == "text"])
    shown = [text for language, text in code(README) if language in ("python", "json", "text")]
    run = [
        block.text
        for block in blocks_of(DOCS / "quickstart.md")
        if block.language in ("python", "json", "text")
    ]
    assert len(shown) == 3
    assert set(shown) <= set(run)


def test_the_script_is_short() -> None:
    (script,) = [text for language, text in code(README) if language == "python"]
    assert len([line for line in script.splitlines() if line]) <= 15


def test_both_languages_keep_step() -> None:
    assert code(README) == code(README_ZH)
    assert headings(README) == headings(README_ZH)
    assert rows(README) == rows(README_ZH)
    assert figures(README) == figures(README_ZH)
    ours, theirs = ([link for link in links(page) if link not in _LANGUAGES] for page in (README, README_ZH))
    assert ours == theirs


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings; `mkdocs build --strict` looks at those of the site, but not at README's."""
    for link in links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {link}"
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", without_blocks(path), re.MULTILINE)
            assert anchor in {slug(title) for title in titles}, f"{page.name} links to {link}"


def slug(title: str) -> str:
    """The anchor of a heading, as code hosts and mkdocs make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())
