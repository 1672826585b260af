"""The weight_quantization stage: ladder, blend, gradients, learned scales, resume, detach."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.targets import TechniquePlan
from ds_compress.quant import layers
from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.weights import fake_quantize, initial_scale
from ds_compress.techniques.weight_quantization import BitWidth, WeightQuantization, bit_width_at


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 4)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.embed(indices)))).mean(1)


INDICES = torch.tensor([[1, 2, 3], [4, 5, 10]])


def block(shared: dict, params: dict | None = None, modules: tuple[str, ...] = ("first", "second", "embed")):
    bits = {"start_bits": 8, "target_bits": 8, **(params or {})}
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"all": {"params": bits, "modules": list(modules)}},
        }
    }


def resolved(model: nn.Module, shared: dict, params: dict | None = None, **options) -> TechniquePlan:
    return resolve(model, block(shared, params, **options)).techniques["weight_quantization"]


def prepared(shared: dict, params: dict | None = None, model: nn.Module | None = None, seed=0, **options):
    if model is None:
        torch.manual_seed(0)
        model = Model()
    stage = WeightQuantization(resolved(model, shared, params, **options), seed)
    return model, stage, stage.prepare(model)


def train(model: nn.Module, stage: WeightQuantization, steps: range, parameters=None) -> list[float]:
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1)
    losses = []
    for step in steps:
        loss = model(INDICES).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        stage.before_step(step)
        optimizer.step()
        stage.after_step(step + 1)
    return losses


@pytest.mark.parametrize(
    ("period", "drops"), [(1, [1, 2, 4, 8, 16]), (3, [3, 6, 12, 24, 48]), (100, [100, 200, 400, 800, 1600])]
)
def test_bits_drop_when_the_doubling_period_passes(period, drops):
    """The removed library: `if steps >= period: period *= 2; bits -= 1`, once per step."""
    bits, due = 8, period
    for elapsed in range(drops[-1] + 5):
        if elapsed and bits > 3 and elapsed >= due:
            bits, due = bits - 1, due * 2
        bit_width = bit_width_at(elapsed, 8, 3, period)
        assert bit_width.bits == bits == 8 - sum(elapsed >= drop for drop in drops)
        assert bit_width.since == max([0, *(drop for drop in drops if drop <= elapsed)])


def test_ladder_ends():
    assert bit_width_at(10**9, 8, 1, 1) == BitWidth(1, 64)
    assert bit_width_at(0, 16, 4, 0) == BitWidth(4, 0)
    assert bit_width_at(0, 4, 4, 7) == BitWidth(4, 0)


def test_off_before_offset_and_above_eight_bits():
    model, stage, _ = prepared(
        {"schedule_offset": 2, "quantize_weight_in_forward": True},
        {"start_bits": 10, "target_bits": 7, "quantization_period": 1},
    )
    plain = Model()
    plain.load_state_dict(model.state_dict())
    exact = plain(INDICES)
    # Steps 0 and 1: before the offset; 2: 10 bits; 3: 9 bits; 4 and 5: 8 bits; from 6 on: 7 bits.
    for step, bits in enumerate([32, 32, 32, 32, 8, 8, 7, 7]):
        stage.after_step(step)
        assert torch.equal(model(INDICES), exact) == (bits == 32), step
        assert stage.metrics() == {"mean_bits": bits}


def test_grids_of_a_legacy_config():
    model, _, added = prepared({"quantize_groups": 4})
    assert added == {}
    assert torch.equal(
        layers.quantized_weight(model.first), fake_quantize(model.first.weight, WeightGrid(8, groups=4))
    )
    rows = WeightGrid(8, granularity=Granularity.PER_CHANNEL)
    assert torch.equal(layers.quantized_weight(model.embed), fake_quantize(model.embed.weight, rows))


def test_grids_of_new_granularities():
    model, _, _ = prepared({"granularity": "per_column_group", "group_size": 5}, {"target_bits": 4})
    grid = WeightGrid(8, True, True, Granularity.PER_COLUMN_GROUP, group_size=5)
    assert torch.equal(layers.quantized_weight(model.first), fake_quantize(model.first.weight, grid))


def test_conv1d_channels_are_columns():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8))
    _, _, _ = prepared({"granularity": "per_channel"}, model=model, modules=("0",))
    grid = WeightGrid(8, True, True, Granularity.PER_CHANNEL, channel_axis=1)
    assert torch.equal(layers.quantized_weight(model[0]), fake_quantize(model[0].weight, grid))


def rounded_after_the_step(model: nn.Module, steps: int, groups: int) -> list[float]:
    """MoQ as the removed library did it: the model holds rounded weights, the optimizer an exact master."""
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []

    def publish() -> None:
        for name, p in model.named_parameters():
            rows = WeightGrid(8, granularity=Granularity.PER_CHANNEL)
            grid = rows if name.startswith("embed") else WeightGrid(8, groups=groups)
            p.data = fake_quantize(masters[name], grid) if name.endswith("weight") else masters[name].clone()

    for _ in range(steps):
        publish()
        model.zero_grad()
        loss = model(INDICES).square().sum()
        losses.append(loss.item())
        loss.backward()
        for name, p in model.named_parameters():
            masters[name] -= 0.1 * p.grad
    return losses


def test_not_in_forward_equals_rounding_the_weight_after_the_step():
    model, stage, _ = prepared({"quantize_groups": 4})
    reference = Model()
    reference.load_state_dict(model.state_dict())
    expected = rounded_after_the_step(reference, 6, groups=4)
    assert train(model, stage, range(6)) == pytest.approx(expected, rel=1e-5)


def test_in_forward_masks_the_gradient_of_clipped_weights():
    grads = {}
    for in_forward in (True, False):
        model, _, _ = prepared({"quantize_weight_in_forward": in_forward})
        model(INDICES).square().sum().backward()
        grads[in_forward] = model.second.weight.grad, model.second.weight.detach()
    grad, weight = grads[True]
    clipped = weight >= 127.5 / 128 * weight.abs().max()
    if not clipped.any():  # the largest magnitude is negative: nothing clips on this grid
        assert torch.equal(grad, grads[False][0])
    assert (grad[clipped] == 0).all()
    assert torch.equal(grad[~clipped], grads[False][0][~clipped])


def test_blend_decays_and_starts_again_at_each_drop():
    model, stage, _ = prepared(
        {"schedule_offset": 1, "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.25}},
        {"start_bits": 5, "target_bits": 4, "quantization_period": 6},
    )
    shares = []
    for step in range(1, 13):
        stage.after_step(step)
        fake_quant = layers.fake_quant_of(model.first)
        assert fake_quant is not None
        shares.append((fake_quant.grid.bits, fake_quant.blend_ratio))
    first = [(5, 1.0), (5, 0.75), (5, 0.5), (5, 0.25), (5, 0.0), (5, 0.0)]
    assert shares == first + [(4, share) for _, share in first]
    stage.after_step(3)
    quantized = fake_quantize(model.first.weight.detach(), WeightGrid(5))
    torch.testing.assert_close(
        layers.quantized_weight(model.first), 0.5 * quantized + 0.5 * model.first.weight.detach()
    )


def test_stochastic_rounding_changes_by_step_and_seed_only():
    def drawn(seed: int, step: int) -> torch.Tensor:
        model, stage, _ = prepared({"rounding": "stochastic"}, {"start_bits": 4, "target_bits": 4}, seed=seed)
        stage.after_step(step)
        return layers.quantized_weight(model.first)

    assert torch.equal(drawn(0, 3), drawn(0, 3))
    assert not torch.equal(drawn(0, 3), drawn(0, 4))
    assert not torch.equal(drawn(0, 3), drawn(1, 3))


def test_learned_scales_start_as_the_paper_says_and_learn():
    model, stage, added = prepared(
        {"learned_scale": True, "granularity": "per_channel"},
        {"start_bits": 8, "target_bits": 3, "quantization_period": 2},
    )
    assert sorted(added) == [f"{name}.weight_step_size" for name in ("embed", "first", "second")]
    assert all(dict(model.named_parameters())[name] is p for name, p in added.items())
    grid = WeightGrid(3, True, True, Granularity.PER_CHANNEL, learned=True)
    assert torch.equal(model.first.weight_step_size, initial_scale(model.first.weight, grid))
    fake_quant = layers.fake_quant_of(model.first)
    assert fake_quant is not None and fake_quant.step_ratio == 3 / 127
    before = {name: p.detach().clone() for name, p in added.items()}
    losses = train(model, stage, range(40))
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(before[name], p) for name, p in added.items())
    assert stage.metrics() == {"mean_bits": 3}


def test_learned_scales_have_the_weights_dtype_and_freeze_with_it():
    torch.manual_seed(0)
    model = Model().bfloat16()
    model.second.weight.requires_grad_(False)
    _, _, added = prepared({"learned_scale": True}, model=model)
    assert sorted(added) == ["embed.weight_step_size", "first.weight_step_size"]
    assert model.first.weight_step_size.dtype is torch.bfloat16
    assert not model.second.weight_step_size.requires_grad


def test_learned_scales_read_the_weight_only_where_it_is_whole():
    torch.manual_seed(0)
    model = Model()
    whole = {id(p): p.data for p in model.parameters()}
    expected = prepared({"learned_scale": True}, model=copy.deepcopy(model))[2]

    @contextlib.contextmanager
    def full(parameters):
        for p in parameters:
            p.data = whole[id(p)]
        yield
        for p in parameters:
            p.data = torch.empty(0)

    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    added = WeightQuantization(resolved(model, {"learned_scale": True}), 0).prepare(model, full)
    assert all(torch.equal(added[name], p) for name, p in expected.items())
    assert model.first.weight.numel() == 0


@pytest.mark.parametrize(
    "shared",
    [
        {"rounding": "stochastic", "quantize_weight_in_forward": True},
        {"learned_scale": True, "granularity": "per_channel"},
        {"fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.1}},
    ],
    ids=["stochastic", "learned", "mixed"],
)
def test_a_resumed_run_ends_bit_equal(shared):
    params = {"start_bits": 8, "target_bits": 4, "quantization_period": 2}
    unbroken, stage, _ = prepared(shared, params)
    expected = train(unbroken, stage, range(12))

    model, stage, _ = prepared(shared, params)
    losses = train(model, stage, range(7))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(stage.state_dict())
    torch.manual_seed(123)
    resumed, stage, _ = prepared(shared, params, model=Model())
    resumed.load_state_dict(weights)
    stage.load_state_dict(state)
    losses += train(resumed, stage, range(7, 12))
    assert losses == expected
    assert all(map(torch.equal, resumed.state_dict().values(), unbroken.state_dict().values()))


def test_detach_gives_the_model_back():
    torch.manual_seed(0)
    model = Model()
    keys, expected = list(model.state_dict()), model(INDICES)
    _, stage, _ = prepared({"learned_scale": True}, model=model)
    assert not torch.equal(model(INDICES), expected)
    stage.detach()
    assert list(model.state_dict()) == keys
    assert type(model.first) is nn.Linear and type(model.embed) is nn.Embedding
    assert torch.equal(model(INDICES), expected)


def test_what_a_grid_cannot_do_is_refused_before_the_model_changes():
    """The config refuses these too; the stage does not rely on it."""
    model = Model()
    technique = resolved(model, {})
    groups = replace(technique, shared=technique.shared.model_copy(update={"quantize_groups": 7}))
    with pytest.raises(ValueError, match="'first': quantize_groups 7 does not divide"):
        WeightQuantization(groups, 0)
    model.embed.sparse = True
    with pytest.raises(ValueError, match=r"weight_quantization of 'embed'.*sparse=False"):
        WeightQuantization(technique, 0)
    assert type(model.first) is nn.Linear and type(model.embed) is nn.Embedding


def test_ternary_weights_have_nothing_to_round_stochastically():
    """A legacy config may say both: stochastic rounding ends where the ladder leaves 3 bits."""
    params = {"start_bits": 3, "target_bits": 2, "quantization_period": 2}
    _, stage, _ = prepared({"rounding": "stochastic"}, params)
    (quantizer, *_) = stage._quantizers.values()
    assert quantizer.fake_quant.grid.stochastic
    stage.after_step(2)
    assert quantizer.fake_quant.grid.bits == 2
    assert not quantizer.fake_quant.grid.stochastic
