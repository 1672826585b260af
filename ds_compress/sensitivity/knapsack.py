"""One option for each group, of the least cost in all, within a number of bytes: the multiple-choice knapsack.

Solved exactly, as an integer program, by HiGHS through `scipy.optimize.milp` (Huangfu and Hall 2018).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_EXTRA = "a search needs scipy: pip install 'ds_compress[search]'"
_SECONDS = 300
_GAP = 1e-4
_TRIES, _TOLERANCE = 20, 22
"""The second in bits: 2.4e-7 of the limit."""
_MEDIAN, _LARGEST = 1e4, 1e12
"""Of the costs as the solver gets them."""


class Option(NamedTuple):
    """cost: what is summed and kept small. size: bytes."""

    cost: float
    size: int


class UnreachableError(ValueError):
    """No choice is within the bytes; `smallest`: the fewest that there are."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the smallest choice has {smallest:,} bytes")
        self.smallest = smallest


def choose(groups: Sequence[Mapping[str, Option]], budget: int) -> list[str]:
    """By group the name of its option: the least cost whose sizes add up to at most `budget`.

    The cost, beyond what no choice avoids, is within a ten-thousandth of the least one.

    Raises:
        UnreachableError: the smallest options are too large together.
        ValueError: a group without options, no scipy, or a solver that does not finish in 5 minutes.
    """
    if any(not options for options in groups):
        raise ValueError("a group has no option")
    smallest = sum(min(option.size for option in options.values()) for options in groups)
    if smallest > budget:
        raise UnreachableError(smallest)
    # Only what is more than the smallest option counts, and what alone takes more than there is does not.
    slack = budget - smallest
    least = [min(option.size for option in options.values()) for options in groups]
    useful = [
        _undominated({name: o for name, o in options.items() if o.size - own <= slack})
        for options, own in zip(groups, least, strict=True)
    ]
    best = [min(options, key=lambda name: options[name].cost) for options in useful]
    if _size(useful, best) <= budget:
        return best
    limit = slack
    for _ in range(_TRIES):
        chosen = _solved(useful, limit)
        over = _size(useful, chosen) - budget
        if over <= 0:
            return chosen
        # The solver keeps to the limit within a tolerance, so that less than that changes nothing.
        limit = max(0, limit - max(over, limit >> _TOLERANCE))
    raise ValueError(f"no choice of formats within {budget:,} bytes was found")


def _size(groups: Sequence[Mapping[str, Option]], chosen: Sequence[str]) -> int:
    return sum(options[name].size for options, name in zip(groups, chosen, strict=True))


def _undominated(options: Mapping[str, Option]) -> dict[str, Option]:
    """Those for which no other one is both as small and as good."""
    kept: dict[str, Option] = {}
    for name, option in sorted(options.items(), key=lambda item: (item[1].size, item[1].cost)):
        if all(option.cost < other.cost for other in kept.values()):
            kept[name] = option
    return kept


def _solved(groups: Sequence[Mapping[str, Option]], slack: int) -> list[str]:
    """Within `slack` bytes more than the smallest options have."""
    if not slack:
        return [min(options, key=lambda name: options[name].size) for options in groups]
    optimize, numpy, sparse = (_module(name) for name in ("scipy.optimize", "numpy", "scipy.sparse"))
    flat = [(row, name, option) for row, options in enumerate(groups) for name, option in options.items()]
    least = [min(options.values(), key=lambda option: option.cost).cost for options in groups]
    smallest = [min(option.size for option in options.values()) for options in groups]
    # Only differences matter; large numbers keep clear of the solver's absolute tolerances.
    costs = numpy.array([option.cost - least[row] for row, _, option in flat])
    sizes = numpy.array([option.size - smallest[row] for row, _, option in flat]) / slack
    if (costs > 0).any():
        costs = numpy.minimum(costs / numpy.median(costs[costs > 0]) * _MEDIAN, _LARGEST)
    one_each = sparse.csr_matrix(
        (numpy.ones(len(flat)), ([row for row, _, _ in flat], range(len(flat)))), (len(groups), len(flat))
    )
    found = optimize.milp(
        costs,
        integrality=numpy.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(sizes[None], -numpy.inf, 1.0),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.status != 0:
        raise ValueError(f"the solver did not finish: {found.message}; try fewer formats")
    best: dict[int, tuple[float, str]] = {}
    for (row, name, _), value in zip(flat, found.x, strict=True):
        if row not in best or value > best[row][0]:
            best[row] = (value, name)
    return [best[row][1] for row in range(len(groups))]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(_EXTRA) from None
