"""`scheme`: one word for both quantization blocks."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import parse_config
from ds_compress.errors import ConfigError
from ds_compress.quant.schemes import SCHEMES
from tests.models import tiny_bert, tiny_llama


def problems_of(block: dict[str, Any]) -> list[Any]:
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    return caught.value.problems


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_makes_what_its_table_says(name: str) -> None:
    scheme = SCHEMES[name]
    for written in (name, name.lower()):
        config = parse_config({"scheme": written})
        for block, spec in (
            (config.weight_quantization, scheme.weights),
            (config.activation_quantization, scheme.inputs),
        ):
            if spec is None:
                assert block is None
                continue
            assert block is not None and block.is_enabled
            (group,) = block.different_groups.values()
            assert group.params.format == spec.format
            assert group.params.final_bits == spec.bits
            assert block.shared_parameters.granularity_of(group.params) == spec.granularity
            if spec.group_size is not None:
                assert block.shared_parameters.group_size_of(group.params) == spec.group_size
        if scheme.inputs is not None:
            inputs = config.activation_quantization
            assert inputs is not None
            (group,) = inputs.different_groups.values()
            assert inputs.shared_parameters.observes(group.params) == scheme.inputs.static


def test_a_scheme_for_each_set_of_modules() -> None:
    plan = resolve(
        tiny_llama(hidden=64, intermediate=128), {"scheme": {"FP8_DYNAMIC": ["self_attn"], "NVFP4": ["mlp"]}}
    )
    formats = {t.module_name: t.params.format for t in plan.techniques["weight_quantization"].targets}
    assert {format for name, format in formats.items() if "self_attn" in name} == {"fp8_e4m3"}
    assert {format for name, format in formats.items() if "mlp" in name} == {"nvfp4"}


def test_the_output_head_stays_unless_it_is_named() -> None:
    for model, head in ((tiny_llama(tied=False), "lm_head"), (tiny_bert(head="ForMaskedLM"), "decoder")):
        names = [
            t.module_name
            for t in resolve(model, {"scheme": "W8A8"}).techniques["weight_quantization"].targets
        ]
        assert names and not any(name.endswith(head) for name in names)
    plan = resolve(tiny_llama(tied=False), {"scheme": {"W8A8": ["layers", "lm_head"]}})
    assert "lm_head" in [target.module_name for target in plan.techniques["weight_quantization"].targets]


def test_settings_of_the_blocks_stay() -> None:
    config = parse_config(
        {
            "scheme": "NVFP4",
            "weight_quantization": {"shared_parameters": {"schedule_offset": 5, "excluded_modules": ["mlp"]}},
        }
    )
    assert config.weight_quantization is not None
    assert config.weight_quantization.shared_parameters.schedule_offset == 5
    assert config.weight_quantization.is_enabled
    assert config.activation_quantization is not None and config.activation_quantization.is_enabled


@pytest.mark.parametrize(
    ("block", "path", "words"),
    [
        ({"scheme": "NVPF4"}, "scheme", '"NVFP4"?'),
        ({"scheme": 5}, "scheme", ""),
        ({"scheme": {}}, "scheme", ""),
        ({"scheme": {"FP8": []}}, "scheme.FP8", ""),
        ({"scheme": {"FP9": ["a"]}}, "scheme.FP9", '"FP8"?'),
        (
            {"scheme": "NVFP4A16", "activation_quantization": {"shared_parameters": {"enabled": True}}},
            "scheme",
            'remove "activation_quantization"',
        ),
        (
            {
                "scheme": "NVFP4",
                "weight_quantization": {"different_groups": {"a": {"params": {"target_bits": 4}}}},
            },
            "weight_quantization.different_groups",
            "remove one",
        ),
    ],
)
def test_what_is_wrong_is_one_problem_that_says_so(block: dict[str, Any], path: str, words: str) -> None:
    (problem,) = problems_of(block)
    assert problem.path == f"compression_training.{path}"
    assert words in problem.hint


def test_columns_that_a_block_does_not_divide_are_named_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tiny_llama(hidden=32, intermediate=48), {"scheme": "MXFP4A16"})
    (problem,) = caught.value.problems
    assert "down_proj (48 inputs)" in problem.got and "multiple of 32" in problem.allowed
    pattern = problem.hint.split('"')[1].replace("\\\\", "\\")
    block = {
        "scheme": "MXFP4A16",
        "weight_quantization": {"shared_parameters": {"excluded_modules": [pattern]}},
    }
    resolve(tiny_llama(hidden=32, intermediate=48), block)


@pytest.mark.parametrize("scheme", ["NVFP4", "W4A16", {"FP8_DYNAMIC": ["self_attn"], "NVFP4": ["mlp"]}])
def test_a_block_that_was_expanded_is_read_again(scheme: Any) -> None:
    parsed = parse_config({"scheme": scheme})
    kept = parsed.model_dump(mode="json", exclude_unset=True)
    assert parse_config(kept) == parsed
