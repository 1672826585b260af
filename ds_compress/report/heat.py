"""The table of `ds_compress sensitivity` as rows of a page: cells shaded by the logarithm of what a format adds."""

from __future__ import annotations

import math
from typing import Any

from ds_compress.sensitivity.table import Sensitivity

LEVELS = 5
"""Shades; 0 is none."""


def heat(table: Sensitivity) -> dict[str, Any]:
    """For the template: {"unit", "metric", "formats", "rows": [{"name", "parameters", "cells": [{"value", "level"}]}]}.

    value: None: not measured; NaN: not finite.
    """
    values = [
        value
        for group in table.groups.values()
        for value in group.increase.values()
        if value is not None and value > 0
    ]
    low, high = (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)

    def cell(increase: dict[str, float | None], format: str) -> dict[str, Any]:
        if format not in increase:
            return {"value": None, "level": 0}
        value = increase[format]
        if value is None:
            return {"value": math.nan, "level": LEVELS}
        if value <= 0 or high == low:
            return {"value": value, "level": 0}
        return {"value": value, "level": round((math.log(value) - low) / (high - low) * LEVELS)}

    return {
        "metric": table.metric.value,
        "unit": table.metric.unit,
        "examples": table.examples,
        "model_class": table.model_class,
        "formats": table.formats,
        "rows": [
            {
                "name": name,
                "parameters": group.parameters,
                "cells": [cell(dict(group.increase), format) for format in table.formats],
            }
            for name, group in table.groups.items()
        ],
    }
