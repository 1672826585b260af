"""What the tests read of the documentation: its pages, and the fenced code blocks in them.

A block is what it says behind the fence:

    ```json                     validated; a page of `docs/blocks` also trains its first one
    ```python                   executed, all blocks of a page in their order and in one namespace
    ```text                     straight after python: what that block prints
    ```bash                     each command exists and has these options
    ```python title="FILE"      the content of a file that the page is about
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
README_ZH = ROOT / "README.zh-CN.md"

_FENCE = re.compile(r"^( *)(```+)([^`\n]*)$")
_OPTION = re.compile(r'([\w-]+)="([^"]*)"')
_DIRECTIVE = re.compile(r"<!-- given: (.*?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` counts from 1 and is that of the opening fence; `end` that of the closing one."""

    page: Path
    line: int
    end: int
    language: str
    options: dict[str, str]
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Every page of the documentation, those at the root first."""
    root = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md")]
    found = [*root, *sorted(DOCS.rglob("*.md"))]
    return [page for page in found if page.is_file()]


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        opened = _FENCE.match(lines[at])
        if opened is None:
            at += 1
            continue
        indent, fence, info = opened.groups()
        end = at + 1
        while end < len(lines) and lines[end].strip() != fence:
            end += 1
        assert end < len(lines), f"{page}:{at + 1}: this fence is never closed"
        text = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end])
        language = info.split()[0] if info.strip() else ""
        yield Block(page, at + 1, end + 1, language, dict(_OPTION.findall(info)), text + "\n")
        at = end + 1


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in pages() for block in blocks_of(page) if block.language in languages]


def given(page: Path) -> list[str]:
    """Names that the page's python takes for granted: `<!-- given: model batches -->`."""
    found = _DIRECTIVE.search(page.read_text(encoding="utf-8"))
    return found[1].split() if found else []


def without_blocks(page: Path) -> str:
    """The prose of a page: its text without fenced blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks_of(page):
        lines[block.line - 1 : block.end] = [""] * (block.end - block.line + 1)
    return "\n".join(lines)
