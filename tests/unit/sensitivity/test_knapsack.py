"""The solver against all choices there are."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_compress.sensitivity.knapsack import Option, UnreachableError, choose

OPTIONS = st.builds(
    Option,
    cost=st.one_of(st.floats(0, 10), st.floats(0, 1e-6), st.floats(-1, 0)),
    size=st.one_of(st.integers(0, 40), st.integers(10**8, 10**8 + 40)),
)
GROUPS = st.lists(st.dictionaries(st.sampled_from("abcde"), OPTIONS, min_size=1), min_size=1, max_size=5)


def best_of_all(groups: list[dict[str, Option]], budget: int) -> float | None:
    costs = [
        sum(option.cost for option in choice)
        for choice in itertools.product(*(options.values() for options in groups))
        if sum(option.size for option in choice) <= budget
    ]
    return min(costs, default=None)


@settings(max_examples=200, deadline=None)
@given(groups=GROUPS, share=st.floats(-0.1, 1.1))
def test_no_choice_is_better(groups: list[dict[str, Option]], share: float) -> None:
    smallest, largest = (
        sum(pick(option.size for option in options.values()) for options in groups) for pick in (min, max)
    )
    budget = int(smallest + share * (largest - smallest + 1))
    expected = best_of_all(groups, budget)
    if expected is None:
        with pytest.raises(UnreachableError) as caught:
            choose(groups, budget)
        assert caught.value.smallest == smallest
        return
    chosen = [options[name] for options, name in zip(groups, choose(groups, budget), strict=True)]
    assert sum(option.size for option in chosen) <= budget
    cost = sum(option.cost for option in chosen)
    least = sum(min(option.cost for option in options.values()) for options in groups)
    # Of what the budget costs, and beside it what costs far below the largest one are worth.
    widest = max(o.cost for options in groups for o in options.values()) - least
    assert cost <= expected + 2e-4 * (expected - least) + 1e-9 * max(1.0, abs(widest))


def test_a_mix_beats_every_uniform_choice() -> None:
    hard = {"four": Option(1.0, 4), "two": Option(9.0, 2), "three": Option(3.0, 3)}
    easy = {"four": Option(0.1, 4), "two": Option(0.4, 2), "three": Option(0.2, 3)}
    assert choose([hard, easy, hard, easy], 12) == ["four", "two", "four", "two"]


def test_of_equal_options_the_smaller_counts() -> None:
    assert choose([{"large": Option(0.0, 9), "small": Option(0.0, 1)}], 100) == ["small"]


def test_a_group_without_options() -> None:
    with pytest.raises(ValueError, match="no option"):
        choose([{"a": Option(0.0, 1)}, {}], 5)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"ds_compress\[search\]"):
        choose([{"a": Option(0.0, 2), "b": Option(1.0, 1)}] * 2, 3)


def test_hundreds_of_layers_are_quick_and_near_the_bound() -> None:
    groups = [
        {
            f"int{bits}": Option((1 + 7 * at % 13) * 4.0**-bits, (1 + at % 3) * bits * 41_472)
            for bits in (2, 3, 4, 6, 8)
        }
        for at in range(320)
    ]
    budget = sum(options["int4"].size for options in groups)
    chosen = choose(groups, budget)
    size = sum(options[name].size for options, name in zip(groups, chosen, strict=True))
    cost = sum(options[name].cost for options, name in zip(groups, chosen, strict=True))
    # Lagrange: no choice within the budget costs less, whatever the price of a byte.
    bound = max(
        sum(min(o.cost + price * o.size for o in options.values()) for options in groups) - price * budget
        for price in (10 ** (step / 50) for step in range(-500, -200))
    )
    assert size <= budget and bound <= cost <= 1.01 * bound
