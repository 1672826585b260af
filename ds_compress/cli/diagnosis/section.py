"""One section of the page: facts, and what of them will fail or hang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ds_compress.cli.diagnosis.paste import paste_safe

_COLUMN = 22


@dataclass(frozen=True)
class Finding:
    """what: will fail, or hang. remedy: a command, or what to change."""

    what: str
    remedy: str


@dataclass
class Section:
    """facts: {name: (words, the same as data for JSON)}."""

    name: str
    facts: dict[str, tuple[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, name: str, words: str, data: Any = None) -> None:
        """One more fact; data: what JSON has in place of the words."""
        self.facts[paste_safe(name)] = (paste_safe(words), words if data is None else data)

    def find(self, what: str, remedy: str) -> None:
        self.findings.append(Finding(paste_safe(what), paste_safe(remedy)))

    def lines(self) -> Iterator[str]:
        yield self.name.replace("_", " ")
        for name, (words, _) in self.facts.items():
            yield f"  {name:<{_COLUMN}}{' ' if len(name) >= _COLUMN else ''}{words}"

    def data(self) -> dict[str, Any]:
        return {name: _safe(data) for name, (_, data) in self.facts.items()}


def _safe(data: Any) -> Any:
    if isinstance(data, str):
        return paste_safe(data)
    if isinstance(data, dict):
        return {key: _safe(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_safe(value) for value in data]
    return data
