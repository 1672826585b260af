"""Layer reduction finds, cuts and fills the layers of every family, and what it made loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ds_compress import ConfigError, parse_config
from ds_compress.engine.zero.parameters import copy_parameters
from ds_compress.modelinfo.layers import find_layers
from ds_compress.techniques.layer_reduction import chosen_layers, reduce_layers, uniform_map

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
}
FAMILIES: dict[str, tuple[Any, str]] = {
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
        "bert.encoder.layer",
    ),
    "roberta": (
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL)),
        "roberta.encoder.layer",
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=50, n_positions=32)
        ),
        "transformer.h",
    ),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1)),
        "model.layers",
    ),
    "qwen3": (
        lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **SMALL, num_key_value_heads=1, head_dim=8, layer_types=["full_attention"] * 4
            )
        ),
        "model.layers",
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=8, patch_size=4
            )
        ),
        "vit.layers",
    ),
}


def build(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[family][0]()


def reduction(**block: Any) -> Any:
    return parse_config({"layer_reduction": {"enabled": True, **block}})


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_every_family(family: str) -> None:
    name, layers = find_layers(build(family))
    assert name.endswith(FAMILIES[family][1])
    assert len(layers) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_equals_its_layers_and_loads_again(family: str, tmp_path: Path) -> None:
    model, original = build(family).eval(), build(family).eval()
    removed = reduce_layers(model, reduction(teacher_layer=[0, 3]), None, copy_parameters)
    per_layer = len(list(find_layers(original)[1][1].parameters()))
    assert len(removed) == 2 * per_layer
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    # The plain definition: the original with its two middle layers doing nothing at all.
    for index in (1, 2):
        find_layers(original)[1][index].forward = lambda hidden, *a, **k: hidden
    inputs = (
        {"pixel_values": torch.randn(2, 3, 8, 8)}
        if family == "vit"
        else {"input_ids": torch.arange(14).view(2, 7)}
    )
    with torch.no_grad():
        expected = original(
            **inputs, **({"use_cache": False} if family in ("gpt2", "llama", "qwen3") else {})
        ).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        torch.testing.assert_close(loaded(**inputs).logits, expected)


def test_a_smaller_student_is_filled_from_the_teacher() -> None:
    teacher, student = build("bert", seed=1), build("bert", seed=2)
    reduce_layers(student, reduction(keep_number_layer=2), teacher, copy_parameters)
    expected = build("bert", seed=1)
    reduce_layers(expected, reduction(teacher_layer=[1, 3]), None, copy_parameters)
    for (name, p), (_, q) in zip(student.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_layers_may_repeat_when_there_is_a_teacher() -> None:
    teacher, student = build("bert", seed=1), build("bert", seed=2)
    reduce_layers(student, reduction(teacher_layer=[2, 0, 2]), teacher, copy_parameters)
    weights = [layer.output.dense.weight for layer in student.bert.encoder.layer]
    wanted = [teacher.bert.encoder.layer[index].output.dense.weight for index in (2, 0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(weights, wanted, strict=True))
    assert weights[0] is not weights[2]


def test_only_the_named_other_modules_are_copied() -> None:
    teacher, student = build("bert", seed=1), build("bert", seed=2)
    block = reduction(teacher_layer=[0], other_module_name=["bert.pooler"])
    reduce_layers(student, block, teacher, copy_parameters)
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"teacher_layer": [0, 4]}, "layers 0 to 3"),
        ({"keep_number_layer": 9}, "layers 0 to 3"),
        ({"teacher_layer": [2, 1]}, "increasing"),
        (
            {"teacher_layer": [0], "module_name_prefix": "bert.encoder.layers"},
            r"did you mean 'bert\.encoder\.layer'",
        ),
    ],
)
def test_impossible_cuts_say_what_to_change(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reduce_layers(build("bert"), reduction(**block), None, copy_parameters)


def test_a_teacher_of_another_width_is_refused() -> None:
    teacher = transformers.BertForSequenceClassification(
        transformers.BertConfig(**(SMALL | {"hidden_size": 32}))
    )
    with pytest.raises(ConfigError, match="same hidden size"):
        reduce_layers(build("bert"), reduction(teacher_layer=[0, 1]), teacher, copy_parameters)


def test_a_misspelt_other_module_is_named() -> None:
    block = reduction(teacher_layer=[0], other_module_name=["bert.poler"])
    with pytest.raises(ConfigError, match=r"did you mean 'bert\.pooler'"):
        reduce_layers(build("bert"), block, build("bert"), copy_parameters)


def test_the_depths_must_fit_together() -> None:
    student = transformers.BertForSequenceClassification(
        transformers.BertConfig(**(SMALL | {"num_hidden_layers": 3}))
    )
    with pytest.raises(ConfigError, match="a model with 2 layers"):
        reduce_layers(student, reduction(teacher_layer=[0, 1]), build("bert"), copy_parameters)


def test_without_a_config_the_longest_stack_is_the_one() -> None:
    model = nn.Module()
    model.short = nn.ModuleList([nn.Linear(2, 2)])
    model.long = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    assert find_layers(model)[0] == "long"
    model.rival = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    with pytest.raises(ConfigError, match="long, rival"):
        find_layers(model)


def test_uniform_maps_end_at_the_last_layer() -> None:
    assert uniform_map(3, 6) == (1, 3, 5)
    assert uniform_map(2, 6) == (2, 5)
    assert uniform_map(4, 6) == (0, 2, 3, 5)
    assert chosen_layers(reduction(keep_number_layer=6).layer_reduction, 6) == tuple(range(6))
