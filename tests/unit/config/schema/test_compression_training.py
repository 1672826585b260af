"""The JSON block: legacy configs mean what they meant, and every mistake is named once, with its place."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest

from ds_compress.config import CompressionConfig, ConfigError, Problem, parse_config
from ds_compress.config.schema.patterns import Pattern, parse_pattern


def problems_of(block: Any) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    problems = {
        problem.path.removeprefix("compression_training."): problem for problem in caught.value.problems
    }
    assert len(problems) == len(caught.value.problems), "one place was reported twice"
    assert "pydantic" not in str(caught.value)
    return problems


def only_problem_of(block: Any, path: str) -> Problem:
    problems = problems_of(block)
    assert list(problems) == [path]
    return problems[path]


def pruning(shared: Mapping[str, Any], **groups: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {name: {"params": params} for name, params in groups.items()},
        }
    }


def quantization(shared: Mapping[str, Any], **groups: Mapping[str, Any]) -> dict[str, Any]:
    groups = groups or {"all": {"start_bits": 8, "target_bits": 8}}
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {name: {"params": params} for name, params in groups.items()},
        }
    }


def activation(shared: Mapping[str, Any], bits: Any = 8) -> dict[str, Any]:
    return {
        "activation_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"all": {"params": {"bits": bits}}},
        }
    }


def shared_path(key: str, block: str = "sparse_pruning") -> str:
    return f"{block}.shared_parameters.{key}"


class TestLegacyBlocks:
    """The blocks of the removed library, as its own examples wrote them."""

    def test_sparse_pruning_l1(self) -> None:
        block = {
            "sparse_pruning": {
                "shared_parameters": {"enabled": True, "schedule_offset": 2000, "method": "l1"},
                "different_groups": {"sp1": {"params": {"dense_ratio": 0.5}, "modules": ["attention.self"]}},
            }
        }
        pruned = parse_config(block).sparse_pruning
        assert pruned is not None
        shared = pruned.shared_parameters
        assert (shared.method, shared.scope, shared.schedule_offset) == ("l1", "layer", 2000)
        assert (shared.effective_pattern, shared.effective_schedule) == ("unstructured", "constant")
        assert shared.effective_regrowth is False
        assert pruned.groups["sp1"].modules == ("attention.self",)
        assert pruned.groups["sp1"].params.dense_ratio == 0.5

    def test_sparse_pruning_topk_may_change_its_mind(self) -> None:
        pruned = parse_config(pruning({"method": "topk"}, a={"dense_ratio": 0.1})).sparse_pruning
        assert pruned is not None and pruned.shared_parameters.effective_regrowth

    def test_snip_momentum_has_its_own_defaults_and_no_groups(self) -> None:
        block = {
            "sparse_pruning": {
                "shared_parameters": {
                    "enabled": True,
                    "schedule_offset": 30,
                    "schedule_offset_end": 90,
                    "schedule_offset_stride": 15,
                    "method": "snip_momentum",
                    "excluded_modules": ["classifier", "pooler"],
                },
                "different_groups": {},
            }
        }
        pruned = parse_config(block).sparse_pruning
        assert pruned is not None
        shared = pruned.shared_parameters
        assert (shared.effective_pattern, shared.effective_schedule) == ("4x1", "cubic")
        assert list(pruned.groups) == ["all"]
        assert pruned.groups["all"].modules == ("*",)
        assert pruned.groups["all"].params.dense_ratio == 0.1
        assert shared.excluded_modules == ("classifier", "pooler")

    @pytest.mark.parametrize("pattern", ["4x1", "8x16", "2:4"])
    def test_block_pattern_is_the_pattern(self, pattern: str) -> None:
        shared = {"method": "snip_momentum", "block_pattern": pattern}
        pruned = parse_config(pruning(shared)).sparse_pruning
        assert pruned is not None and pruned.shared_parameters.effective_pattern == pattern

    def test_weight_quantization(self) -> None:
        block = {
            "weight_quantization": {
                "shared_parameters": {
                    "enabled": True,
                    "quantizer_kernel": False,
                    "schedule_offset": 0,
                    "quantize_groups": 48,
                    "quantize_verbose": False,
                    "quantization_type": "symmetric",
                    "quantize_weight_in_forward": True,
                    "rounding": "nearest",
                    "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.1},
                },
                "different_groups": {
                    "wq1": {
                        "params": {"start_bits": 16, "target_bits": 4, "quantization_period": 50},
                        "modules": ["attention.self", "layer.\\w+.output.dense"],
                    }
                },
            }
        }
        quantized = parse_config(block).weight_quantization
        assert quantized is not None
        shared = quantized.shared_parameters
        assert (shared.quantize_groups, shared.granularity) == (48, None)
        assert shared.effective_narrow_range is False
        assert shared.fp16_mixed_quantize.quantize_change_ratio == 0.1
        params = quantized.groups["wq1"].params
        assert (params.first_bits, params.target_bits) == (16, 4)
        # Twelve drops: 50, 100, 200, ... applied steps after the offset.
        assert params.last_drop(7) == 7 + 50 * 2**11

    def test_a_quantization_period_of_zero_leaves_no_ladder(self) -> None:
        params = {"start_bits": 8, "target_bits": 4, "quantization_period": 0}
        quantized = parse_config(quantization({}, a=params)).weight_quantization
        assert quantized is not None
        assert quantized.groups["a"].params.first_bits == 4
        assert quantized.groups["a"].params.last_drop(30) == 30

    def test_defaults_are_the_documented_ones(self) -> None:
        block = {
            name: {"shared_parameters": {}, "different_groups": {}}
            for name in (
                "weight_quantization",
                "activation_quantization",
                "sparse_pruning",
                "row_pruning",
                "head_pruning",
                "channel_pruning",
            )
        }
        config = parse_config(block)
        assert config.weight_quantization and config.activation_quantization and config.row_pruning
        assert config.sparse_pruning and config.head_pruning and config.channel_pruning
        weights = config.weight_quantization.shared_parameters
        assert (weights.quantize_groups, weights.quantization_type, weights.rounding) == (
            1,
            "symmetric",
            "nearest",
        )
        assert weights.fp16_mixed_quantize.quantize_change_ratio == 0.001
        assert weights.quantize_weight_in_forward is False
        inputs = config.activation_quantization.shared_parameters
        assert (inputs.range_calibration, inputs.schedule_offset) == ("dynamic", 0)
        assert config.sparse_pruning.shared_parameters.schedule_offset == 0
        assert config.row_pruning.shared_parameters.schedule_offset == 1000
        assert config.head_pruning.shared_parameters.method == "topk"

    def test_activation_quantization(self) -> None:
        inputs = parse_config(
            activation({"range_calibration": "static", "schedule_offset": 1000})
        ).activation_quantization
        assert inputs is not None
        shared = inputs.shared_parameters
        assert (shared.effective_granularity, shared.effective_narrow_range) == ("per_tensor", False)
        assert shared.range_momentum == 0.95
        assert inputs.groups["all"].params.bits == 8

    def test_the_short_form_of_structured_pruning(self) -> None:
        config = parse_config({"head_pruning": {"dense_ratio": 0.5}})
        assert config.head_pruning is not None
        shared = config.head_pruning.shared
        assert (shared.enabled, shared.dense_ratio, shared.schedule_offset) == (True, 0.5, 0)
        assert config.head_pruning.groups["all"].params.dense_ratio == 0.5
        off = parse_config({"row_pruning": {"dense_ratio": 0.5, "shared_parameters": {"enabled": False}}})
        assert off.row_pruning is not None and not off.row_pruning.shared.enabled

    def test_structured_pruning_validates(self) -> None:
        block = {
            "row_pruning": {
                "shared_parameters": {"enabled": True, "schedule_offset": 2000, "method": "topk"},
                "different_groups": {
                    "rp1": {
                        "params": {"dense_ratio": 0.5},
                        "modules": ["intermediate.dense"],
                        "related_modules": [["layer.\\w+.output.dense"]],
                    }
                },
            },
            "head_pruning": {
                "shared_parameters": {"enabled": True, "method": "topk", "num_heads": 12},
                "different_groups": {
                    "hp1": {
                        "params": {"dense_ratio": 0.5},
                        "modules": ["attention.output.dense"],
                        "related_modules": [["self.query", "self.key", "self.value"]],
                    }
                },
            },
            "channel_pruning": {
                "shared_parameters": {"enabled": True, "method": "l1"},
                "different_groups": {"cp1": {"params": {"dense_ratio": 0.5}, "modules": ["layer....conv1"]}},
            },
        }
        config = parse_config(block)
        assert config.row_pruning is not None and config.head_pruning is not None
        assert config.row_pruning.different_groups["rp1"].related_modules == (("layer.\\w+.output.dense",),)
        assert config.head_pruning.shared_parameters.num_heads == 12

    def test_layer_reduction(self) -> None:
        block = {
            "layer_reduction": {
                "enabled": True,
                "keep_number_layer": 5,
                "module_name_prefix": "bert.encoder.layer",
                "teacher_layer": [2, 4, 6, 8, 10],
                "other_module_name": ["bert.pooler", "bert.embeddings", "classifier"],
            }
        }
        reduction = parse_config(block).layer_reduction
        assert reduction is not None
        assert reduction.teacher_layer == (2, 4, 6, 8, 10)

    def test_a_disabled_block_needs_no_groups(self) -> None:
        for name in ("sparse_pruning", "weight_quantization", "activation_quantization", "head_pruning"):
            parse_config({name: {"shared_parameters": {"enabled": False}}})
            parse_config({name: {}})

    def test_an_absent_block_is_none_and_nothing_is_a_config(self) -> None:
        assert parse_config({}) == CompressionConfig()
        assert parse_config({}).sparse_pruning is None


class TestNewKeys:
    def test_new_granularities_get_the_grid_that_reaches_max(self) -> None:
        for granularity in ("per_tensor", "per_channel", "per_column_group"):
            quantized = parse_config(quantization({"granularity": granularity})).weight_quantization
            assert quantized is not None and quantized.shared_parameters.effective_narrow_range
        legacy = parse_config(quantization({"granularity": "per_group"})).weight_quantization
        learned = parse_config(quantization({"learned_scale": True})).weight_quantization
        told = parse_config(
            quantization({"granularity": "per_channel", "narrow_range": False})
        ).weight_quantization
        assert legacy and learned and told
        assert not legacy.shared_parameters.effective_narrow_range
        assert learned.shared_parameters.effective_narrow_range
        assert not told.shared_parameters.effective_narrow_range

    def test_group_size_defaults_to_128_columns(self) -> None:
        quantized = parse_config(quantization({"granularity": "per_column_group"})).weight_quantization
        assert quantized is not None and quantized.shared_parameters.effective_group_size == 128

    def test_a_group_without_a_ratio_takes_the_shared_one(self) -> None:
        pruned = parse_config(pruning({"dense_ratio": 0.3}, a={}, b={"dense_ratio": 0.6})).sparse_pruning
        assert pruned is not None
        assert [group.params.dense_ratio for group in pruned.groups.values()] == [0.3, 0.6]

    def test_an_n_of_m_pattern_says_the_ratio(self) -> None:
        pruned = parse_config(pruning({"pattern": "2:8"}, a={}, b={"dense_ratio": 0.25})).sparse_pruning
        assert pruned is not None
        assert [group.params.dense_ratio for group in pruned.groups.values()] == [0.25, 0.25]

    def test_distillation_imitates_the_logits_unless_told_otherwise(self) -> None:
        plain = parse_config({"distillation": {"enabled": True}}).distillation
        assert plain is not None and plain.losses.logits is not None and plain.losses.hidden is None
        told = parse_config({"distillation": {"enabled": True, "losses": {"hidden": {}}}}).distillation
        assert told is not None and told.losses.logits is None
        assert told.losses.hidden is not None and told.losses.hidden.kind == "mse"

    def test_whole_numbers_may_be_written_as_floats(self) -> None:
        shared = json.loads('{"schedule_offset": 1e3, "method": "l1", "dense_ratio": 1}')
        pruned = parse_config(pruning(shared)).sparse_pruning
        assert pruned is not None and pruned.shared_parameters.schedule_offset == 1000
        assert isinstance(pruned.shared_parameters.schedule_offset, int)

    def test_models_are_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            parse_config({}).seed = 3  # type: ignore[misc]

    def test_the_block_of_the_caller_is_left_alone(self) -> None:
        block = pruning({"schedule_offset": "auto"}, a={"dense_ratio": 0.5})
        before = copy.deepcopy(block)
        parse_config(block)
        assert block == before

    @pytest.mark.parametrize(
        ("text", "parsed"),
        [
            ("unstructured", Pattern("unstructured")),
            ("4x1", Pattern("blocks", 4, 1)),
            ("16x32", Pattern("blocks", 16, 32)),
            ("2:4", Pattern("n_of_m", 2, 4)),
            ("4:4", Pattern("n_of_m", 4, 4)),
        ],
    )
    def test_patterns(self, text: str, parsed: Pattern) -> None:
        assert parse_pattern(text) == parsed

    @pytest.mark.parametrize(
        "text", ["", "4", "4x", "x4", "0x4", "4x0", "4:2", "0:4", "2:4:8", "4X1", " 2:4", "-1x2"]
    )
    def test_not_patterns(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"pattern|keeps"):
            parse_pattern(text)
        assert only_problem_of(
            pruning({"dense_ratio": 0.5, "pattern": text}), shared_path("pattern")
        ).got == json.dumps(text)


class TestAuto:
    def test_auto_is_the_default(self) -> None:
        block = pruning({"schedule_offset": "auto", "method": "auto"}, a={"dense_ratio": 0.5})
        assert parse_config(block) == parse_config(pruning({}, a={"dense_ratio": 0.5}))

    def test_a_whole_block_may_be_auto(self) -> None:
        assert parse_config({"sparse_pruning": "auto", "seed": "auto"}) == CompressionConfig()

    def test_auto_in_a_list_is_a_regex(self) -> None:
        block = pruning({"excluded_modules": ["auto"]}, a={"dense_ratio": 0.5})
        pruned = parse_config(block).sparse_pruning
        assert pruned is not None and pruned.shared_parameters.excluded_modules == ("auto",)

    def test_auto_for_a_required_value_is_an_error_that_says_so(self) -> None:
        problem = only_problem_of(
            activation({}, bits="auto"), "activation_quantization.different_groups.all.params.bits"
        )
        assert problem.got == '"auto"'
        assert "left out" in problem.hint
        assert problem.allowed == "a whole number >= 4 and <= 8"
