"""Which modules are compressible: decided by what they compute, not by what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from ds_compress.modelinfo.kinds import ModuleKind, is_layer, kind_of, shape_of


class Renamed(nn.Linear):
    """Inherits forward."""


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class PaddedConv(nn.Conv2d):
    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return super()._conv_forward(nn.functional.pad(input, (1, 1, 1, 1)), weight, bias)


class Swapped(Scaled):
    """Like a class of ours: computes something else, in the place of a plain Linear."""

    _ds_compress_base_class = nn.Linear


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(4, 3), ModuleKind.LINEAR),
        (Renamed(4, 3), ModuleKind.LINEAR),
        (Swapped(4, 3), ModuleKind.LINEAR),
        (Conv1D(3, 4), ModuleKind.CONV1D),
        (nn.Conv2d(4, 6, 3, groups=2), ModuleKind.CONV2D),
        (nn.Embedding(5, 4), ModuleKind.EMBEDDING),
    ],
)
def test_supported(module: nn.Module, kind: ModuleKind) -> None:
    assert kind_of(module) is kind


@pytest.mark.parametrize(
    "module",
    [
        Scaled(4, 3),
        PaddedConv(4, 3, 3),
        nn.LazyLinear(3),
        nn.MultiheadAttention(4, 2).out_proj,
        parametrizations.weight_norm(nn.Linear(4, 3)),
        nn.Conv3d(4, 3, 3),
        nn.Bilinear(2, 2, 2),
        nn.LayerNorm(4),
        nn.LSTM(4, 3),
        nn.Identity(),
    ],
)
def test_unsupported(module: nn.Module) -> None:
    assert kind_of(module) is None


def test_a_forward_replaced_on_the_instance_would_bypass_a_swapped_class() -> None:
    module = nn.Linear(4, 3)
    module.forward = lambda input: input  # type: ignore[method-assign]
    assert kind_of(module) is None


def test_layers_by_name_are_layers_even_when_unsupported() -> None:
    assert is_layer(Scaled(4, 3)) and is_layer(Conv1D(3, 4)) and is_layer(PaddedConv(4, 3, 3))
    assert not is_layer(nn.Embedding(5, 4)) and not is_layer(nn.Conv3d(4, 3, 3))


def test_the_full_shape_of_a_weight_that_is_held_in_part() -> None:
    weight = nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size([7, 5])  # type: ignore[attr-defined]
    assert shape_of(weight) == (7, 5)
    assert shape_of(nn.Parameter(torch.zeros(2, 3))) == (2, 3)
