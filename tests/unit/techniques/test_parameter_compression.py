"""What the technique asks of an engine, and what it does where nothing travels."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed as dist

from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.reduce.bandwidth import Comparison
from ds_compress.reduce.codec import BlockCodec
from ds_compress.techniques import link_verdict
from ds_compress.techniques.parameter_compression import ParameterCompression
from tests.models import tiny_bert
from tests.multirank.common import ds_config, engine_of

pytestmark = pytest.mark.usefixtures("single_process")


class Transport:
    """Says what was asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.counts = {"bytes_sent": 12.0}

    def start(self) -> None:
        self.calls.append("start")

    def refresh(self) -> None:
        self.calls.append("refresh")

    def close(self) -> None:
        self.calls.append("close")


class Engine:
    """Of two processes, whose link makes compression worthwhile or not."""

    data_parallel_group = None

    def __init__(self, is_worthwhile: bool = True) -> None:
        self.transport, self.codec, self.is_worthwhile = Transport(), None, is_worthwhile
        self.measured = 0

    def compare_all_gathers(self, codec: BlockCodec) -> Any:
        self.measured += 1
        return Comparison(2.0, 1.0, 0.5, 1, 5) if self.is_worthwhile else Comparison(1.0, 2.0, 2.0, 1, 5)

    def quantize_weight_transport(self, block: ParameterCompressionConfig, codec: BlockCodec) -> Transport:
        self.codec = codec
        return self.transport


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(link_verdict, "log_once", lambda *_: None)


def attached(engine: Any, **keys: Any) -> ParameterCompression:
    technique = ParameterCompression(ParameterCompressionConfig(**{"enabled": True, **keys}))
    technique.attach_engine(engine)
    technique.attach(None)  # type: ignore[arg-type]
    return technique


@pytest.mark.usefixtures("two_processes")
def test_copies_are_exact_before_stock_methods_come_back() -> None:
    engine = Engine()
    technique = attached(engine, bits=4, measure_link=False)
    assert engine.codec.bits == 4
    assert technique.metrics() == {"bytes_sent": 12.0}
    technique.detach()
    technique.detach()
    assert engine.transport.calls == ["start", "refresh", "close"]
    assert technique.metrics() == {}


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(("is_worthwhile", "calls"), [(True, ["start"]), (False, [])])
def test_a_fast_link_keeps_its_own_gathers(is_worthwhile: bool, calls: list[str]) -> None:
    engine = Engine(is_worthwhile)
    attached(engine, measure_link=True)
    assert engine.measured == 1
    assert engine.transport.calls == calls


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("found_then", [True, False])
def test_a_resumed_run_goes_on_as_it_began_whatever_the_link_is_now(found_then: bool) -> None:
    began, now = attached(Engine(found_then)), Engine(not found_then)
    resumed = attached(now)
    resumed.load_state_dict(json.loads(json.dumps(began.state_dict())))
    # A real transport starts in its constructor, too.
    assert now.transport.calls == ([] if found_then else ["start", "close"])
    assert (resumed.metrics() != {}) is found_then
    assert resumed.state_dict() == began.state_dict()


@pytest.mark.usefixtures("two_processes")
def test_who_insists_has_no_verdict() -> None:
    resumed = attached(Engine(), measure_link=False)
    assert resumed.state_dict() == {"link": None}
    resumed.load_state_dict(attached(Engine(False)).state_dict())
    assert resumed.metrics() != {}


@pytest.mark.usefixtures("two_processes")
def test_a_rebuilt_engine_does_not_measure_again() -> None:
    began, engine = attached(Engine(False)), Engine(True)
    rebuilt = ParameterCompression(ParameterCompressionConfig(enabled=True))
    rebuilt.follow(began)
    rebuilt.attach_engine(engine)  # type: ignore[arg-type]
    assert engine.measured == 0 and engine.transport.calls == []


def test_one_process_says_that_nothing_travels(caplog: pytest.LogCaptureFixture) -> None:
    block = {"parameter_compression": {"enabled": True}}
    with engine_of(tiny_bert(), ds_config(2, block)) as engine:
        assert engine.compression.techniques["parameter_compression"].metrics() == {}
    assert "parameter_compression" in caplog.text


def test_without_an_engine_it_is_a_problem_by_name() -> None:
    (problem,) = ParameterCompression(ParameterCompressionConfig(enabled=True)).without_engine()
    assert problem.path == "compression_training.parameter_compression.enabled"
