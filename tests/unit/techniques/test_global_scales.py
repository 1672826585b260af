"""The global scales of nvfp4: who shares one, what they follow, and faults."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.config.resolve.resolver import resolve
from ds_compress.sharding.fragment import full_fragment, plain_fragments
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.global_scales import GlobalScales, _of_matrices, fused_families
from tests.models import tiny_llama
from tests.zoo.mixtures import mixture


def full(parameters: Any) -> Any:
    return contextlib.nullcontext(parameters)


def scales_of(model: nn.Module, follow: bool = True) -> GlobalScales:
    plan = resolve(model, {"scheme": "NVFP4A16"})
    found = GlobalScales(plan.techniques["weight_quantization"].targets, follow)
    found.measure(full)
    return found


def test_families_are_what_servers_fuse() -> None:
    names = [
        "a.q_proj",
        "a.k_proj",
        "b.q_proj",
        "a.v_proj",
        "a.o_proj",
        "m.gate_proj",
        "m.up_proj",
        "m.down_proj",
    ]
    assert fused_families(names) == [
        ["a.q_proj", "a.k_proj", "a.v_proj"],
        ["b.q_proj"],
        ["m.gate_proj", "m.up_proj"],
        ["a.o_proj"],
        ["m.down_proj"],
    ]


def test_a_scale_is_that_of_the_largest_of_its_family_and_follows_the_masters() -> None:
    model = tiny_llama(hidden=64, intermediate=64)
    scales = scales_of(model)
    scales.attach(Shards.of_model(model))
    attention = model.model.layers[0].self_attn
    for factor in (1.0, 3.0):
        with torch.no_grad():
            attention.k_proj.weight.mul_(factor)
        scales.update()
        largest = max(
            float(p.weight.abs().max()) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        expected = torch.tensor(448.0 * 6) / torch.tensor(largest)
        for part in "qkv":
            found = scales.of(f"model.layers.0.self_attn.{part}_proj.weight")
            torch.testing.assert_close(found, expected.reshape(1), rtol=1e-6, atol=0)


def test_fixed_ones_stay_and_state_comes_back() -> None:
    model = tiny_llama(hidden=64, intermediate=64)
    fixed, name = scales_of(model, follow=False), "model.layers.1.mlp.down_proj.weight"
    fixed.attach(Shards.of_model(model))
    before, state = fixed.of(name).clone(), fixed.state_dict()
    with torch.no_grad():
        model.get_parameter(name).mul_(5)
    fixed.update()
    assert torch.equal(fixed.of(name), before)
    other = scales_of(model)
    assert not torch.equal(other.of(name), before)
    other.load_state_dict(state)
    assert torch.equal(other.of(name), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_fault_anywhere_in_the_family_is_a_fault_of_all(bad: float) -> None:
    model = tiny_llama(hidden=64, intermediate=64)
    scales = scales_of(model)

    fragments = {fragment.name: fragment for fragment in plain_fragments(model)}

    class Processes:
        """Others may hold a fault, too."""

        def reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
            assert not tensor.isnan().any()
            return tensor

    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 3] = bad
    processes: Any = Processes()
    processes.fragments = fragments
    scales.attach(processes)
    scales.update()
    assert scales.of("model.layers.0.mlp.gate_proj.weight").isnan()
    assert scales.of("model.layers.0.mlp.down_proj.weight").isfinite()


def test_fragments_that_begin_and_end_within_the_matrix_of_an_expert() -> None:
    model = mixture("mixtral")
    plan = resolve(
        model,
        {
            "weight_quantization": {
                "shared_parameters": {"enabled": True},
                "different_groups": {"g": {"params": {"format": "nvfp4"}, "modules": ["gate_up_proj"]}},
            }
        },
    )
    (target, *_) = plan.techniques["weight_quantization"].targets
    flat = target.param.detach().flatten()
    size = flat.numel() // 4
    expected = flat.view(4, size).abs().amax(1)
    for cuts in (
        [0, 7, 3 * size + 5, 4 * size],
        [0, size, 2 * size, 4 * size],
        [0, 4 * size],
        [0, 3, 9, 4 * size],
    ):
        together = torch.zeros(4)
        for first, end in itertools.pairwise(cuts):
            whole = full_fragment(target.param_name, target.param, target.param, 0)
            fragment = replace(whole, start=first, numel=end - first, offset=first)
            together = torch.maximum(together, _of_matrices(fragment, target))
        assert torch.equal(together, expected)
