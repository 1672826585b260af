from __future__ import annotations

import time

import pytest

from benchmarks import timing
from benchmarks.timing import interleave, ratio


class TestInterleave:
    def test_everyone_runs_once_per_round_and_warm_up_is_not_counted(self) -> None:
        calls: list[str] = []
        runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
        timings = interleave(runs, rounds=4, warm_up=2)
        assert all(len(t.cpu) == len(t.wall) == 4 for t in timings.values())
        rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
        assert len(rounds) == 6 and all(sorted(each) == ["a", "b", "c"] for each in rounds)

    def test_nobody_always_starts(self) -> None:
        calls: list[str] = []
        interleave({name: (lambda name=name: calls.append(name)) for name in "abc"}, rounds=3, warm_up=0)
        assert calls[::3] == ["a", "b", "c"]

    def test_progress_is_told_before_each_run(self) -> None:
        events: list[str] = []
        interleave({"a": lambda: events.append("run")}, 2, warm_up=0, progress=events.append)
        assert events == ["a", "run", "a", "run"]

    def test_sleeping_costs_wall_time_but_no_cpu(self) -> None:
        cpu, wall = timing.measured(lambda: time.sleep(0.05))
        assert wall >= 0.05 and cpu < 0.04

    def test_working_costs_both(self) -> None:
        cpu, wall = timing.measured(lambda: sum(range(3_000_000)))
        assert 0 < cpu <= wall * 1.2


class TestRatio:
    def test_is_taken_within_each_round(self) -> None:
        # A machine that became ten times slower for one round changes nothing.
        assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == timing.Ratio(2.0, 2.0, 2.0)

    def test_median_and_quartiles(self) -> None:
        made = ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
        assert (made.low, made.median, made.high) == (2.0, 3.0, 4.0)

    def test_one_round_has_no_spread(self) -> None:
        assert ratio([3.0], [2.0]) == timing.Ratio(1.5, 1.5, 1.5)

    def test_unequal_numbers_of_rounds(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            ratio([1.0, 2.0, 3.0], [1.0, 2.0])

    def test_no_rounds(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            ratio([], [])
