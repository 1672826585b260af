"""Whatever the JSON says, the answer is a config or a ConfigError; and a misspelt key is named correctly."""

from __future__ import annotations

import copy
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.config import CompressionConfig, ConfigError, parse_config
from ds_compress.config.report.table import LineItem, collapse
from ds_compress.modelinfo.inventory import nearest_names

GROUP = {"modules": ["attention"], "related_modules": None}
COMPLETE: dict[str, Any] = {
    "kv_cache": {"enabled": True, "format": "fp8", "schedule_offset": 2, "range_momentum": 0.9},
    "sparse_pruning": {
        "shared_parameters": {
            "enabled": True,
            "method": "snip_momentum",
            "scope": "layer",
            "pattern": "4x1",
            "block_pattern": "4x1",
            "dense_ratio": 0.5,
            "schedule": "cubic",
            "schedule_offset": 1,
            "schedule_offset_end": 9,
            "schedule_offset_stride": 2,
            "regrowth": True,
            "momentum": 0.5,
            "excluded_modules": ["pooler"],
            "seed": None,
            "randomize": {"temperature": 0.5, "seed": "secret"},
        },
        "different_groups": {"a": {"params": {"dense_ratio": 0.5}, **GROUP}},
    },
    "weight_quantization": {
        "shared_parameters": {
            "enabled": True,
            "quantizer_kernel": False,
            "kernel": "float",
            "schedule_offset": 0,
            "quantize_groups": 1,
            "quantize_verbose": False,
            "quantization_type": "symmetric",
            "quantize_weight_in_forward": True,
            "rounding": "nearest",
            "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.1},
            "granularity": "per_column_group",
            "group_size": 64,
            "narrow_range": True,
            "learned_scale": False,
            "scales": "dynamic",
            "train": "all",
            "frozen_weights": "full",
            "seed": None,
            "excluded_modules": [],
        },
        "different_groups": {
            "a": {"params": {"start_bits": 8, "target_bits": 4, "quantization_period": 5}, **GROUP}
        },
    },
    "activation_quantization": {
        "shared_parameters": {
            "enabled": True,
            "quantization_type": "asymmetric",
            "range_calibration": "static",
            "schedule_offset": 4,
            "granularity": None,
            "narrow_range": False,
            "range_momentum": 0.9,
            "excluded_modules": [],
        },
        "different_groups": {"a": {"params": {"bits": 8}, **GROUP}},
    },
    "row_pruning": {
        "shared_parameters": {"enabled": False, "method": "l1", "schedule_offset": 1},
        "different_groups": {"a": {"params": {"dense_ratio": 0.5}, **GROUP}},
    },
    "channel_pruning": {"shared_parameters": {"enabled": False}, "different_groups": {}},
    "head_pruning": {"shared_parameters": {"enabled": False, "num_heads": 12}, "different_groups": {}},
    "depth_pruning": {
        "shared_parameters": {"enabled": False, "schedule": "constant"},
        "different_groups": {},
    },
    "hidden_pruning": {"dense_ratio": 0.5, "shared_parameters": {"enabled": False}},
    "expert_pruning": {
        "shared_parameters": {"enabled": False, "method": "reap", "merge": True},
        "different_groups": {"a": {"params": {"dense_ratio": 0.5}, **GROUP}},
    },
    "layer_reduction": {
        "enabled": True,
        "keep_number_layer": 2,
        "module_name_prefix": "encoder.layer",
        "teacher_layer": [0, 5],
        "other_module_name": ["pooler"],
    },
    "distillation": {
        "enabled": True,
        "teacher": "x",
        "teacher_dtype": "bf16",
        "teacher_zero_stage": 3,
        "layer_map": [0, 5],
        "task_loss_weight": 1.0,
        "losses": {
            "logits": {"weight": 1.0, "temperature": 2.0},
            "hidden": {"weight": 1.0, "kind": "mse"},
            "attention": {"weight": 1.0, "relation_heads": 4},
        },
    },
    "gradient_compression": {
        "enabled": False,
        "bits": 4,
        "block_size": 64,
        "rounding": "nearest",
        "error_feedback": True,
        "error_feedback_bits": 16,
        "piece_elements": 4096,
        "hierarchical": True,
        "warmup_steps": 3,
        "min_elements": 0,
        "measure_link": False,
    },
    "parameter_compression": {
        "enabled": True,
        "bits": 8,
        "block_size": 512,
        "piece_elements": 4096,
        "warmup_steps": 3,
        "min_elements": 100,
        "measure_link": True,
        "refresh_interval": 50,
    },
    "robust_reduction": {
        "enabled": True,
        "rule": "median",
        "max_malicious": 2,
        "on_outlier": "exclude",
        "outlier_ratio": 4.0,
        "neighbor_mixing": False,
        "worker_momentum": 0.9,
    },
    "seed": 7,
    "kernels": "native",
}
_NAMED_BY_THE_USER = "different_groups"


