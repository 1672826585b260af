"""Schedules of the losses' weights."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress.config.schema.distillation import LogitsLoss


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weight": 2.0}, [2.0, 2.0, 2.0, 2.0, 2.0]),
        ({"weight": 1.0, "final_weight": 0.0, "schedule_offset_end": 4}, [1.0, 0.75, 0.25, 0.0, 0.0]),
        ({"weight": 0.0, "final_weight": 3.0, "schedule_offset_end": 3}, [0.0, 1.0, 3.0, 3.0, 3.0]),
        (
            {"weight": 1.0, "final_weight": 2.0, "schedule_offset": 3, "schedule_offset_end": 5},
            [1.0, 1.0, 1.0, 1.5, 2.0],
        ),
    ],
)
def test_factors_move_linearly_between_their_steps(settings: dict[str, Any], expected: list[float]) -> None:
    loss = LogitsLoss(**settings)
    assert [loss.weight_at(step) for step in (0, 1, 3, 4, 500)] == pytest.approx(expected)
