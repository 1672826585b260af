"""The schedules of a recipe, for a run of another length than the recipes are written for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_compress.config.recipes.catalog import STEPS

_STEPS_OF_A_RUN = ("schedule_offset", "schedule_offset_end", "schedule_offset_stride", "quantization_period")


def scaled(block: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """`block`, written for `STEPS` optimizer steps, for a run of `steps`: each moment at the same part of the run.

    No moment comes before step 1: scores need a step to be measured in.
    """

    def scale(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: scale(name, item) for name, item in value.items()}
        if key in _STEPS_OF_A_RUN and isinstance(value, int):
            return max(1, value * steps // STEPS)
        return value

    return {key: scale(key, value) for key, value in block.items()}
