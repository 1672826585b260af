"""compression_scheduler: a training loop without an engine."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from ds_compress.compat import (
    compression_scheduler,
    init_compression,
)
from ds_compress.engine.step import loop
from tests.legacy_blocks import ENCODER_BLOCKS, sparse_pruning
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, train
from tests.unit.compat.test_api import STEPS, in_loop, training_bert

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize("name", ["sparse_pruning_topk", "sparse_pruning_snip_momentum", "head_pruning"])
def test_a_plain_loop_trains_as_the_engine_does(name: str) -> None:
    config = ds_config(0, ENCODER_BLOCKS[name])
    with engine_of(tiny_bert(), copy.deepcopy(config)) as engine:
        expected = train(engine, batches(STEPS))
        weights = full_weights(engine.module)
    model = init_compression(training_bert(), config)
    assert in_loop(model, config) == expected
    assert all(torch.equal(value, weights[key]) for key, value in full_weights(model).items())


def test_only_steps_of_an_optimizer_of_this_model_count() -> None:
    config = ds_config(0, sparse_pruning("l1", schedule_offset=2))
    model = init_compression(training_bert(), config)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = compression_scheduler(model, config)
    scheduler.step(step_zero_check=True)
    for _ in range(5):
        elsewhere.step()
        scheduler.step()
    assert scheduler.training_steps == 0
    for steps in (1, 2):
        model(**next(batches(1))).loss.backward()
        own.step()
        scheduler.step()
        scheduler.step()
        assert scheduler.training_steps == steps
        assert bool((weight == 0).any()) == (steps == 2)
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_two_optimizers_share_a_step() -> None:
    config = ds_config(0, sparse_pruning("topk", schedule_offset=1))
    losses = []
    for split in (False, True):
        model = init_compression(training_bert(), config)
        scheduler = compression_scheduler(model, config)
        parameters = list(model.parameters())
        parts = [parameters[::2], parameters[1::2]] if split else [parameters]
        optimizers = [torch.optim.AdamW(part, lr=1e-3) for part in parts]
        losses.append([])
        for batch in batches(5):
            loss = model(**batch).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            losses[-1].append(loss.item())
        assert scheduler.training_steps == 5
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["everything", "sparse_pruning_topk", "activation_quantization_static"])
def test_a_resumed_loop_ends_bit_equal(name: str, tmp_path: Path) -> None:
    config = ds_config(0, ENCODER_BLOCKS[name])
    data, results = list(batches(12)), []
    for seed in (3, 7):
        model = init_compression(training_bert(seed=seed, layers=4 if name == "everything" else 2), config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = compression_scheduler(model, config)
        if seed == 3:
            in_loop(model, config, data[:6], scheduler, optimizer)
            state = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
            torch.save(state, tmp_path / "state.pt")
        else:
            of_model, of_optimizer, of_scheduler = torch.load(tmp_path / "state.pt", weights_only=True)
            model.load_state_dict(of_model)
            optimizer.load_state_dict(of_optimizer)
            scheduler.load_state_dict(of_scheduler)
            assert scheduler.training_steps == 6
        losses = in_loop(model, config, data[6:], scheduler, optimizer)
        results.append((losses, full_weights(model), scheduler.training_steps))
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2] == 12
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_a_state_of_something_else_is_refused() -> None:
    config = ds_config(0, sparse_pruning("l1"))
    scheduler = compression_scheduler(init_compression(training_bert(), config), config)
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match="the run has"):
        scheduler.load_state_dict({**state, "stages": {}})
    foreign = {"sparse_pruning": {"mask": {"elsewhere": torch.ones(3, dtype=torch.bool)}}}
    with pytest.raises(ValueError, match="elsewhere"):
        scheduler.load_state_dict({**state, "fragments": foreign})


def test_hooks_go_with_the_model() -> None:
    config = ds_config(0, sparse_pruning("l1"))
    gc.collect()
    before = len(loop._live)
    model = init_compression(training_bert(), config)
    scheduler = compression_scheduler(model, config)
    compression_scheduler(model, config)
    assert len(loop._live) == before + 1 and len(torch_optimizer._global_optimizer_pre_hooks) == 1
    del model, scheduler
    gc.collect()
    assert len(loop._live) == before


def test_bf16_weights_in_a_loop_keep_their_zeros() -> None:
    config = ds_config(0, sparse_pruning("l1", schedule_offset=1))
    model = init_compression(training_bert(), config).to(torch.bfloat16)
    in_loop(model, config, batches(3))
    weight = model.bert.encoder.layer[1].attention.self.value.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
