"""The activation_quantization stage: dynamic grids by kind of layer, static ranges, resume, detach."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ds_compress.config.resolve.resolver import resolve
from ds_compress.quant.fake_quant import fake_quantize_input
from ds_compress.quant.grid import TokenGranularity
from ds_compress.techniques.activation_quantization import ActivationQuantization
from ds_compress.techniques.weight_quantization import WeightQuantization


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.conv(x).mean((2, 3)))))


class Processes:
    """Stands for the other processes: each adds what it observed."""

    def __init__(self, *others: torch.Tensor) -> None:
        self.others = others
        self.calls = 0

    def reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.stack([tensor, *(other.to(tensor) for other in self.others)]).amax(0)


def prepared(shared: dict, bits: int = 8, model: nn.Module | None = None):
    if model is None:
        torch.manual_seed(0)
        model = Model()
    config = {
        "activation_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {
                "all": {"params": {"bits": bits}, "modules": ["conv", "first", "second", "unused"]}
            },
        }
    }
    stage = ActivationQuantization(resolve(model, config).techniques["activation_quantization"], 0)
    assert stage.prepare(model) == {}
    return model, stage


STATIC = {"range_calibration": "static"}


def batch(seed: int) -> torch.Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, stage: ActivationQuantization, steps: range, micro_steps: int = 1) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for micro_step in range(micro_steps):
            loss = model(batch(100 * step + micro_step)).square().sum()
            loss.backward()
            losses.append(loss.item())
        stage.before_step(step)
        optimizer.step()
        stage.after_step(step + 1)
    return losses


@pytest.mark.parametrize("quantization_type", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("granularity", "conv", "linear"),
    [(None, "per_sample", "per_token"), ("per_token", "per_sample", "per_token"), ("per_tensor",) * 3],
)
def test_dynamic_grid_by_kind_of_layer(quantization_type, granularity, conv, linear):
    shared = {"quantization_type": quantization_type}
    model, _ = prepared(shared if granularity is None else {**shared, "granularity": granularity}, bits=4)
    for module, name, x in [(model.conv, conv, batch(0)), (model.first, linear, torch.randn(4, 7, 3))]:
        grid = module.input_quantizer.grid
        assert grid.granularity is TokenGranularity(name) and not grid.narrow_range
        assert grid.symmetric == (quantization_type == "symmetric")
        quantized = fake_quantize_input(x, grid).values
        expected = module._ds_compress_base_class.forward(module, quantized)
        torch.testing.assert_close(module(x), expected)


def test_dynamic_tokens_and_images_do_not_see_their_neighbours():
    model, _ = prepared({}, bits=4)
    x, tokens = batch(0), torch.randn(4, 3)
    conv, first = model.conv(x), model.first(tokens)
    x[1:] *= 50
    tokens[1:] *= 50
    torch.testing.assert_close(model.conv(x)[0], conv[0])
    torch.testing.assert_close(model.first(tokens)[0], first[0])


def test_off_before_the_offset():
    model, stage = prepared({**STATIC, "schedule_offset": 2})
    plain = Model()
    plain.load_state_dict(model.state_dict())
    for step in range(2):
        assert torch.equal(model(batch(step)), plain(batch(step)))
        stage.before_step(step)
        stage.after_step(step + 1)
        assert stage.state_dict()["ranges"] == {}
    model(batch(2))
    stage.before_step(2)
    stage.after_step(3)
    assert not torch.equal(model(batch(3)), plain(batch(3)))


def test_static_range_is_the_running_mean_of_extremes_over_micro_steps():
    model, stage = prepared({**STATIC, "range_momentum": 0.75})
    expected = None
    for step in range(4):
        for micro_step in range(3):
            model(batch(10 * step + micro_step))
        stage.before_step(step)
        stage.after_step(step + 1)
        seen = torch.stack([batch(10 * step + micro_step) for micro_step in range(3)])
        fresh = torch.stack([seen.min(), seen.max()])
        expected = fresh if expected is None else 0.75 * expected + 0.25 * fresh
        torch.testing.assert_close(stage.state_dict()["ranges"]["conv"], expected)
    assert "unused" not in stage.state_dict()["ranges"]
    # The fourth layer was never called: without a range it quantizes nothing, and counts with no bits.
    assert stage.metrics() == {"mean_bits": 8 * 3 / 4, "layers_with_range": 3}


def test_ranges_are_reduced_over_processes_in_one_call():
    model, stage = prepared(STATIC)
    other = torch.tensor([[9.0, 1.0], [-math.inf, -math.inf], [0.0, 70.0], [2.0, 3.0]])  # (-min, max)
    processes = Processes(other)
    stage.attach(processes)
    x = batch(0)
    model(x)
    stage.before_step(0)
    assert processes.calls == 1
    ranges = stage.state_dict()["ranges"]
    torch.testing.assert_close(ranges["conv"], torch.tensor([-9.0, max(1.0, x.max())]))
    assert ranges["second"][1] == 70
    assert ranges["unused"].tolist() == [-2.0, 3.0]  # only another process called it
    stage.after_step(1)
    stage.before_step(1)  # nothing observed here, but every process takes part
    assert processes.calls == 2


def test_a_step_without_observation_keeps_the_range():
    model, stage = prepared(STATIC)
    train(model, stage, range(2))
    before = stage.state_dict()["ranges"]
    stage.before_step(2)
    after = stage.state_dict()["ranges"]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_with_a_fault_keeps_the_range():
    model, stage = prepared(STATIC)
    train(model, stage, range(2))
    before = stage.state_dict()["ranges"]
    bad = batch(5)
    bad[0, 0, 0, 0] = math.inf
    assert model(bad).isnan().any()
    stage.before_step(2)
    after = stage.state_dict()["ranges"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model(batch(6)).isfinite().all()


def test_eval_neither_observes_nor_changes_ranges():
    model, stage = prepared(STATIC)
    train(model, stage, range(2))
    before = stage.state_dict()["ranges"]
    model.eval()
    first = model(batch(7))
    model(1000 * batch(8))
    stage.before_step(2)
    stage.after_step(3)
    assert torch.equal(model(batch(7)), first)
    after = stage.state_dict()["ranges"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_ends_bit_equal():
    unbroken, stage = prepared(STATIC, bits=4)
    expected = train(unbroken, stage, range(8), micro_steps=2)

    model, stage = prepared(STATIC, bits=4)
    losses = train(model, stage, range(5), micro_steps=2)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(stage.state_dict())
    train(model, stage, range(5, 6))  # what is saved must not move with the run that goes on
    resumed, stage = prepared(STATIC, bits=4, model=Model())
    resumed.load_state_dict(weights)
    stage.load_state_dict(state)
    losses += train(resumed, stage, range(5, 8), micro_steps=2)
    assert losses == expected


def test_training_learns_through_static_and_dynamic_grids():
    for shared in (STATIC, {}, {"quantization_type": "asymmetric", "granularity": "per_tensor"}):
        model, stage = prepared(shared)
        losses = train(model, stage, range(30))
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), shared


@pytest.mark.parametrize("weight_first", [True, False])
def test_shares_a_module_with_weight_quantization_in_either_order(weight_first):
    torch.manual_seed(0)
    model = Model()
    plain = copy.deepcopy(model)
    groups = {"all": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["first", "second"]}}
    both = {
        "weight_quantization": {"shared_parameters": {"enabled": True}, "different_groups": groups},
        "activation_quantization": {
            "shared_parameters": {"enabled": True},
            "different_groups": {"all": {"params": {"bits": 8}, "modules": ["first", "second"]}},
        },
    }
    plan = resolve(model, both)
    stages = [
        WeightQuantization(plan.techniques["weight_quantization"], 0),
        ActivationQuantization(plan.techniques["activation_quantization"], 0),
    ]
    for stage in stages if weight_first else stages[::-1]:
        stage.prepare(model)
    x = batch(0)
    y = model(x)
    assert model.first.weight_quantizer is not None and model.first.input_quantizer is not None
    torch.testing.assert_close(y, plain(x), rtol=0.1, atol=0.05)
    stages[0].detach()
    assert not torch.equal(model(x), plain(x)) and type(model.first) is not nn.Linear
    stages[1].detach()
    assert type(model.first) is nn.Linear and torch.equal(model(x), plain(x))
