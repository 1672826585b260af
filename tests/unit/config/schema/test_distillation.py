"""Conflicts inside the distillation block and with other blocks name the place and the fix."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ds_compress.config import parse_config
from tests.unit.config.schema.test_compression_training import only_problem_of

QUANTIZED = {
    "weight_quantization": {
        "shared_parameters": {"enabled": True},
        "different_groups": {"all": {"params": {"start_bits": 8, "target_bits": 8}}},
    }
}


def shrinking(technique: str) -> dict[str, Any]:
    return {
        technique: {
            "shared_parameters": {"enabled": True, "shrink_at_end_of_schedule": True},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}}},
        }
    }


CONFLICTS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    # the block of distillation, other blocks, where the problem is, words of its message
    ({"losses": {}}, {}, "losses", 'at least one of "logits"'),
    ({"teacher": "x", "teacher_cache": "y"}, {}, "teacher_cache", 'no "teacher" beside it'),
    ({"teacher": "x", "self_teacher": {"weights": "ema"}}, {}, "self_teacher", 'no "teacher" beside it'),
    ({"teacher_cache": "y", "self_teacher": {"weights": "ema"}}, {}, "self_teacher", "keep one"),
    ({"teacher_offload": "cpu", "teacher_zero_stage": 0}, {}, "teacher_offload", "teacher_zero_stage 3"),
    (
        {"self_teacher": {"weights": "ema"}, "teacher_dtype": "bf16"},
        {},
        "teacher_dtype",
        "sharded as the student is",
    ),
    ({"teacher_cache": "folder", "teacher_zero_stage": 0}, {}, "teacher_zero_stage", "no model of its own"),
    ({"teacher_cache": "folder", "teacher_offload": "cpu"}, {}, "teacher_offload", "no model of its own"),
    (
        {"self_teacher": {"weights": "current"}, "layer_map": [0]},
        QUANTIZED,
        "layer_map",
        "every layer imitates itself",
    ),
    ({"self_teacher": {"weights": "initial", "decay": 0.9}}, {}, "self_teacher.decay", '"ema"'),
    (
        {"self_teacher": {"weights": "current"}},
        {},
        "self_teacher.weights",
        'an enabled weight_quantization or activation_quantization beside it.*"initial" or "ema"',
    ),
    (
        {"self_teacher": {"weights": "ema"}},
        shrinking("row_pruning"),
        "self_teacher.weights",
        '"initial" where shrink_at_end',
    ),
    (
        {"losses": {"hidden": {}}},
        shrinking("hidden_pruning"),
        "losses.hidden",
        "set shrink_at_end_of_schedule to false",
    ),
    (
        {"layer_map": [0, 1], "losses": {"hidden": {}}},
        {"layer_reduction": "two of three"},
        "layer_map",
        "3 entries",
    ),
    (
        {"layer_map": [0, 1], "losses": {"logits": {}, "embedding": {}, "contrastive": {}}},
        {},
        "layer_map",
        'no loss is by layer.*"hidden", "attention" or "router"',
    ),
    *(
        (
            {"teacher_cache": "y", "losses": {name: {}, "logits": {}}},
            {},
            f"losses.{name}",
            "logits only.*name a teacher",
        )
        for name in ("hidden", "attention", "embedding", "contrastive")
    ),
    (
        {"teacher_cache": "y", "losses": {"logits": {"top_k": 5}}},
        {},
        "losses.logits.top_k",
        "cache fixed it.*remove it",
    ),
    ({"losses": {"logits": {"beta": 0.3}}}, {}, "losses.logits.beta", 'kind "jsd"'),
    ({"losses": {"logits": {"kind": "jsd", "beta": 1.0}}}, {}, "losses.logits.beta", "< 1"),
    ({"losses": {"logits": {"top_k": 0}}}, {}, "losses.logits.top_k", ">= 1"),
    ({"losses": {"logits": {"final_weight": 0.0}}}, {}, "losses.logits.schedule_offset_end", "a value"),
    ({"losses": {"hidden": {"schedule_offset_end": 5}}}, {}, "losses.hidden.final_weight", "belong together"),
    (
        {"losses": {"logits": {"final_weight": 0.0, "schedule_offset": 5, "schedule_offset_end": 5}}},
        {},
        "losses.logits.schedule_offset_end",
        r"more than schedule_offset \(5\)",
    ),
    ({"losses": {"logits": {"schedule_offset": 5}}}, {}, "losses.logits.schedule_offset", "nothing to move"),
    (
        {"losses": {"attention": {"kind": "maps", "relation_heads": 2}}},
        {},
        "losses.attention.relation_heads",
        'kind "relation"',
    ),
    (
        {"losses": {"contrastive": {"kind": "crd"}}},
        {},
        "losses.contrastive.examples",
        "number of training examples",
    ),
    ({"losses": {"contrastive": {"examples": 5}}}, {}, "losses.contrastive.examples", 'kind "crd"'),
]


@pytest.mark.parametrize(
    ("settings", "others", "path", "words"), CONFLICTS, ids=lambda value: str(value)[:60]
)
def test_conflicts_name_the_place_and_the_fix(
    settings: dict[str, Any], others: dict[str, Any], path: str, words: str
) -> None:
    if others == {"layer_reduction": "two of three"}:
        others = {
            "layer_reduction": {
                "enabled": True,
                "keep_number_layer": 3,
                "module_name_prefix": "m",
                "teacher_layer": [0, 1, 2],
            }
        }
    problem = only_problem_of(
        {"distillation": {"enabled": True, **settings}, **others}, f"distillation.{path}"
    )
    message = str(problem)
    assert f"compression_training.distillation.{path}" in message
    assert re.search(words, message.replace("\n", " ")), message


def test_a_block_that_is_off_conflicts_with_nothing() -> None:
    parsed = parse_config(
        {"distillation": {"enabled": False, "losses": {}, "teacher": "x", "teacher_cache": "y"}}
    )
    assert parsed.distillation is not None and not parsed.distillation.enabled
