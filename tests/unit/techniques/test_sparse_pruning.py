"""The pruning methods against plain re-tellings of their papers, at world size 1."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from ds_compress.ops import counter_rng
from ds_compress.techniques.sparse_pruning import SparsePruning
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) - y).square().mean()


def data(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 12, generator=generator), torch.randn(16, 8, generator=generator))
        for _ in range(steps)
    ]


def run(
    method: str, steps: int, weight_decay: float = 0.0, **shared: Any
) -> tuple[torch.Tensor, SparsePruning]:
    block = {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": method, "pattern": "unstructured", **shared},
            "different_groups": {"all": {"params": {"dense_ratio": 0.25}, "modules": ["layer"]}},
        }
    }
    config = ds_config(0, block)
    config["optimizer"]["params"] |= {"lr": 0.05, "weight_decay": weight_decay}
    model = Toy()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for x, y in data(steps):
        engine.backward(engine(x, y))
        engine.step()
    stage = engine.compression.techniques["sparse_pruning"]
    engine.destroy()
    return model.layer.weight.detach().clone(), stage


def keep_largest(scores: torch.Tensor, density: float = 0.25) -> torch.Tensor:
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: int(density * scores.numel())]] = True
    return mask.view(scores.shape)


def test_topk_trains_as_trainable_scores_with_a_straight_through_mask_do() -> None:
    """The removed library made scores a parameter of the model; ours live beside the master weights."""
    steps = 12
    got, _ = run("topk", steps, weight_decay=0.01)
    model = Toy()
    weight = model.layer.weight
    key = counter_rng.stream_key(0, "layer.weight")
    bound = 12**-0.5
    scores = nn.Parameter(counter_rng.uniform((8, 12), key) * 2 * bound - bound)
    of_weight = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.01)
    of_scores = torch.optim.AdamW([scores], lr=0.05, weight_decay=0.01)
    is_active, next_mask = torch.ones(8, 12, dtype=torch.bool), None
    for index, (x, y) in enumerate(data(steps)):
        masked = (weight * is_active).detach().requires_grad_()
        (x @ masked.t() - y).square().mean().backward()
        next_mask = keep_largest(scores.detach())
        if index > 0:
            scores.grad = masked.grad * weight.detach()
            of_scores.step()
        weight.grad = masked.grad * is_active
        of_weight.step()
        is_active = next_mask
    torch.testing.assert_close(got, (weight * is_active).detach(), rtol=1e-4, atol=1e-6)


def test_movement_is_the_sum_of_minus_w_times_g() -> None:
    steps = 6
    got, stage = run("movement", steps, schedule_offset=3)
    model = Toy()
    weight = model.layer.weight
    optimizer = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.0)
    score = torch.zeros(8, 12)
    is_active = torch.ones(8, 12, dtype=torch.bool)
    for index, (x, y) in enumerate(data(steps)):
        masked = (weight * is_active).detach().requires_grad_()
        (x @ masked.t() - y).square().mean().backward()
        next_mask = keep_largest(score) if index + 1 >= 3 else is_active
        score = score - masked.grad * weight.detach()
        weight.grad = masked.grad * is_active
        optimizer.step()
        is_active = next_mask
    torch.testing.assert_close(stage.score.tensors["layer.weight"], score.flatten(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got, (weight * is_active).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["taylor", "snip_momentum"])
def test_saliency_scores(method: str) -> None:
    """One mask, computed just before step 4 is applied, from the first three gradients."""
    got, _ = run(method, 4, schedule_offset=4)
    model = Toy()
    weight = model.layer.weight
    optimizer = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.0)
    score = torch.zeros(8, 12)
    for x, y in data(4):
        model.zero_grad()
        model(x, y).backward()
        mask = keep_largest(score)
        score = (0.9 if method == "snip_momentum" else 1.0) * score + (weight.grad * weight.detach()).abs()
        optimizer.step()
    torch.testing.assert_close(got, (weight * mask).detach(), rtol=1e-4, atol=1e-6)


def test_pruned_weights_never_return_without_regrowth() -> None:
    shared = {"schedule": "linear", "schedule_offset_end": 10, "schedule_offset_stride": 1}
    previous = None
    for steps in (3, 5, 8, 11):
        alive = run("l1", steps, **shared)[0] != 0
        assert previous is None or not (alive & ~previous).any()
        previous = alive
    assert int(previous.sum()) == 24


def test_regrowth_brings_hidden_weights_back() -> None:
    early = run("l1", 2, regrowth=True)[0] != 0
    late = run("l1", 25, regrowth=True)[0] != 0
    assert int(early.sum()) == int(late.sum()) == 24
    assert (late & ~early).any()


@pytest.mark.parametrize("method", ["taylor", "topk", "movement"])
def test_after_the_last_mask_nothing_but_the_mask_is_kept(method: str) -> None:
    _, stage = run(method, 3, schedule_offset=2, schedule_offset_end=4)
    assert stage.score.tensors
    got, stage = run(method, 8, schedule_offset=2, schedule_offset_end=4)
    assert not stage.score.tensors
    assert not stage.latent
    assert int(got.count_nonzero()) == 24


def test_nan_weights_keep_the_mask_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_bert()
    block = pruning_block(schedule_offset_end=9, scope="global")
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=ds_config(0, block)
    )
    train(engine, batches(1))
    stage = engine.compression.techniques["sparse_pruning"]
    before = {name: mask.clone() for name, mask in stage.masks.items()}
    broken = model.bert.encoder.layer[0].attention.self.key.weight
    broken.data.view(-1)[
        stage.score.scores_of(
            stage._fragments["bert.encoder.layer.0.attention.self.key.weight"], broken.data.view(-1)
        ).argmax()
    ] = float("nan")
    with caplog.at_level("WARNING", logger="ds_compress"):
        stage.update_masks(5)
    assert "NaN or Inf" in caplog.text
    assert all(torch.equal(before[name], mask) for name, mask in stage.masks.items())
    engine.destroy()
