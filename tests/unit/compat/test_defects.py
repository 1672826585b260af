"""The 18 defects of the removed library, by number; each docstring says what it did. 2, 4 and 5 also run on 2 ranks.

"The old library" is `deepspeed.compression` of DeepSpeed 0.19.6, where all of this was seen.
"""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.compat import compression_scheduler, init_compression, redundancy_clean
from ds_compress.engine.registry import run_of
from tests.legacy_blocks import (
    ENCODER_BLOCKS,
    HEADS,
    row_pruning,
    sparse_pruning,
    weight_quantization,
)
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, train
from tests.single import init_single_process


@pytest.fixture(autouse=True, scope="module")
def single_process() -> None:
    init_single_process()
    tiny_bert()  # transformers must be imported before the first zero.Init, which patches torch


def loop(model: nn.Module, config: Any, steps: int, loss: Any, lr: float = 0.01) -> Any:
    """A training loop without an engine; returns its scheduler."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    scheduler = compression_scheduler(model, config)
    for step in range(steps):
        loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return scheduler


def of_bert(model: nn.Module, step: int) -> torch.Tensor:
    return model(**next(batches(1, seed=step))).loss


def one_group(technique: str, params: dict[str, Any], modules: list[str], **shared: Any) -> dict[str, Any]:
    return {
        technique: {
            "shared_parameters": {"enabled": True, "schedule_offset": 0, **shared},
            "different_groups": {"g": {"params": params, "modules": modules}},
        }
    }


@pytest.mark.parametrize("block", [row_pruning("l1"), weight_quantization()], ids=["rows", "bits"])
def test_01_a_model_built_under_zero_init(block: dict[str, Any]) -> None:
    """Old: row pruning by l1 raised IndexError (norm of an empty tensor), weight quantization failed an assertion
    later, because the layer that replaced the old one had a new Parameter without its partition."""
    block = copy.deepcopy(block)
    for technique in block.values():
        technique["different_groups"] = {"g": {**next(iter(technique["different_groups"].values()))}}
        technique["shared_parameters"] |= {"round_to": 1} if technique is block.get("row_pruning") else {}
        technique["different_groups"]["g"] |= {"modules": ["up_b"], "related_modules": [["down_b"]]}
    config = ds_config(3, block)
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)):
        model: nn.Module = TwoPairs(scaled=False)
    model = init_compression(model, config)
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    losses = []
    with engine_of(model, config) as engine:
        for _ in range(20):
            loss = engine(torch.ones(4, 6)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        metrics = engine.compression.metrics()
        zeros = int((full_weights(model)["up_b.weight"] == 0).sum())
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    assert zeros == (4 * 6 if "row_pruning" in block else 0)
    assert metrics.get("weight_quantization/mean_bits", 8) == 8


def test_02_cleaning_a_partitioned_model() -> None:
    """Old: training under ZeRO-3 ended in redundancy_clean, which indexed weights of shape [0]."""
    config = ds_config(3, {**row_pruning("l1"), **HEADS})
    model = init_compression(tiny_bert(), config)
    with engine_of(model, config) as engine:
        train(engine, batches(8))
        cleaned = redundancy_clean(engine, config)
    layer = cleaned.bert.encoder.layer[1]
    assert layer.intermediate.dense.weight.shape == (48, 32)
    assert layer.attention.self.key.weight.shape == (16, 32)
    assert torch.isfinite(cleaned(**next(batches(1))).logits).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_03_moq_on_every_stage_in_bf16_and_fp32(stage: int, dtype: str) -> None:
    """Old: AttributeError under ZeRO-1, partitioned weights were passed over without a word under ZeRO-3, and bf16
    was refused: only fp16 optimizers quantized."""
    block = weight_quantization(
        quantize_weight_in_forward=False, fp16_mixed_quantize={"enabled": True, "quantize_change_ratio": 0.5}
    )
    with engine_of(tiny_bert(), ds_config(stage, block, dtype)) as engine:
        train(engine, batches(12))
        exported = ds_compress.export_state_dict(engine)
        trained = full_weights(engine.module)
        assert engine.compression.metrics()["weight_quantization/mean_bits"] < 9
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    # 10 steps after the offset: bits fell at 2, 4 and 8 to 5, and the real share at 0.5 a step since to nothing.
    assert all(len(group.unique()) <= 2**5 for group in exported[name].view(4, -1))
    assert len(trained[name].unique()) > 200  # the master stays exact


def test_04_the_same_masks_whatever_the_stage() -> None:
    """Old: no example and no test ever ran sharded; see also `tests/multirank/test_compat.py`."""
    zeros = []
    for stage in (0, 1, 2, 3):
        with engine_of(tiny_bert(), ds_config(stage, sparse_pruning("topk"))) as engine:
            train(engine, batches(8))
            zeros.append({name: weight == 0 for name, weight in full_weights(engine.module).items()})
    for other in zeros[1:]:
        assert all(torch.equal(mask, other[name]) for name, mask in zeros[0].items())


def test_05_one_reduction_makes_static_ranges_common() -> None:
    """Old: each rank kept the range of its own data in a buffer, and the ranks' models drifted apart. With 2 ranks:
    `tests/multirank/test_compat.py`, also for student_initialization, which copied without gathering."""
    config = ENCODER_BLOCKS["activation_quantization_static"]
    model = init_compression(tiny_bert().train(), config)
    scheduler = compression_scheduler(model, config)
    shards = run_of(model).shards
    loop(model, config, 4, of_bert)
    with mock.patch.object(shards, "reduce_max", wraps=shards.reduce_max) as reduce:
        loop(model, config, 2, of_bert)
    assert reduce.call_count == 2 and scheduler.training_steps == 6


def test_06_the_scheduler_has_a_state() -> None:
    """Old: compression_scheduler had no state_dict: a resumed run began at step 0 with start_bits."""
    config = {"compression_training": weight_quantization(schedule_offset=1)}
    model = init_compression(tiny_bert().train(), config)
    state = loop(model, config, 9, of_bert).state_dict()
    resumed = init_compression(tiny_bert().train(), config)
    scheduler = compression_scheduler(resumed, config)
    scheduler.load_state_dict(state)
    assert scheduler.training_steps == 9
    for got, expected in zip(
        run_of(resumed).techniques.values(), run_of(model).techniques.values(), strict=True
    ):
        assert got.metrics() == expected.metrics() and got.metrics()["mean_bits"] < 9


@pytest.mark.parametrize("method", ["l1", "topk"])
def test_07_sparse_pruning_reaches_its_offset(method: str) -> None:
    """Old: KeyError 'schedule_offset_end' in the scheduler at the first step of any l1 or topk config."""
    config = {"compression_training": sparse_pruning(method, schedule_offset=3)}
    model = init_compression(tiny_bert().train(), config)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    loop(model, config, 2, of_bert)
    assert not (weight == 0).any()
    loop(model, config, 2, of_bert)
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_08_snip_momentum_needs_no_other_package() -> None:
    """Old: `from nc import WeightPruningConfig`, a module that does not exist under that name, so it never ran."""
    config = {"compression_training": ENCODER_BLOCKS["sparse_pruning_snip_momentum"]}
    model = init_compression(tiny_bert().train(), config)
    loop(model, config, 13, of_bert)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach()
    blocks = (weight != 0).view(-1, 4, weight.shape[1])
    assert torch.equal(blocks.any(1), blocks.all(1))  # four rows of a column live or die together
    assert int(blocks.any(1).sum()) == math.ceil(0.4 * weight.numel() / 4)


class TwoPairs(nn.Module):
    """Two feed-forward blocks with other names; the rows that matter differ."""

    def __init__(self, scaled: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_a, self.down_a = nn.Linear(6, 8), nn.Linear(8, 6)
        self.up_b, self.down_b = nn.Linear(6, 8), nn.Linear(8, 6)
        if scaled:
            self.up_a.weight.data[:4] *= 10
            self.up_b.weight.data[4:] *= 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down_a(torch.relu(self.up_a(x)))
        return self.down_b(torch.relu(self.up_b(x)))


def test_09_each_pair_of_a_group_has_its_own_mask() -> None:
    """Old: with two regexes in one group, the second related layer was cut with the first pair's mask."""
    config = row_pruning("l1")["row_pruning"]
    config["shared_parameters"] |= {"schedule_offset": 1, "round_to": 1}
    config["different_groups"]["rp1"] |= {
        "modules": ["up_a", "up_b"],
        "related_modules": [["down_a"], ["down_b"]],
    }
    model = init_compression(TwoPairs().train(), {"row_pruning": config})
    loop(model, {"row_pruning": config}, 2, lambda m, step: m(torch.ones(3, 6)).square().mean(), lr=1e-4)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    columns = (model.down_a.weight[:, :4].clone(), model.down_b.weight[:, 4:].clone())
    cleaned = redundancy_clean(model, {"row_pruning": config})
    assert torch.equal(cleaned.down_a.weight, columns[0]) and torch.equal(cleaned.down_b.weight, columns[1])
    torch.testing.assert_close(cleaned(x), expected)
