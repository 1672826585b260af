"""What was measured, as a file: by how much each group of layers raises the loss in each format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ds_compress.errors import shown
from ds_compress.files import atomic_write
from ds_compress.sensitivity.formats import format_named
from ds_compress.sensitivity.increase import Metric
from ds_compress.sheet import NOTHING, Sheet

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

VERSION = 1


@dataclass(frozen=True)
class GroupSensitivity:
    """One group of layers that share a format.

    increase: by name of a format, the growth of the metric when this group alone is in it; None: not finite. Formats
    that do not fit its shapes are absent.
    """

    modules: tuple[str, ...]
    parameters: int
    increase: Mapping[str, float | None]


@dataclass(frozen=True)
class Sensitivity:
    """A whole table. model_class: for whose names it holds. predictions: over which the metric is the mean; of a
    relative error the examples. seconds: of measuring, as the clock has it."""

    model_class: str
    metric: Metric
    formats: tuple[str, ...]
    groups: Mapping[str, GroupSensitivity]
    examples: int
    predictions: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """Plain data, as it is stored; the keys that `cli.results` describes for `ds_compress sensitivity`."""
        return {
            "version": VERSION,
            "model_class": self.model_class,
            "metric": self.metric.value,
            "unit": self.metric.unit,
            "formats": list(self.formats),
            "examples": self.examples,
            "predictions": self.predictions,
            "groups": {
                name: {
                    "modules": list(group.modules),
                    "parameters": group.parameters,
                    "increase": dict(group.increase),
                }
                for name, group in self.groups.items()
            },
            "facts": dict(self.facts),
        }

    def write(self, path: Path) -> None:
        """Complete or not at all."""
        atomic_write(path, json.dumps(self.as_data(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Sensitivity:
        """Raises ValueError for a file that is no such table, or of a version that is not known here."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        if not isinstance(content, dict) or "groups" not in content or "version" not in content:
            raise ValueError(f"{path} is no table of `ds_compress sensitivity`")
        if content["version"] != VERSION:
            raise ValueError(f"{path} has version {shown(content['version'])}, and {VERSION} is known here")
        try:
            return _read(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged table: {type(error).__name__}: {error}") from None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(
            f"{self.metric.value} ({self.metric.unit}) that is added by one group in a format, over "
            f"{self.examples:,} examples",
            "bold",
        )
        sheet = Sheet(("layers", "weights", *self.formats), ("weights", *self.formats))
        for name, group in self.groups.items():
            cells = [_cell(group.increase, format) for format in self.formats]
            sheet.add(name, f"{group.parameters:,}", *cells)
        yield sheet


def _cell(increase: Mapping[str, float | None], format: str) -> str:
    if format not in increase:
        return NOTHING
    value = increase[format]
    return "not finite" if value is None else f"{value:.3g}"


def _read(content: Mapping[str, Any]) -> Sensitivity:
    formats = tuple(format_named(name).name for name in content["formats"])
    groups = {}
    for name, group in content["groups"].items():
        increase = {format: _number(value) for format, value in group["increase"].items()}
        if unknown := set(increase) - set(formats):
            raise ValueError(f"{name} has formats that the table does not list: {sorted(unknown)}")
        modules = tuple(str(module) for module in _list(group["modules"]))
        groups[str(name)] = GroupSensitivity(modules, int(group["parameters"]), increase)
    if not groups:
        raise ValueError("no groups")
    return Sensitivity(
        str(content["model_class"]),
        Metric(content["metric"]),
        formats,
        groups,
        int(content["examples"]),
        int(content["predictions"]),
        dict(content["facts"]),
    )


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{shown(value)} where a list should be")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{shown(value)} where a number should be")
    return float(value)
