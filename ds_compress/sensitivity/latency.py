"""The time that each group of layers takes at least in each format, for a search within a latency.

It is the roofline of a named device (`estimate.compute`): the slower of reading the stored weights and of multiplying.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.estimate.compute import attention_seconds, product_seconds
from ds_compress.estimate.products import work_of
from ds_compress.sensitivity.goal import PICOSECOND, Latency
from ds_compress.sensitivity.table import Sensitivity


class Times(NamedTuple):
    """Picoseconds. by_format: by name of a group, by format. others: of all that is not in the table."""

    by_format: Mapping[str, Mapping[str, int]]
    others: int


def times(
    model: nn.Module, plans: Mapping[str, ResolvedPlan], plain: str, table: Sensitivity, goal: Latency
) -> Times:
    """Of one forward.

    Args:
        plans: by format, with all groups in it that can be. plain: the name of the one without formats.

    Raises:
        ValueError: a model whose work is not known from its shapes.
    """
    by_format: dict[str, dict[str, int]] = {name: {} for name in table.groups}
    for format, plan in plans.items():
        seconds = product_seconds(plan, work_of(model, plan), goal.device, goal.tokens)
        for name, group in table.groups.items():
            if format == plain or format in group.increase:
                by_format[name][format] = _picoseconds(sum(seconds[module] for module in group.modules))
    work = work_of(model, plans[plain])
    measured = {module for group in table.groups.values() for module in group.modules}
    seconds = product_seconds(plans[plain], work, goal.device, goal.tokens)
    rest = sum(value for module, value in seconds.items() if module not in measured)
    return Times(
        by_format, _picoseconds(rest + attention_seconds(work, goal.device, goal.tokens, goal.tokens))
    )


def _picoseconds(seconds: float) -> int:
    return math.ceil(seconds / PICOSECOND)
