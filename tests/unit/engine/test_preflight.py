"""What preflight finds is what the start of a training raises."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import pytest
import torch

from ds_compress.engine.preflight import preflight
from ds_compress.errors import ConfigError
from tests.models import tiny_bert
from tests.multirank.common import ds_config, pruning_block

pytestmark = pytest.mark.usefixtures("single_process")


def meta_bert() -> Any:
    with torch.device("meta"):
        return tiny_bert()


def pruning(**changes: Any) -> dict[str, Any]:
    block = copy.deepcopy(pruning_block())
    block["sparse_pruning"]["different_groups"] = {"a": {"params": {"dense_ratio": 0.5}, **changes}}
    return block


REFUSED: dict[str, dict[str, Any]] = {
    "a wrong value": ds_config(2, pruning(params={"dense_ratio": 7})),
    "two unknown keys": ds_config(2, {**pruning_block(), "sparsity": {}, "quant": {}}),
    "a block outside": {**ds_config(2, pruning_block()), "head_pruning": {}},
    "two settings of ZeRO": ds_config(
        3, pruning_block(), zero={"zero_quantized_weights": True, "zero_hpz_partition_size": 2}
    ),
    "a block and ZeRO": ds_config(0, {"parameter_compression": {"enabled": True}}),
    "a regex that reaches none": ds_config(2, pruning(modules=["no_such_layer"])),
    "layers that cannot be pruned": ds_config(2, pruning(modules=["LayerNorm"])),
    "a format that cannot say it": ds_config(
        2, {**pruning(modules=["layer"]), "export_to": "openvino", "kv_cache": {"enabled": True}}
    ),
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_it_finds_what_training_raises(config: dict[str, Any]) -> None:
    model = tiny_bert()
    with pytest.raises(ConfigError) as error:
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=copy.deepcopy(config))
    before = copy.deepcopy(config)
    found = preflight(config, meta_bert())
    assert found.problems == list(error.value.problems) and config == before


def test_problems_of_the_block_and_of_deepspeed_come_together() -> None:
    config = ds_config(3, pruning(params={"dense_ratio": 7}), zero={"zero_quantized_weights": True})
    paths = [problem.path for problem in preflight(config).problems]
    assert paths[0].endswith("params.dense_ratio") and paths[1:] == [
        "zero_optimization.zero_quantized_weights"
    ]


def test_what_training_accepts_has_no_problems_and_a_plan() -> None:
    found = preflight(ds_config(2, pruning(modules=["layer"])), meta_bert())
    assert found.problems == [] and found.plan is not None
    assert len(found.plan.techniques["sparse_pruning"].targets) == 12
    assert preflight(pruning_block()).problems == [], "a block by itself"
    without_groups = {"sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5}}}
    assert preflight(ds_config(2, without_groups), meta_bert()).problems == []


@pytest.mark.parametrize(
    ("part", "path", "words"),
    [
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage", "0, 1, 2"),
        ({"zero_optimization": {"stage": 2, "bucket": 3}}, "zero_optimization.bucket", "not permitted"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "the DeepSpeed config", "simultaneously"),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 2}, "the DeepSpeed config", "7 != "),
        ({"train_micro_batch_size_per_gpu": None}, "the DeepSpeed config", "needs to be provided"),
    ],
)
def test_what_deepspeed_refuses_has_a_path(part: dict[str, Any], path: str, words: str) -> None:
    whole = {"train_micro_batch_size_per_gpu": 4, "compression_training": pruning_block(), **part}
    config = {key: value for key, value in whole.items() if value is not None}
    (problem,) = preflight(config).problems
    assert problem.path == path and words in problem.allowed


def test_batch_sizes_of_many_processes_and_auto_are_no_problems() -> None:
    config = {
        "$schema": "./x.json",
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "compression_training": pruning_block(),
    }
    found = preflight(config)
    assert found.problems == []
    assert any("8 processes" in note for note in found.notes)
    assert any("gradient_clipping, zero_optimization.reduce_bucket_size" in note for note in found.notes)
    autos = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    assert preflight({**autos, "compression_training": pruning_block()}).problems == []


def test_what_does_nothing_is_a_note() -> None:
    assert any("trains uncompressed" in note for note in preflight(ds_config(2, {})).notes)
    assert any("null" in note for note in preflight({**ds_config(2), "compression_training": None}).notes)


def test_a_default_that_reaches_little_is_a_note() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(64, 64))

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Own())
    block = {"sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5}}}
    found = preflight(block, model)
    assert found.problems == [] and any("left out" in note for note in found.notes)
