"""`report.html`: one file that loads nothing else, and runs no script. Whatever comes from a run is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ds_compress.report import chart
from ds_compress.report.heat import heat
from ds_compress.sensitivity.table import Sensitivity
from ds_compress.version import __version__

MOST_MODULES = 20_000
"""Of all runs: their rows stay within some megabytes. The JSON has every module."""
_MOST_SHARES = 64
"""Mixtures of one run whose token shares are drawn."""


def html(runs: Sequence[Mapping[str, Any]], sensitivity: Sensitivity | None = None) -> str:
    """The page of what `report` made, and of what `ds_compress sensitivity` measured."""
    environment = Environment(
        loader=PackageLoader("ds_compress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": chart.number, "percent": _percent, "megabytes": _megabytes}
    room, shown = MOST_MODULES, []
    for run in runs:
        count = sum(len(layer["modules"]) for layer in run["layers"])
        shown.append(_shown(run, has_modules=count <= room))
        room -= count if count <= room else 0
    return environment.get_template("report.html.j2").render(
        runs=shown,
        curves=_curves(runs),
        version=__version__,
        title=_title(runs),
        heat=None if sensitivity is None else heat(sensitivity),
    )


def _shown(run: Mapping[str, Any], has_modules: bool) -> dict[str, Any]:
    charts, undrawn = chart.charts_of(run["history"])
    shares = [
        {"name": name, "shares": values, "most": max(values, default=0.0) or 1.0}
        for name, values in list(run["token_shares"].items())[:_MOST_SHARES]
    ]
    block = (
        None
        if run["config"] is None
        else json.dumps(run["config"], indent=2, ensure_ascii=False, default=str)
    )
    return {
        **run,
        "charts": charts,
        "undrawn": undrawn,
        "shares": shares,
        "shares_left_out": len(run["token_shares"]) - len(shares),
        "block": block,
        "has_modules": has_modules,
        "module_count": sum(len(layer["modules"]) for layer in run["layers"]),
    }


def _curves(runs: Sequence[Mapping[str, Any]]) -> list[chart.Chart]:
    wanted = (
        ("accuracy against size", "MB of weight files", "bytes"),
        ("accuracy against latency", "latency in ms", "latency_ms"),
    )
    made = []
    for title, x_name, key in wanted:
        points = [
            (run[key] / 1e6 if key == "bytes" else run[key], run["accuracy"], run["name"])
            for run in runs
            if run[key] is not None and run["accuracy"] is not None
        ]
        made.append(chart.scatter(title, x_name, points))
    return [curve for curve in made if curve is not None]


def _title(runs: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(run["name"] for run in runs[:3])
    return f"{names} and {len(runs) - 3} more" if len(runs) > 3 else names


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.2f} MB"
