"""Lines and points in the coordinates of a picture; the page draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 400, 220
"""Units of the SVG, in which letters are 12 high: readable at the width of a phone."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 34
_LARGEST = 1.7e308
_LABEL = 26
"""Letters beside a dot, which fit into half of the picture."""
PLANNED = "planned_"
MOST = 48
"""Charts of one run."""


@dataclass(frozen=True)
class Line:
    """segments: values of SVG's `points`, one more where numbers are missing. dots: points without a neighbour."""

    label: str
    segments: tuple[str, ...]
    dots: tuple[tuple[float, float], ...] = ()
    is_planned: bool = False


@dataclass(frozen=True)
class Dot:
    """A run among others."""

    x: float
    y: float
    label: str
    anchor: str


@dataclass
class Chart:
    """x_ticks, y_ticks: (coordinate, label). left_out: numbers that are NaN or infinite."""

    title: str
    x_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    left_out: int = 0

    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM
    width, height = WIDTH, HEIGHT


def charts_of(history: Mapping[str, Any] | None) -> tuple[list[Chart], list[str]]:
    """Of every number over steps, with what was planned of it; and the names beyond the first `MOST`."""
    if history is None or not history["steps"]:
        return [], []
    numbers = history["numbers"]
    plans = {name: _plan_of(name) for name in numbers}
    drawn = [name for name in numbers if name not in plans.values()]
    drawn.sort(key=lambda name: (not name.startswith("training/"), name))
    shown = drawn[:MOST]
    steps = history["steps"]
    return [_over_steps(name, steps, numbers[name], numbers.get(plans[name])) for name in shown], drawn[MOST:]


def scatter(title: str, x_name: str, points: Sequence[tuple[float, float, str]]) -> Chart | None:
    """Runs as labelled dots; None for fewer than two."""
    if len(points) < 2:
        return None
    x = _Axis.of(_wider([p[0] for p in points]), _LEFT, WIDTH - _RIGHT)
    y = _y_axis(_wider([p[1] for p in points]))
    chart = Chart(title, x_name, x.ticks(), y.ticks())
    for px, py, label in points:
        at = x.at(px)
        chart.dots.append(Dot(at, y.at(py), _short(label), "end" if at > WIDTH / 2 else "start"))
    return chart


def number(value: Any) -> str:
    """As a person reads it: four digits, thousands of bytes and parameters with commas."""
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 and value == round(value) else f"{value:.4g}"
    return str(value)


def _plan_of(name: str) -> str:
    block, _, own = name.rpartition("/")
    return f"{block}/{PLANNED}{own}"


def _over_steps(
    name: str, steps: Sequence[int], reached: Sequence[Any], planned: Sequence[Any] | None
) -> Chart:
    values = [*map(_finite, reached), *map(_finite, planned or ())]
    x = _Axis.of([float(steps[0]), float(steps[-1])], _LEFT, WIDTH - _RIGHT)
    y = _y_axis([value for value in values if value is not None] or [0.0])
    lost = sum(value is not None and _finite(value) is None for value in reached)
    chart = Chart(name, "applied steps", x.ticks(whole=True), y.ticks(), left_out=lost)
    for label, column in (("planned", planned), ("reached", reached)):
        if column is not None:
            named = label if planned is not None else name
            chart.lines.append(_line(named, label == "planned", steps, column, x, y))
    return chart


def _line(
    label: str, is_planned: bool, steps: Sequence[int], column: Sequence[Any], x: _Axis, y: _Axis
) -> Line:
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, map(_finite, column), strict=True):
        if value is not None:
            pieces[-1].append((x.at(step), y.at(value)))
        elif pieces[-1]:
            pieces.append([])
    segments = tuple(" ".join(f"{px:g},{py:g}" for px, py in piece) for piece in pieces if len(piece) > 1)
    return Line(label, segments, tuple(piece[0] for piece in pieces if len(piece) == 1), is_planned)


def _short(label: str) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 3]}..."


def _wider(values: Sequence[float]) -> list[float]:
    """With room at both ends, so that no dot lies on the frame."""
    low, high = min(values), max(values)
    margin = (high / 2 - low / 2) / 5
    return [max(low - margin, -_LARGEST), min(high + margin, _LARGEST)]


def _finite(value: Any) -> float | None:
    found = None if value is None else float(value)
    return found if found is not None and math.isfinite(found) else None


def _y_axis(values: Sequence[float]) -> _Axis:
    return _Axis.of(values, HEIGHT - _BOTTOM, _TOP)


@dataclass(frozen=True)
class _Axis:
    """[low, high] of the numbers between `begin` and `end` of the picture; ticks at multiples of `step`."""

    low: float
    high: float
    step: float
    begin: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        # Halves first: the width of two extremes may be beyond any float.
        half = high / 2 - low / 2
        if half <= abs(high) * 1e-9:
            half = abs(high) / 4 or 0.5
            low, high = low - half, high + half
        step = 10.0 ** math.floor(math.log10(half / 2) if half / 2 > 0 else -300)
        step *= next(m for m in (1, 2, 5, 10) if half / (step * m) <= 2.5)
        return cls(low, high, step, begin, end)

    def at(self, value: float) -> float:
        share = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self, whole: bool = False) -> list[tuple[float, str]]:
        first = math.ceil(self.low / self.step - 1e-9)
        values = [(first + k) * self.step for k in range(7)]
        inside = [value for value in values if value <= self.high + 1e-9 * self.step]
        if whole:
            inside = [value for value in inside if value == round(value)]
        return [(self.at(value), f"{value:,.0f}" if whole else f"{value:.4g}") for value in inside]
