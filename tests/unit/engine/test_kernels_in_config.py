"""`kernels` and the legacy `quantizer_kernel` of the JSON decide which kernels a run has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch

import ds_compress
from ds_compress.ops import Preference, kernels, library, prefer
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train
from tests.multirank.training import quantization_block
from tests.single import init_single_process


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    init_single_process()
    monkeypatch.delenv(library.VARIABLE, raising=False)
    yield
    monkeypatch.undo()
    prefer(Preference.AUTO)


def start(block: dict[str, Any]) -> None:
    model = tiny_bert()
    deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config(0, block))


@pytest.mark.parametrize(
    ("block", "key"),
    [
        (pruning_block() | {"kernels": "native"}, "compression_training.kernels"),
        (
            quantization_block(weights={"quantizer_kernel": True}),
            "compression_training.weight_quantization.shared_parameters.quantizer_kernel",
        ),
    ],
    ids=["kernels", "quantizer_kernel"],
)
def test_a_run_that_insists_on_native_does_not_start_without(
    block: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", lambda: False)
    with pytest.raises(ds_compress.ConfigError, match="cannot be had") as error:
        start(block)
    assert [problem.path for problem in error.value.problems] == [key]


def test_both_at_once_contradict_each_other() -> None:
    block = quantization_block(weights={"quantizer_kernel": True}) | {"kernels": "reference"}
    with pytest.raises(ds_compress.ConfigError, match="quantizer_kernel"):
        ds_compress.parse_config(block)


def test_each_engine_has_the_kernels_of_its_own_json() -> None:
    """Two engines that take turns: the one started last does not decide for both."""
    seen: dict[str, set[bool]] = {"native": set(), "reference": set()}

    def step(engine: Any, word: str) -> None:
        handle = engine.module.register_forward_hook(
            lambda *_: seen[word].add(kernels() is torch.ops.ds_compress)
        )
        train(engine, batches(1))
        handle.remove()

    def config(word: str) -> dict[str, Any]:
        return ds_config(0, pruning_block() | {"kernels": word})

    with engine_of(tiny_bert(), config("native")) as one, engine_of(tiny_bert(), config("reference")) as two:
        for engine, word in ((one, "native"), (two, "reference"), (one, "native")):
            step(engine, word)
    assert seen == {"native": {True}, "reference": {False}}


def test_a_process_without_a_choice_goes_by_its_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an export calls after training needs no compiler where the JSON says `reference`."""
    monkeypatch.setattr(library, "_default", None)
    with engine_of(tiny_bert(), ds_config(0, pruning_block() | {"kernels": "reference"})):
        assert kernels() is not torch.ops.ds_compress


def test_a_run_without_kernels_does_not_build_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: pytest.fail("nothing here needs a kernel"))
    ds_compress.plan(tiny_bert(), pruning_block())
    start({"layer_reduction": {"enabled": True, "keep_number_layer": 1}})
