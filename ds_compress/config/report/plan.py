"""A config resolved against a model, as its reader gets it: printed, it says what will happen and what it will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.report.table import plain_text, renderables
from ds_compress.sheet import width_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Plan(ResolvedPlan):
    """`str()` gives a plain table that fits the terminal (80 columns in a pipe), `rich.print` a coloured one."""

    def __str__(self) -> str:
        return plain_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from renderables(self, width_of(options))
