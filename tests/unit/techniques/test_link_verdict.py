"""The verdict about the link is taken once in the life of a run, and told."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch.distributed as dist

from ds_compress.reduce.bandwidth import Comparison
from ds_compress.techniques.link_verdict import LinkVerdict

SLOW, FAST = Comparison(2.0, 1.0, 0.5, 1, 5), Comparison(1.0, 2.0, 2.0, 1, 5)


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)


def never() -> Comparison:
    raise AssertionError("measured again")


def verdict(measure: Callable[[], Comparison] | None = None, measures: bool = True) -> LinkVerdict:
    made = LinkVerdict("gradient_compression", measures)
    if measure is not None:
        made.take(measure, None)
    return made


def test_it_is_taken_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ds_compress")
    began = verdict(lambda: FAST)
    began.take(never, None)
    assert not began.is_worthwhile
    (line,) = caplog.messages
    assert "gradient_compression is off on this link" in line and "1000.0 ms" in line


@pytest.mark.parametrize(("then", "now"), [(SLOW, FAST), (FAST, SLOW)])
def test_a_checkpoint_overrules_what_is_measured_now(
    then: Comparison, now: Comparison, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ds_compress")
    resumed = verdict(lambda: now)
    resumed.restore(verdict(lambda: then).state(), None)
    assert resumed.is_worthwhile is then.is_worthwhile
    assert "stays" in caplog.messages[-1] and "as this run found when it began" in caplog.messages[-1]


def test_a_checkpoint_without_a_verdict_leaves_that_of_now() -> None:
    resumed = verdict(lambda: FAST)
    resumed.restore(verdict().state(), None)
    assert not resumed.is_worthwhile


def test_who_insists_is_not_overruled() -> None:
    insisting = verdict(never, measures=False)
    insisting.restore(verdict(lambda: FAST).state(), None)
    assert insisting.is_worthwhile and insisting.state() is None


def test_a_rebuilt_engine_goes_on_without_measuring() -> None:
    rebuilt = verdict()
    rebuilt.follow(verdict(lambda: FAST))
    rebuilt.take(never, None)
    assert not rebuilt.is_worthwhile
