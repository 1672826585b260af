"""The one error of a bad config: every problem at once, each with its JSON path and what to change."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ROOT = "compression_training"
_LONGEST_VALUE_SHOWN = 80
_SHORTEST_ABBREVIATION = 3
_SECRETS = ("PRIVATE KEY", "AGE-SECRET-KEY")


@dataclass(frozen=True)
class Problem:
    """One thing to change in the JSON.

    path: where it is, e.g. `compression_training.sparse_pruning.different_groups.enc.params.dense_ratio`.
    got: what stands there, as JSON, shortened.
    allowed: what may stand there, in words.
    hint: what to change; empty when `allowed` says it all.
    """

    path: str
    got: str
    allowed: str
    hint: str = ""

    def __str__(self) -> str:
        lines = [self.path, f"  got:     {self.got}", f"  allowed: {self.allowed}"]
        if self.hint:
            lines.append(f"  hint:    {self.hint}")
        # A lone surrogate, which JSON can spell, would keep the error from being printed.
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


class ConfigError(ValueError):
    """The config cannot be used; `problems` lists everything that is wrong with it, `str()` prints it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self._message())

    def _message(self) -> str:
        count = len(self.problems)
        heading = "1 problem" if count == 1 else f"{count} problems"
        return "\n\n".join([f"{heading} in the {ROOT} config:", *map(str, self.problems)])

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


def shown(value: Any) -> str:
    """`value` as short JSON; never raises, whatever the value is. Of a private key it shows nothing."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        try:
            text = reprlib.repr(value)
        except Exception:
            text = f"a {type(value).__name__}"
    if any(word in text.upper() for word in _SECRETS):
        return "(a private key, hidden)"
    if len(text) <= _LONGEST_VALUE_SHOWN:
        return text
    return text[: _LONGEST_VALUE_SHOWN - 4] + " ..."


def listed(names: Iterable[str], last: str = "or") -> str:
    """`"a", "b" or "c"`."""
    quoted = [f'"{name}"' for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that `word` was most likely meant to be; case, dashes and spaces do not count."""

    def plain(name: str) -> str:
        return name.strip().casefold().replace("-", "_").replace(" ", "_")

    if len(word) > _LONGEST_VALUE_SHOWN:
        return None
    wanted, by_plain = plain(word), {plain(name): name for name in candidates}
    close = difflib.get_close_matches(wanted, by_plain, n=1, cutoff=cutoff)
    if not close and len(wanted) >= _SHORTEST_ABBREVIATION:
        longer = [name for name in by_plain if name.startswith(wanted)]
        close = longer if len(longer) == 1 else []
    return by_plain[close[0]] if close else None


def dotted(*steps: str | int) -> str:
    """A JSON path below the block: list positions in brackets, keys behind dots."""
    path = ROOT
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path


class ExportError(RuntimeError):
    """The model cannot be exported as asked, or the exported folder does not compute what the model does.

    The message names the module and says what else to do. Nothing was left in the output folder.
    """


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged or of another model, or it could not be saved.

    The message names the file, and the newest checkpoint beside it that is whole. Raised in every process.
    """
