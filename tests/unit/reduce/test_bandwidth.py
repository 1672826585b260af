"""Which way is faster: decided by rounds in which both met the same traffic, and by enough of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ds_compress.reduce import bandwidth
from ds_compress.reduce.bandwidth import LEAD, MOST_ROUNDS, Comparison, compare


def compared(
    monkeypatch: pytest.MonkeyPatch, plain: Sequence[float], quantized: Sequence[float]
) -> Comparison:
    """Of collectives that take these milliseconds in their rounds (the last for all later ones), and 0 in warm-up."""
    taken = {"plain": iter([0.0, *plain]), "quantized": iter([0.0, *quantized])}
    last = {"plain": 0.0, "quantized": 0.0}
    now = 0.0

    def run(name: str) -> None:
        nonlocal now
        last[name] = next(taken[name], last[name])
        now += last[name]

    monkeypatch.setattr(dist, "barrier", lambda group: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(perf_counter=lambda: now / 1000))
    ways = (lambda: run("plain"), lambda: run("quantized"))
    return compare(*ways, None, torch.device("cpu"), 10**6)


def test_a_clear_difference_takes_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [20], [10])
    assert found.is_worthwhile and found.rounds == LEAD
    assert (found.plain, found.quantized, found.megabits) == pytest.approx((0.02, 0.01, 400))
    assert not compared(monkeypatch, [10], [20]).is_worthwhile


def test_a_gain_below_the_noise_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compared(monkeypatch, [100], [97]).is_worthwhile
    assert compared(monkeypatch, [100], [94]).is_worthwhile


def test_outliers_of_some_rounds_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [20] * 50, [10, 300, 10, 300, 10, 10, 300, 10])
    assert found.is_worthwhile and LEAD < found.rounds < MOST_ROUNDS


def test_traffic_that_slows_both_down_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of each alone would: 40 beside 55."""
    traffic = [1, 1, 5, 5, 5]
    found = compared(monkeypatch, [10 * t for t in traffic], [8 * t for t in traffic])
    assert found.is_worthwhile and found.ratio == pytest.approx(0.8)


def test_what_stays_open_is_decided_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [20] * 50, [10, 30] * 25)
    assert found.rounds == MOST_ROUNDS and found.is_worthwhile


def test_it_goes_into_a_checkpoint() -> None:
    found = Comparison(2.0, 1.0, 0.5, 10, 5)
    assert Comparison.restored(json.loads(json.dumps(found.state()))) == found
