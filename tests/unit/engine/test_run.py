"""A run's life: its config is parsed once, it can be taken off twice, and its old names are there."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress.config.schema.compression_training import CompressionConfig
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train
from tests.multirank.training import quantization_block
from tests.single import init_single_process


@pytest.fixture(autouse=True)
def single_process() -> None:
    init_single_process()


def test_the_block_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    validate = CompressionConfig.model_validate

    def model_validate(value: Any, **settings: Any) -> Any:
        parsed.append(value)
        return validate(value, **settings)

    monkeypatch.setattr(CompressionConfig, "model_validate", model_validate)
    with engine_of(tiny_bert(), ds_config(0, {**pruning_block(), **quantization_block()})) as engine:
        train(engine, batches(1))
    assert len(parsed) == 1


def test_detaching_twice_is_detaching_once() -> None:
    with engine_of(tiny_bert(), ds_config(0, {**pruning_block(), **quantization_block()})) as engine:
        run = engine.compression
        train(engine, batches(1))
        before = dict(vars(engine))
        run.detach()
        run.detach()
        ours = {name for name, value in before.items() if getattr(value, "__module__", "") == "ds_compress"}
        assert not ours & set(vars(engine)) and not hasattr(engine, "compression")
        train(engine, batches(1))


def test_techniques_are_there_under_their_old_name() -> None:
    with engine_of(tiny_bert(), ds_config(0, pruning_block())) as engine:
        assert engine.compression.stages is engine.compression.techniques


def test_the_block_is_given_back_as_it_was_written() -> None:
    block = pruning_block()
    with engine_of(tiny_bert(), ds_config(0, block)) as engine:
        assert engine.compression.block == block
