"""A table for terminals of any width: in columns where it fits, else names with values below; names stay whole."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

NOTHING = "-"
UNCUT = 10_000
"""Width of a console that cuts no line: rich crops what is longer than its console. Tables fit the terminal then."""
_INDENT = "    "


@dataclass
class Sheet:
    """Rows of cells under headings; the first cell of a row is its name. Prints itself by rich.

    headings: of all columns. numbers: those whose cells are set to the right. A cell "-" is left out when narrow.
    """

    headings: Sequence[str]
    numbers: Collection[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """One more row, with a cell for each heading."""
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table, width = self._table(), width_of(options)
        if Measurement.get(console, options.update(max_width=UNCUT), table).maximum <= width:
            yield table
        else:
            yield from (Text(line, overflow="fold") for line in self._lines(width))

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for heading in self.headings:
            table.add_column(heading, justify="right" if heading in self.numbers else "left", no_wrap=True)
        for cells in self.rows:
            table.add_row(*map(Text, cells))
        return table

    def _lines(self, width: int) -> Iterable[str]:
        for name, *cells in self.rows:
            yield name
            facts = [
                f"{heading} {cell}"
                for heading, cell in zip(self.headings[1:], cells, strict=True)
                if cell != NOTHING
            ]
            yield from folded("; ".join(facts), width, _INDENT)


def width_of(options: ConsoleOptions) -> int:
    """Columns to fill."""
    return options.max_width if options.max_width < UNCUT else shutil.get_terminal_size().columns


def uncut(file: IO[str] | None = None) -> Console:
    """A console without colours for pipes and strings: names stay whole, whatever the width of tables."""
    return Console(file=file, width=UNCUT, color_system=None, force_terminal=False)


def folded(text: str, width: int, indent: str = "") -> list[str]:
    """`text` in lines of at most `width`, but for a word that is longer than that."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
