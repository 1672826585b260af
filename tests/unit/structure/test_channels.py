"""Channels: what is cut together in convolutional networks, and what is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.structure.related import stated_group
from tests.zoo.masked import kept_units, masked_copy
from tests.zoo.models import ZOO, ResidualCNN, logits_of

pytest.importorskip("torch_pruning")


class InvertedResidual(nn.Module):
    """MobileNet: widen, depthwise, squeeze and excite, narrow; with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.widen, self.norm1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.narrow, self.norm3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = F.relu6(self.norm2(self.depthwise(F.relu6(self.norm1(self.widen(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        logits: torch.Tensor = self.classifier((x + self.norm3(self.narrow(y))).mean((2, 3)))
        return logits


class Dense(nn.Module):
    """DenseNet and U-Net: concatenations, a skip around a pooling, PReLU, a transposed path by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 6, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(6), nn.PReLU(6)
        self.down, self.up = nn.Conv2d(17, 10, 3, padding=1), nn.Conv2d(27, 4, 1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, self.first(x)], 1)
        x = torch.cat([x, self.act(self.norm(self.second(x)))], 1)
        y = F.interpolate(torch.relu(self.down(F.max_pool2d(x, 2))), scale_factor=2)
        out: torch.Tensor = self.out(torch.relu(self.up(torch.cat([x, y], 1))))
        return out


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], inputs: int = 8) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Conv2d(3, 8, 3), between, nn.Conv2d(inputs, 4, 3)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.second(self.between(self.first(x))).mean((2, 3)))
        return logits


def _output(model: nn.Module, size: int = 32) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(
            torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
        )
    return output


@pytest.mark.parametrize(("build", "groups"), [(InvertedResidual, 3), (Dense, 4)])
def test_a_cut_network_computes_what_the_masked_one_does(build: Callable[[], nn.Module], groups: int) -> None:
    torch.manual_seed(0)
    model = build().eval()
    found = find_groups(model, GroupKind.CHANNEL)
    assert len(found.groups) == groups
    kept = kept_units(found.groups)
    masked = masked_copy(model, found.groups, kept)
    assert not torch.allclose(_output(masked), _output(model))
    apply_pruning(model, PruningPlan.of(found.groups, kept))
    torch.testing.assert_close(_output(model), _output(masked), rtol=1e-5, atol=1e-5)


def test_channels_of_the_output_stay() -> None:
    found = find_groups(Dense(), GroupKind.CHANNEL)
    assert [refusal.module for refusal in found.unsupported] == ["out"]
    assert "output of the network" in found.unsupported[0].reason


def test_depthwise_convolutions_shrink_with_the_layer_before() -> None:
    model = InvertedResidual()
    found = find_groups(model, GroupKind.CHANNEL)
    widen = next(group for group in found.groups if group.name == "widen")
    apply_pruning(model, PruningPlan.of([widen], {"widen": torch.arange(10)}))
    assert (model.depthwise.groups, model.depthwise.in_channels, model.depthwise.out_channels) == (10, 10, 10)
    assert model.norm1.num_features == model.excite.out_channels == model.squeeze.in_channels == 10


def test_a_linear_behind_a_flattened_map_loses_all_positions_of_a_channel() -> None:
    found = find_groups(ResidualCNN(), GroupKind.CHANNEL)
    head = next(group for group in found.groups if group.name == "head")
    reader = next(coupled for coupled in head.slices if coupled.tensor == "classifier.weight")
    assert reader.index.tolist() == [list(range(16 * c, 16 * (c + 1))) for c in range(16)]


def test_a_residual_sum_is_one_structure_with_its_projection() -> None:
    found = find_groups(ResidualCNN(), GroupKind.CHANNEL)
    second = next(s for s in found.groups if s.name == "second.conv2")
    assert {"second.conv2", "second.shortcut", "second.norm2", "head"} <= set(second.modules)
    assert second.observed == "head"
    masked = {coupled.tensor: coupled.masked for coupled in second.slices}
    assert masked["second.norm2.weight"] and masked["second.norm2.bias"]
    assert not masked["second.norm2.running_mean"] and not masked["second.norm2.running_var"]


@pytest.mark.parametrize(
    ("between", "inputs", "reason"),
    [
        (nn.GroupNorm(4, 8), 8, "GroupNorm"),
        (nn.Softmax(1), 8, "mixes channels"),
        (nn.PixelShuffle(2), 2, ""),
        (nn.Conv2d(8, 8, 3, groups=2), 8, "2 groups"),
        (nn.ChannelShuffle(2), 8, ""),
        (nn.ConvTranspose2d(8, 8, 3), 8, "ConvTranspose2d"),
    ],
    ids=["group norm", "softmax", "pixel shuffle", "groups", "channel shuffle", "transposed"],
)
def test_what_mixes_channels_is_refused(between: Any, inputs: int, reason: str) -> None:
    found = find_groups(Between(between, inputs), GroupKind.CHANNEL)
    refused = {refusal.module: refusal.reason for refusal in found.unsupported}
    assert "first" not in [group.name for group in found.groups]
    assert reason in refused["first"]
    # What has nothing to do with it is still found.
    assert "second" in [group.name for group in found.groups]


def test_partitioned_weights_are_refused_with_the_way_out() -> None:
    model = ResidualCNN()
    model.stem.weight.ds_shape = model.stem.weight.shape  # type: ignore[attr-defined]
    model.stem.weight.data = torch.empty(0)
    found = find_groups(model, GroupKind.CHANNEL)
    assert not found.groups
    assert "related_modules" in found.unsupported[0].reason


def test_a_model_that_takes_no_usual_image_says_what_to_do() -> None:
    class Odd(Between):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[2] == 31
            return super().forward(x)

    found = find_groups(Odd(nn.Identity()), GroupKind.CHANNEL)
    assert "dummy_inputs" in found.unsupported[0].reason
    found = find_groups(
        Odd(nn.Identity()), GroupKind.CHANNEL, example_inputs={"x": torch.randn(1, 3, 31, 31)}
    )
    assert [group.name for group in found.groups] == ["first", "second"]


def test_finding_changes_nothing() -> None:
    model = ZOO["resnet"]()
    before = copy.deepcopy(model.state_dict())
    training = [module.training for module in model.modules()]
    find_groups(model, GroupKind.CHANNEL)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert training == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'ds_compress\[prune\]'"):
        find_groups(ResidualCNN(), GroupKind.CHANNEL)
    assert not find_groups(nn.Linear(2, 2), GroupKind.CHANNEL).groups


def test_stated_channels_with_a_normalization() -> None:
    torch.manual_seed(0)
    model = ZOO["cnn"]()
    stated = stated_group(model, GroupKind.CHANNEL, ["first.conv1"], ["first.norm1", "first.conv2"])
    kept = kept_units([stated])
    masked = masked_copy(model, [stated], kept)
    apply_pruning(model, PruningPlan.of([stated], kept))
    torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=1e-5, atol=1e-5)