def key_paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return []
    keys = [] if path and path[-1] == _NAMED_BY_THE_USER else [(*path, key) for key in value]
    return keys + [found for key, item in value.items() for found in key_paths(item, (*path, key))]


PATHS = key_paths(COMPLETE)
KEYS = {path[-1] for path in PATHS}


@st.composite
def misspelt(draw: st.DrawFn, word: str) -> str:
    """One slip of a finger: a letter left out, put in, replaced, or swapped with its neighbour."""
    position = draw(st.integers(0, len(word) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase))
    head, tail = word[:position], word[position:]
    slip = draw(
        st.sampled_from(
            [head + tail[1:], head + letter + tail, head + letter + tail[1:], head + tail[1::-1] + tail[2:]]
        )
    )
    return slip if slip != word else word + "s"


def value_at(block: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        block = block[key]
    return block


def test_the_complete_block_is_complete_and_valid() -> None:
    config = parse_config(COMPLETE)
    fields = set(CompressionConfig.model_fields)
    # Which format an export will have is said beside the blocks that decide whether it can; a scheme stands for blocks.
    assert set(COMPLETE) == fields - {"export_to", "scheme"}
    for block in ("sparse_pruning", "weight_quantization", "activation_quantization"):
        shared = getattr(config, block).shared_parameters
        assert set(COMPLETE[block]["shared_parameters"]) == set(type(shared).model_fields)
    for block in ("kv_cache", "gradient_compression", "parameter_compression", "robust_reduction"):
        assert set(COMPLETE[block]) == set(type(getattr(config, block)).model_fields)


@given(st.data())
def test_a_misspelt_key_is_named_with_the_right_one(data: st.DataObject) -> None:
    *outer, key = path = data.draw(st.sampled_from(PATHS))
    # A slip that is another block's key ("weights" for "weight") is told where it belongs.
    wrong = data.draw(misspelt(key).filter(lambda word: word not in KEYS))
    block = copy.deepcopy(COMPLETE)
    owner = value_at(block, tuple(outer))
    owner[wrong] = owner.pop(key)
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    place = ".".join(("compression_training", *outer, wrong))
    (problem,) = (problem for problem in caught.value.problems if problem.path == place)
    assert problem.hint == f'did you mean "{key}"?', path
    assert f'"{key}"' in problem.allowed


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "*", "(", "2:4", "l1", str(10**30), "auto "]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(sorted({path[-1] for path in PATHS})), inner, max_size=4
        )
    ),
    max_leaves=25,
)


@given(JSON)
def test_arbitrary_json_is_a_config_or_a_config_error(block: Any) -> None:
    try:
        assert isinstance(parse_config(block), CompressionConfig)
    except ConfigError as error:
        assert error.problems and str(error)
        assert all(problem.path.startswith("compression_training") for problem in error.problems)


@given(st.sampled_from(PATHS), JSON)
def test_any_value_in_any_place_is_accepted_or_located(path: tuple[str, ...], value: Any) -> None:
    block = copy.deepcopy(COMPLETE)
    value_at(block, path[:-1])[path[-1]] = value
    try:
        assert isinstance(parse_config(block), CompressionConfig)
    except ConfigError as error:
        # A value may contradict one elsewhere in its block, but never in another block.
        blocks = {problem.path.split(".")[1] for problem in error.problems}
        assert blocks <= {path[0], "distillation" if path[0] == "layer_reduction" else path[0]}
        assert all("pydantic" not in str(problem) for problem in error.problems)


@given(st.text(max_size=30), st.lists(st.text("ab.0", max_size=12), max_size=8, unique=True))
def test_nearest_names_never_fail(pattern: str, names: list[str]) -> None:
    found = nearest_names(pattern, names)
    assert len(found) <= 3 and set(found) <= set(names)


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_collapsed_lines_lose_no_module(places: set[tuple[int, int]]) -> None:
    same = LineItem((1,), ("", "", ""), "")
    names = [f"a.{first}.b.{second}.c" for first, second in sorted(places)]
    lines = collapse(dict.fromkeys(names, same))
    assert sorted(name for _, members in lines for name in members) == sorted(names)
