"""What the figures of `gpu_check` are held against.

A figure belongs to a goal by its name, in whatever variant of the part it stands; `variants` narrows that down where a
part also measures others for comparison. Rates are told as percentages of what `gpu_ceilings` or the part itself
measured on the same device, ratios as times faster than the other: larger is better, except where `at_most` is given.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """One bound on every figure of one name. `figure` and `variants` are regular expressions, matched anywhere."""

    part: str
    figure: str
    bound: float
    text: str
    variants: str = ""
    at_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def shown(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


OURS = r"^(?!.*(torch|copy_|peer|small))"
GOALS = (
    Goal("build", r"^ops without a kernel$", 0, "ops without a CUDA kernel", at_most=True),
    Goal(
        "products", r"^ratio to _int_mm$", 0.9, "int8 product, of torch._int_mm's speed before its epilogue"
    ),
    Goal(
        "products",
        r"^ratio to separate",
        1.0,
        "int8 layer, of _int_mm + quantize, dequantize, bias, activation",
    ),
    Goal("products", r"^ratio to _scaled_mm$", 0.9, "fp8 product, of torch._scaled_mm's speed"),
    Goal("products", r"^ratio to bf16$", 1.0, "int4 layer at M <= 64, of bf16's speed", r"int4"),
    Goal("products", r"^percent of bandwidth$", 85, "decode (M = 1), % of a copy's bandwidth"),
    Goal("elementwise", r"^percent of (a )?copy", 90, "elementwise, 25 M elements, % of a copy", OURS),
    Goal("elementwise", r"^wrong$", 0, "elementwise results that differ from the reference", at_most=True),
    Goal("tests", r"^failed$", 0, "tests on the device that fail", at_most=True),
    Goal("steps", r"^failed$", 0, "engines that fail", at_most=True),
    Goal(
        "memory",
        r"^peak, ratio to whole",
        0.5,
        "peak memory of distillation, of that with whole logits",
        at_most=True,
    ),
)


def judge(parts: Mapping[str, Any], goals: tuple[Goal, ...] = GOALS) -> list[dict[str, Any]]:
    """One entry a goal: text, bound, how many figures reach it, the worst, the median, and those that fall short.

    `parts`: {part: {"figures": {variant: {figure: value}}}}, as in the JSON of a check.
    """
    entries = []
    for goal in goals:
        figures = parts.get(goal.part, {}).get("figures", {})
        values = {
            variant: value
            for variant, by_name in figures.items()
            if re.search(goal.variants, variant)
            for figure, value in by_name.items()
            if re.search(goal.figure, figure)
        }
        entry: dict[str, Any] = {
            "part": goal.part,
            "goal": goal.text,
            "bound": goal.shown(),
            "figures": len(values),
        }
        if values:
            ranked = sorted(values.items(), key=lambda item: item[1], reverse=goal.at_most)
            short = {name: value for name, value in ranked if not goal.reached(value)}
            entry |= {"reached": len(values) - len(short), "median": statistics.median(values.values())}
            entry |= {"worst": ranked[0][1], "worst at": ranked[0][0], "short": short}
        entries.append(entry)
    return entries


def table(entries: list[dict[str, Any]]) -> Table:
    """One row a goal; what was not measured is said."""
    made = Table(title="figures against their goals")
    for column in ("part", "goal", "bound", "reached", "median", "worst", "worst at"):
        made.add_column(
            column, justify="right" if column in ("bound", "reached", "median", "worst") else "left"
        )
    for entry in entries:
        row = [entry["part"], entry["goal"], entry["bound"]]
        if entry["figures"]:
            row += [
                f"{entry['reached']} of {entry['figures']}",
                f"{entry['median']:.3g}",
                f"{entry['worst']:.3g}",
            ]
            row += [entry["worst at"]]
        else:
            row += ["not measured", "", "", ""]
        made.add_row(*row)
    return made
