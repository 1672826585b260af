"""The table against rounding one group by hand, and what is left of a model afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.sensitivity.formats import format_named, formats_named
from ds_compress.sensitivity.groups import layer_groups
from ds_compress.sensitivity.increase import Metric, increase, reference
from ds_compress.sensitivity.measure import measure
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.quantized import quantized
from tests.unit.sensitivity.models import some_batches
from tests.zoo.mixtures import mixture

FORMATS = formats_named(["int2_g16", "int4_g16", "int8", "nvfp4", "fp8_e4m3"])


def table(model: nn.Module, names: list[str] | None = None, **options: Any) -> Any:
    formats = FORMATS if names is None else formats_named(names)
    return measure(model, some_batches(), formats, layer_groups(model), **options)


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_cell_is_the_divergence_of_a_model_with_that_group_rounded(number: int) -> None:
    model, other = tiny_llama().eval(), tiny_llama().eval()
    group = layer_groups(model)[number]
    found = table(model, ["int4"]).groups[group.name]
    quantized(other, bits=4, modules=tuple(f"^{name}$" for name in group.modules))
    total = weight = 0.0
    for batch in some_batches():
        of = reference(model(**batch), batch, Metric.KL)
        total += increase(other(**batch), batch, of)
        weight += of.weight
    assert found.increase == {"int4": total / weight}
    assert total > 0
    assert found.modules == group.modules and found.parameters == group.parameters


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, tiny_gpt2, lambda: mixture("mixtral")])
def test_a_model_is_left_as_it_was(make: Any) -> None:
    model = make()
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    requires = [p.requires_grad for p in model.parameters()]
    table(model)
    assert [type(m) for m in model.modules()] == classes
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == requires
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_more_bits_hurt_less_and_every_format_is_there() -> None:
    found = table(tiny_llama(hidden=64, intermediate=128), ["int2", "int4", "int8", "nvfp4"])
    assert len(found.groups) == 8 and found.metric is Metric.KL and found.examples == 10
    assert found.predictions == sum(int(batch["attention_mask"].sum()) for batch in some_batches())
    for group in found.groups.values():
        assert set(group.increase) == {"int2", "int4", "int8", "nvfp4"}
        assert group.increase["int2"] > 4 * group.increase["int4"] > 16 * group.increase["int8"]


def test_models_without_classes_have_a_relative_error() -> None:
    found = table(tiny_bert(head="Model"), ["int4"])
    assert found.metric is Metric.RELATIVE_ERROR and found.predictions == 10
    assert found.groups["pooler.dense"].increase["int4"] == 0  # last_hidden_state does not see it
    assert all(g.increase["int4"] > 0 for name, g in found.groups.items() if name != "pooler.dense")


def test_batch_size_changes_only_the_rounding_of_floats() -> None:
    model = tiny_llama()
    one, two = (measure(model, some_batches(size=size), FORMATS[:2], layer_groups(model)) for size in (1, 5))
    for name, group in one.groups.items():
        assert group.increase == pytest.approx(two.groups[name].increase, rel=0.02)


def test_refusals() -> None:
    model = tiny_llama()
    groups = layer_groups(model)
    with pytest.raises(ValueError, match="no batch"):
        measure(model, [], FORMATS, groups)
    odd = tiny_llama(hidden=24, intermediate=24, heads=2, key_value_heads=1)
    with pytest.raises(ValueError, match="none of the formats mxfp4 fits"):
        measure(odd, some_batches(), [format_named("mxfp4")], layer_groups(odd))
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite on the calibration set"):
        measure(model, some_batches(), FORMATS, groups)


def test_a_group_that_overflows_is_null() -> None:
    model = tiny_llama()
    forward, calls = model.forward, 0

    def broken(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = forward(**inputs)
        if calls == 3:  # the one for the metric, the reference, then the first group
            found.logits[0, 0, 0] = float("inf")
        return found

    model.forward = broken
    found = measure(model, some_batches(), FORMATS[:1], layer_groups(model))
    first, *others = found.groups.values()
    assert first.increase == {"int2_g16": None}
    assert all(group.increase["int2_g16"] > 0 for group in others)


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    table(tiny_llama(), ["int4", "int8"], progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, 3 * 16 + 1)) and {t for _, t in seen} == {48}
