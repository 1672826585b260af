"""Mixtures of experts are found from what they compute with, in every architecture and in one without a rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_compress.modelinfo.experts import fused_experts, moe_blocks, router_modules
from ds_compress.modelinfo.inventory import entries_of
from ds_compress.modelinfo.kinds import ModuleKind
from tests.models import tiny_bert, tiny_llama
from tests.zoo.mixtures import ARCHITECTURES, mixture, tokens

NAMES = [*ARCHITECTURES, "stranger"]


@pytest.mark.parametrize("name", NAMES)
def test_every_mixture_is_found_with_its_routers(name: str) -> None:
    model = mixture(name)
    blocks = list(moe_blocks(model))
    assert blocks
    for block in blocks:
        rows = {model.get_submodule(router).get_parameter("weight").shape[0] for router in block.routers}
        assert block.experts in rows <= {block.experts, 1}
        assert block.name and block.experts_name.startswith(block.name)
    with torch.no_grad():
        model(input_ids=tokens())


@pytest.mark.parametrize("name", NAMES)
def test_the_router_decides_which_experts_see_a_token(name: str) -> None:
    model = mixture(name)
    block = next(iter(moe_blocks(model)))
    router = next(
        module
        for module in map(model.get_submodule, block.routers)
        if module.get_parameter("weight").shape[0] == block.experts
    )
    with torch.no_grad():
        before = _output(model)
        router.get_parameter("weight").neg_()
        assert not torch.allclose(before, _output(model))


def _output(model: nn.Module) -> torch.Tensor:
    found = model(input_ids=tokens())
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_layouts(name: str) -> None:
    model = mixture(name)
    for block in moe_blocks(model):
        experts, fused = model.get_submodule(block.experts_name), block.fused
        assert fused is not None
        up, down = (experts.get_parameter(parameter) for parameter in fused.matrices)
        inputs = 1 if fused.transposed else 2
        assert up.shape[inputs] == fused.hidden and down.shape[inputs] == fused.intermediate
        assert fused.transposed == (name in ("gpt_oss", "llama4"))
        assert fused.interleaved == (name == "gpt_oss")
        assert fused.biases == (("gate_up_proj_bias", "down_proj_bias") if name == "gpt_oss" else ())


def test_a_model_without_experts_has_none() -> None:
    for model in (tiny_llama(), tiny_bert(), nn.Sequential(nn.Linear(3, 4))):
        assert not list(moe_blocks(model)) and not router_modules(model)


def test_three_dimensional_parameters_of_another_kind_are_no_experts() -> None:
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.zeros(4, 10, 8))
    module.down_proj = nn.Parameter(torch.zeros(4, 8, 6))
    assert fused_experts(module) is None


def test_experts_without_a_gate_and_square_are_read_as_they_say() -> None:
    module = nn.Module()
    module.up_proj, module.down_proj = (nn.Parameter(torch.zeros(4, 8, 8)) for _ in range(2))
    found = fused_experts(module)
    assert found is not None and not found.transposed and not found.has_gate
    module.is_transposed = True  # type: ignore[assignment]
    found = fused_experts(module)
    assert found is not None and found.transposed


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_each_matrix_of_a_stack_has_an_entry(name: str) -> None:
    model = mixture(name)
    entries = {entry.name: entry for entry in entries_of(model)}
    parameters = dict(model.named_parameters())
    for block in moe_blocks(model):
        assert block.fused is not None
        for matrix in block.fused.matrices:
            entry = entries[f"{block.experts_name}.{matrix}"]
            assert entry.weight is parameters[entry.name] and entry.is_layer
            assert entry.kind is not None and entry.kind.is_experts
            assert entry.is_reached_by("experts$") and entry.is_reached_by(f"{matrix}$")
        for router in block.routers:
            assert entries[router].is_router and not entries[router].is_layer
            assert entries[router].kind in (ModuleKind.ROUTER, ModuleKind.LINEAR)
