"""The chosen block against all mixes of a small model, the predicted bytes against files, and refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.config.report.size_estimate import stored, total
from ds_compress.errors import ConfigError
from ds_compress.estimate.compute import compute
from ds_compress.estimate.devices import device
from ds_compress.estimate.products import work_of
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.sensitivity.formats import formats_named
from ds_compress.sensitivity.goal import EffectiveBits, Latency, StoredBytes
from ds_compress.sensitivity.groups import BLOCK, layer_groups
from ds_compress.sensitivity.increase import Metric
from ds_compress.sensitivity.measure import measure
from ds_compress.sensitivity.search import KEEP, search
from ds_compress.sensitivity.table import GroupSensitivity, Sensitivity
from ds_compress.techniques import TECHNIQUES
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.unit.sensitivity.models import some_batches
from tests.zoo.mixtures import mixture

FORMATS = ["int2_g16", "int4_g16", "int8", "nvfp4"]


def table(model: nn.Module, names: list[str] = FORMATS) -> Sensitivity:
    return measure(model, some_batches(), formats_named(names), layer_groups(model))


def made_up(model: nn.Module, seed: int = 0) -> Sensitivity:
    """With random numbers, which real tables of tiny models hardly have."""
    random = torch.Generator().manual_seed(seed)
    groups = {
        group.name: GroupSensitivity(
            group.modules,
            group.parameters,
            {name: float(torch.rand(1, generator=random)) for name in ("int3_g16", "int8", "mxfp4")},
        )
        for group in layer_groups(model)
    }
    return Sensitivity(type(model).__name__, Metric.KL, ("int3_g16", "int8", "mxfp4"), groups, 1, 1)


def small_llama() -> nn.Module:
    return tiny_llama(layers=1, hidden=64, intermediate=64)


@pytest.mark.parametrize("bits", [5.5, 6.3, 20.0])
def test_no_mix_of_a_small_model_is_better(bits: float) -> None:
    model = small_llama()
    measured = made_up(model)
    found = search(model, {}, measured, EffectiveBits(bits))
    assert found.predicted.effective_bits <= bits
    weights = {name: group.parameters for name, group in measured.groups.items()}
    own_bits = {KEEP: 32.0}
    for format in measured.formats:
        one = search(model, {}, only(measured, format), EffectiveBits(31))
        own_bits[format] = one.uniform[format].effective_bits
    costs = []
    for mix in itertools.product(*([KEEP, *measured.formats] for _ in weights)):
        size = sum(own_bits[format] * weights[name] for name, format in zip(weights, mix, strict=True))
        if size <= bits * sum(weights.values()):
            pairs = zip(measured.groups.values(), mix, strict=True)
            costs.append(sum(0 if format == KEEP else group.increase[format] for group, format in pairs))  # type: ignore[misc]
    # Scales of tall and of wide layers differ a little from the mean that `own_bits` has.
    assert found.predicted.increase <= 1.02 * min(costs) + 1e-9


def only(measured: Sensitivity, format: str) -> Sensitivity:
    groups = {
        name: replace(group, increase={format: group.increase[format]})
        for name, group in measured.groups.items()
    }
    return replace(measured, formats=(format,), groups=groups)


def test_the_block_does_what_was_chosen_and_layers_of_one_group_are_alike() -> None:
    model = tiny_llama(hidden=64, intermediate=128)
    measured = made_up(model)
    found = search(model, {"seed": 5}, measured, EffectiveBits(5))
    assert found.block["seed"] == 5 and len(set(found.formats.values())) > 1
    plan = ds_compress.plan(model, found.block)
    groups = {target.module_name: target.group for target in plan.techniques[BLOCK].targets}
    for name, format in found.formats.items():
        members = {groups.get(module, KEEP) for module in measured.groups[name].modules}
        assert members == {format}
    assert total(stored(plan).values()).after < found.predicted.bytes


def test_a_mix_is_better_than_the_uniform_format_of_its_size() -> None:
    model = tiny_llama(hidden=64, intermediate=128)
    measured = table(model, ["int2_g64", "int3_g64", "int4_g64", "int6_g64", "int8"])
    uniform = search(model, {}, measured, EffectiveBits(30)).uniform
    for format in ("int3_g64", "int4_g64", "int6_g64"):
        found = search(model, {}, measured, EffectiveBits(uniform[format].effective_bits))
        assert found.predicted.bytes <= uniform[format].bytes
        assert found.predicted.increase < uniform[format].increase, format


def time_of(model: nn.Module, block: dict[str, Any], goal: Latency) -> float:
    """As `ds_compress plan --tokens --device` says of the config that was written."""
    plan = ds_compress.plan(model, block)
    work = work_of(model, plan)
    found = compute(plan, work, RunLayout(), goal.tokens, goal.tokens, device=goal.device)
    return found.latencies[-1].after


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("peaks", ["bf16=1e6,bandwidth=1000", "bf16=0.001,int8=0.002,bandwidth=1e6"])
def test_a_latency_is_kept_to(peaks: str, tokens: int) -> None:
    """Where memory is what is slow, and where products are, which weights in fewer bits make no faster."""
    model = tiny_llama(hidden=64, intermediate=128)
    measured = made_up(model)
    slow = Latency(1.0, device(peaks), tokens)
    plain, least = time_of(model, {}, slow), time_of(model, all_in(model, measured, "mxfp4"), slow)
    if "0.001" in peaks:
        assert least == plain
        with pytest.raises(ValueError, match="the smallest that these formats reach is"):
            search(model, {}, measured, replace(slow, seconds=0.9 * plain))
        return
    goal = replace(slow, seconds=(plain + least) / 2)
    found = search(model, {}, measured, goal)
    assert found.predicted.seconds is not None and least < found.predicted.seconds <= goal.seconds < plain
    assert found.predicted.seconds == pytest.approx(time_of(model, found.block, goal), rel=1e-3)
    assert len(set(found.formats.values())) > 1


def all_in(
    model: nn.Module, measured: Sensitivity, format: str, block: dict[str, Any] | None = None
) -> dict[str, Any]:
    bits = search(model, block or {}, measured, EffectiveBits(30)).uniform[format].effective_bits
    return search(model, block or {}, only(measured, format), EffectiveBits(bits)).block


def test_a_latency_counts_inputs_that_another_block_quantizes() -> None:
    model = tiny_llama(hidden=64, intermediate=128)
    inputs = {
        "activation_quantization": {
            "shared_parameters": {"enabled": True},
            "different_groups": {"g": {"params": {"bits": 8}, "modules": ["mlp"]}},
        }
    }
    goal = Latency(1.0, device("bf16=0.001,int8=0.004,bandwidth=1e6"), 512)
    measured = made_up(model)
    plain = time_of(model, inputs, goal)
    least = time_of(model, all_in(model, measured, "int8", inputs), goal)
    within = replace(goal, seconds=(plain + least) / 2)
    found = search(model, inputs, only(measured, "int8"), within)
    assert found.predicted.seconds == pytest.approx(time_of(model, found.block, within), rel=1e-3)
    assert all(format == KEEP for name, format in found.formats.items() if "mlp" not in name)


@pytest.mark.parametrize(
    ("make", "export_to", "formats"),
    [
        (
            lambda: tiny_llama(hidden=64, intermediate=128),
            "compressed-tensors",
            ["int3_g64", "int4_g16", "int8"],
        ),
        (
            lambda: tiny_llama(hidden=64, intermediate=128),
            "compressed-tensors",
            ["nvfp4", "mxfp4", "fp8_e4m3"],
        ),
        (lambda: tiny_bert(hidden=64), "torch", ["int2_g64", "int5_g16", "int8"]),
        (lambda: tiny_bert(hidden=64), "compressed-tensors", ["int4_g16", "nvfp4", "int8"]),
        (tiny_gpt2, "torch", ["int3_g16", "int8"]),
    ],
)
def test_files_are_not_larger_than_the_goal(
    tmp_path: Path, make: Any, export_to: str, formats: list[str]
) -> None:
    model = make()
    measured = table(model, formats)
    uniform = search(model, {"export_to": export_to}, measured, EffectiveBits(31)).uniform
    sizes = [predicted.bytes for predicted in uniform.values()]
    goal = StoredBytes(round(min(sizes) + 0.6 * (max(sizes) - min(sizes))))
    found = search(model, {"export_to": export_to}, measured, goal)
    for name, technique in ds_compress.plan(model, found.block).techniques.items():
        TECHNIQUES[name](technique, 0).prepare(model)
    report = ds_compress.export(model, tmp_path / "out", export_to, check=False)
    assert report.bytes <= found.predicted.bytes <= goal.bytes
    # Tiny files are mostly headers and small tensors, of which a bound is kept.
    assert report.bytes > 0.6 * found.predicted.bytes


def test_experts_get_formats() -> None:
    model = mixture("mixtral", hidden_size=32, intermediate_size=32)
    measured = table(model, ["int4_g16", "int8"])
    found = search(model, {}, measured, EffectiveBits(8))
    assert any("experts.gate_up_proj" in name and format != KEEP for name, format in found.formats.items())
    assert found.block["export_to"] == "torch"


def test_goals_that_cannot_be_met_or_need_nothing() -> None:
    model = small_llama()
    measured = made_up(model)
    with pytest.raises(ValueError, match=r"--effective-bits 2: the smallest .* is (\d\.\d+) bits") as caught:
        search(model, {}, measured, EffectiveBits(2))
    smallest = float(str(caught.value).rpartition("is ")[2].split()[0])
    found = search(model, {}, measured, EffectiveBits(smallest + 0.001))
    assert found.predicted.effective_bits == pytest.approx(smallest, abs=0.01)
    with pytest.raises(ValueError, match=r"--size 0.001MB: the smallest .* MB, of which .* not in the table"):
        search(model, {}, measured, StoredBytes(1000))
    with pytest.raises(ValueError, match="nothing to search"):
        search(model, {}, measured, EffectiveBits(33))


def test_formats_that_are_not_finite_are_not_chosen() -> None:
    model = small_llama()
    measured = made_up(model)
    groups = {
        name: replace(group, increase={**group.increase, "int3_g16": None})
        for name, group in measured.groups.items()
    }
    found = search(model, {}, replace(measured, groups=groups), EffectiveBits(6))
    assert "int3_g16" not in found.formats.values() and "int3_g16" not in found.uniform


def test_tables_of_other_models() -> None:
    measured = made_up(tiny_llama())
    with pytest.raises(ValueError, match="another model: this one has no layer model"):
        search(tiny_bert(), {}, measured, EffectiveBits(5))
    with pytest.raises(ValueError, match=r"another model: model\.layers\.0\.self_attn.* weights there"):
        search(tiny_llama(hidden=64), {}, measured, EffectiveBits(5))


@pytest.mark.parametrize(
    "block",
    [
        {"scheme": "W4A16"},
        {"recipe": "w4a16"},
        {
            BLOCK: {
                "shared_parameters": {"enabled": True},
                "different_groups": {"g": {"params": {"target_bits": 8}}},
            }
        },
    ],
)
def test_blocks_that_quantize_themselves(block: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="quantizes weights already"):
        search(tiny_llama(), block, made_up(tiny_llama()), EffectiveBits(5))


def test_other_blocks_stay_and_count() -> None:
    model = tiny_llama(hidden=64, intermediate=128)
    groups = {"g": {"params": {}, "modules": ["mlp"]}}
    block = {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "dense_ratio": 0.2},
            "different_groups": groups,
        },
        "export_to": "torch",
    }
    measured = table(model, ["int3_g64", "int4_g64", "int6_g64"])
    pruned, plain = (search(model, b, measured, EffectiveBits(4)) for b in (block, {"export_to": "torch"}))
    assert pruned.block["sparse_pruning"] == block["sparse_pruning"]
    assert pruned.predicted.increase < plain.predicted.increase, "what is pruned leaves more bytes"


def test_an_export_that_cannot_store_the_mix_is_refused() -> None:
    model = tiny_gpt2()
    measured = table(model, ["int4_g16", "int8"])
    with pytest.raises(ConfigError, match=r"quantizes nn\.Linear only"):
        search(model, {"export_to": "compressed-tensors"}, measured, EffectiveBits(8))
