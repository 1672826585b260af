"""`estimate.compute` as a person reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from ds_compress.config.report.table import size_in_words
from ds_compress.estimate.compute import NOT_COUNTED, Compute
from ds_compress.sheet import Sheet, folded, width_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def _operations(count: float) -> str:
    for size, prefix in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {prefix}FLOP"
    return f"{count:.3g} FLOP"


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


@dataclass(frozen=True)
class ComputeTable:
    """Prints itself by rich."""

    compute: Compute

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found, width = self.compute, width_of(options)
        yield Text(
            f"\ncomputed by each process, with {found.tokens:,} tokens in a micro-step, in texts of {found.sequence:,}",
            "bold",
        )
        yield self._step()
        if found.seconds:
            plain, compressed = found.seconds["plain"], found.seconds["compressed"]
            text = (
                f"a step on {found.device} takes {_time(plain)} at least, with compression {_time(compressed)}: "
                f"{compressed / plain:.3f} times as long"
            )
            yield from (Text(line) for line in folded(text, width))
        if found.latencies:
            yield Text(f"\none forward on {found.device}, at least", "bold")
            yield self._latencies()
        for note in (*found.notes, NOT_COUNTED):
            yield from (Text(line, overflow="fold") for line in folded(note, width))

    def _step(self) -> Sheet:
        found, sheet = self.compute, Sheet(("in a step", "amount"), ("amount",))
        sheet.add("forward and backward", _operations(found.student))
        if found.teacher is None:
            sheet.add("forward of the teacher", "not known: say --teacher FOLDER")
        elif found.teacher:
            sheet.add("forward of the teacher", _operations(found.teacher))
        for block, nbytes in found.moved.items():
            sheet.add(f"read and written by {block}", size_in_words(nbytes))
        if found.saved:
            sheet.add("kept for backward by fake quantization, more than without", size_in_words(found.saved))
        return sheet

    def _latencies(self) -> Sheet:
        numbers = ("in 16 bits", "compressed", "ratio")
        sheet = Sheet(("tokens", *numbers, "bound by"), numbers)
        for one in self.compute.latencies:
            ratio = f"{one.before / one.after:.2f}x" if one.after else "-"
            bound = "reading weights" if one.is_memory_bound else "products"
            sheet.add(f"{one.tokens:,}", _time(one.before), _time(one.after), ratio, bound)
        return sheet
