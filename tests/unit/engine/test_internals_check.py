"""Under a version of DeepSpeed that nobody has tested, all internals that we rely on are looked at before a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import deepspeed
import pytest

from ds_compress.engine import internals_check
from ds_compress.engine.internals_check import TESTED_VERSIONS, require_known_internals
from ds_compress.engine.zero import internals_table
from ds_compress.engine.zero.internals_table import Internal
from tests.models import tiny_bert
from tests.multirank.common import ds_config, engine_of, pruning_block
from tests.single import init_single_process


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    require_known_internals.cache_clear()
    yield
    require_known_internals.cache_clear()


def test_a_tested_version_costs_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals_check, "missing_internals", lambda: pytest.fail("not looked at"))
    assert deepspeed.__version__.split("+")[0] in TESTED_VERSIONS
    require_known_internals()


def test_another_version_with_all_of_them_trains_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.19.99")
    init_single_process()
    with (
        caplog.at_level(logging.WARNING, "ds_compress"),
        engine_of(tiny_bert(), ds_config(0, pruning_block())),
    ):
        pass
    assert [line for line in caplog.messages if "tested with DeepSpeed 0.19.8, this is 0.19.99" in line]


def test_another_version_without_one_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0+abc")
    gone = Internal("deepspeed.runtime.engine:DeepSpeedEngine._no_such_method")
    monkeypatch.setattr(internals_table, "INTERNALS", (*internals_table.INTERNALS, gone))
    init_single_process()
    with pytest.raises(
        RuntimeError, match=r"DeepSpeed 0\.20\.0.*_no_such_method is gone.*deepspeed==0\.19\.8"
    ):
        deepspeed.initialize(model=tiny_bert(), config=ds_config(0, pruning_block()))


def test_a_run_without_our_block_is_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    monkeypatch.setattr(internals_check, "missing_internals", lambda: pytest.fail("not looked at"))
    init_single_process()
    with engine_of(tiny_bert(), ds_config(0, None)):
        pass
