"""The JSON block: legacy configs mean what they meant, and every mistake is named once, with its place."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from typing import Any

import pytest

from ds_compress.config import CompressionConfig, ConfigError, Problem, parse_config
from ds_compress.config.schema import __main__ as schema_program
from ds_compress.config.schema import compression_training as schema_module
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
            pruning({"dense_ratio": 0.5, "pattern": text}), _shared("pattern")
        ).got == json.dumps(text)


def _shared(key: str, block: str = "sparse_pruning") -> str:
    return f"{block}.shared_parameters.{key}"


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


class TestOneProblem:
    """One mistake, one problem: where, what was got, what is allowed, what to change."""

    def test_unknown_key(self) -> None:
        problem = only_problem_of(pruning({"dense_ratio": 0.5, "metod": "l1"}), _shared("metod"))
        assert problem.got == 'the unknown key "metod"'
        assert problem.hint == 'did you mean "method"?'
        assert '"excluded_modules"' in problem.allowed

    def test_a_misspelt_required_key_is_one_mistake(self) -> None:
        params = {"start_bits": 8, "target_bit": 8}
        path = "weight_quantization.different_groups.a.params.target_bit"
        assert only_problem_of(quantization({}, a=params), path).hint == 'did you mean "target_bits"?'

    def test_a_key_in_the_wrong_place(self) -> None:
        block = pruning({"dense_ratio": 0.5})
        block["sparse_pruning"]["method"] = "l1"
        assert (
            only_problem_of(block, "sparse_pruning.method").hint
            == '"method" belongs under "shared_parameters"'
        )
        block = pruning({"dense_ratio": 0.5}, a={})
        block["sparse_pruning"]["different_groups"]["a"]["dense_ratio"] = 0.5
        path = "sparse_pruning.different_groups.a.dense_ratio"
        assert only_problem_of(block, path).hint == '"dense_ratio" belongs under "params"'

    @pytest.mark.parametrize(
        ("key", "value", "allowed", "hint"),
        [
            ("enabled", 1, "true or false", ""),
            ("enabled", "True", "true or false", "write true without quotes"),
            ("method", "snip", '"l1", "topk", ', 'did you mean "snip_momentum"?'),
            ("scope", "layers", '"layer", "group" or "global"', 'did you mean "layer"?'),
            ("schedule_offset", -1, "a whole number >= 0", ""),
            ("schedule_offset", 1.5, "a whole number >= 0", ""),
            ("schedule_offset", True, "a whole number >= 0", ""),
            ("schedule_offset", "100", "a whole number >= 0", "write 100 without quotes"),
            ("schedule_offset_stride", 0, "a whole number >= 1", ""),
            ("dense_ratio", 0, "a number > 0 and <= 1", ""),
            ("dense_ratio", 1.01, "a number > 0 and <= 1", ""),
            ("dense_ratio", True, "a number > 0 and <= 1", ""),
            ("dense_ratio", float("nan"), "a number > 0 and <= 1", ""),
            ("dense_ratio", float("inf"), "a number > 0 and <= 1", ""),
            ("momentum", 1, "a number >= 0 and < 1", ""),
            ("seed", -1, "a whole number >= 0", ""),
            ("excluded_modules", "pooler", "a list", 'write it as a list: ["pooler"]'),
            ("pattern", "4 by 1", '"unstructured"', ""),
        ],
    )
    def test_a_bad_value(self, key: str, value: Any, allowed: str, hint: str) -> None:
        problem = only_problem_of(pruning({"dense_ratio": 0.5, key: value}), _shared(key))
        assert problem.allowed.startswith(allowed)
        assert problem.hint == hint

    @pytest.mark.parametrize("ratio", [0, -0.5, 1.5, "half", None, False])
    def test_the_ratio_of_a_group(self, ratio: Any) -> None:
        problem = only_problem_of(
            pruning({}, enc={"dense_ratio": ratio}), "sparse_pruning.different_groups.enc.params.dense_ratio"
        )
        assert problem.allowed == "a number > 0 and <= 1"

    def test_an_invalid_regex(self) -> None:
        block = pruning({"dense_ratio": 0.5, "excluded_modules": ["ok", "(", "*.query"]})
        problems = problems_of(block)
        assert list(problems) == [_shared("excluded_modules[1]"), _shared("excluded_modules[2]")]
        assert "does not compile" in problems[_shared("excluded_modules[1]")].hint
        assert '".*"' in problems[_shared("excluded_modules[2]")].hint

    def test_an_empty_group(self) -> None:
        block = pruning({}, a={"dense_ratio": 0.5})
        block["sparse_pruning"]["different_groups"]["a"]["modules"] = []
        assert "not empty" in only_problem_of(block, "sparse_pruning.different_groups.a.modules").allowed

    def test_related_modules_are_aligned_with_modules(self) -> None:
        group = {"params": {"dense_ratio": 0.5}, "modules": ["a", "b"], "related_modules": [["c"]]}
        block = {"row_pruning": {"different_groups": {"g": group}}}
        assert "2" in only_problem_of(block, "row_pruning.different_groups.g.related_modules").allowed

    @pytest.mark.parametrize("zero_stage", [False, 1, 2, 3.5, "3"])
    def test_teacher_stage(self, zero_stage: Any) -> None:
        problem = only_problem_of(
            {"distillation": {"teacher_zero_stage": zero_stage}}, "distillation.teacher_zero_stage"
        )
        assert problem.allowed == "0 or 3"

    @pytest.mark.parametrize("block", [None, 3, "x", [], [{}]])
    def test_the_block_itself(self, block: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config(block)
        assert [problem.path for problem in caught.value.problems] == ["compression_training"]

    def test_a_group_name_that_is_no_string(self) -> None:
        block = {"sparse_pruning": {"different_groups": {1: {}}}}
        with pytest.raises(ConfigError, match="quotes"):
            parse_config(block)


class TestConflicts:
    """Values that are fine one by one and not together."""

    @pytest.mark.parametrize(
        ("shared", "key", "allowed"),
        [
            ({"pattern": "4x1", "block_pattern": "2x1"}, "block_pattern", 'the same as pattern, "4x1"'),
            ({"schedule": "linear"}, "schedule_offset_end", "schedule is linear"),
            ({"schedule": "cubic"}, "schedule_offset_end", "schedule is cubic"),
            (
                {"schedule_offset": 9, "schedule_offset_end": 8},
                "schedule_offset_end",
                "at least schedule_offset (9)",
            ),
            ({"method": "topk", "regrowth": False}, "regrowth", "topk changes its mind"),
            ({"method": "movement", "regrowth": False}, "regrowth", "movement changes its mind"),
            ({"pattern": "2:4", "dense_ratio": 0.4}, "dense_ratio", "0.5, which is what pattern 2:4 keeps"),
            ({"pattern": "2:4", "dense_ratio": 0.5, "scope": "global"}, "scope", '"layer"'),
        ],
    )
    def test_pruning(self, shared: dict[str, Any], key: str, allowed: str) -> None:
        assert allowed in only_problem_of(pruning({"dense_ratio": 0.5, **shared}), _shared(key)).allowed

    def test_a_ratio_is_required_somewhere(self) -> None:
        assert only_problem_of(pruning({}), _shared("dense_ratio")).got == "nothing"
        path = "sparse_pruning.different_groups.b.params.dense_ratio"
        assert "shared_parameters" in only_problem_of(pruning({}, a={"dense_ratio": 0.5}, b={}), path).hint

    def test_n_of_m_and_the_ratio_of_a_group(self) -> None:
        path = "sparse_pruning.different_groups.b.params.dense_ratio"
        block = pruning({"pattern": "2:4"}, a={"dense_ratio": 0.5}, b={"dense_ratio": 0.3})
        assert only_problem_of(block, path).got == "0.3"

    @pytest.mark.parametrize(
        ("shared", "key"),
        [
            ({"group_size": 64}, "group_size"),
            ({"group_size": 64, "granularity": "per_channel"}, "group_size"),
            ({"quantize_groups": 4, "granularity": "per_channel"}, "quantize_groups"),
            ({"learned_scale": True, "quantization_type": "asymmetric"}, "quantization_type"),
            ({"learned_scale": True, "rounding": "stochastic"}, "rounding"),
        ],
    )
    def test_weight_quantization(self, shared: dict[str, Any], key: str) -> None:
        only_problem_of(quantization(shared), _shared(key, "weight_quantization"))

    @pytest.mark.parametrize(
        ("shared", "bits"), [({"learned_scale": True}, 1), ({"quantization_type": "asymmetric"}, 2)]
    )
    def test_few_bits_have_no_such_grid(self, shared: dict[str, Any], bits: int) -> None:
        block = quantization(shared, a={"start_bits": 8, "target_bits": bits})
        only_problem_of(block, "weight_quantization.different_groups.a.params.target_bits")

    def test_bits_only_fall(self) -> None:
        path = "weight_quantization.different_groups.a.params.start_bits"
        problem = only_problem_of(quantization({}, a={"start_bits": 4, "target_bits": 8}), path)
        assert "set start_bits to 8" in problem.hint

    def test_enabled_quantization_needs_a_group(self) -> None:
        for name in ("weight_quantization", "activation_quantization"):
            problem = only_problem_of(
                {name: {"shared_parameters": {"enabled": True}}}, f"{name}.different_groups"
            )
            assert problem.got == "nothing"

    @pytest.mark.parametrize(
        ("shared", "key"),
        [
            ({"range_calibration": "static", "granularity": "per_token"}, "granularity"),
            ({"range_calibration": "dynamic", "range_momentum": 0.9}, "range_momentum"),
        ],
    )
    def test_activation_quantization(self, shared: dict[str, Any], key: str) -> None:
        only_problem_of(activation(shared), _shared(key, "activation_quantization"))

    @pytest.mark.parametrize("key", ["row_pruning", "head_pruning", "channel_pruning", "depth_pruning"])
    def test_structured_pruning_needs_a_ratio(self, key: str) -> None:
        only_problem_of({key: {"shared_parameters": {"enabled": True}}}, _shared("dense_ratio", key))
        block = {key: {"shared_parameters": {"enabled": True}, "different_groups": {"g": {}}}}
        only_problem_of(block, f"{key}.different_groups.g.params.dense_ratio")
        only_problem_of({key: {"dense_ratio": 0.0}}, f"{key}.dense_ratio")
        both = {"dense_ratio": 0.5, "shared_parameters": {"dense_ratio": 0.5}}
        only_problem_of({key: both}, f"{key}.dense_ratio")

    def test_what_cannot_learn_scores(self) -> None:
        shared = {"method": "topk", "dense_ratio": 0.5}
        only_problem_of({"depth_pruning": {"shared_parameters": shared}}, _shared("method", "depth_pruning"))

    def test_shrinking_needs_the_last_word_of_topk(self) -> None:
        shared = {"method": "topk", "dense_ratio": 0.5, "shrink_at_end_of_schedule": True}
        block = {"head_pruning": {"shared_parameters": shared}}
        only_problem_of(block, _shared("schedule_offset_end", "head_pruning"))

    def test_layer_reduction(self) -> None:
        only_problem_of({"layer_reduction": {"enabled": True}}, "layer_reduction.teacher_layer")
        disagree = {"layer_reduction": {"keep_number_layer": 2, "teacher_layer": [1, 3, 5]}}
        assert only_problem_of(disagree, "layer_reduction.keep_number_layer").allowed.startswith("3")

    def test_distillation_without_a_loss(self) -> None:
        only_problem_of({"distillation": {"enabled": True, "losses": {}}}, "distillation.losses")

    def test_the_layer_map_fits_the_kept_layers(self) -> None:
        block = {
            "layer_reduction": {"enabled": True, "keep_number_layer": 3},
            "distillation": {"enabled": True, "layer_map": [1, 3], "losses": {"hidden": {}}},
        }
        assert only_problem_of(block, "distillation.layer_map").allowed.startswith("3 entries")


class TestAllAtOnce:
    def test_every_problem_of_every_block_in_one_pass(self) -> None:
        block = {
            "sparse_prunning": {},
            "sparse_pruning": {
                "shared_parameters": {"enabled": "yes", "metod": "l1", "momentum": 2},
                "different_groups": {
                    "a": {"params": {"dense_ratio": 2}, "modules": ["("]},
                    "b": {"parms": {}},
                },
            },
            "weight_quantization": {
                "shared_parameters": {"enabled": True, "group_size": 3},
                "different_groups": {"w": {"params": {"start_bits": 2, "target_bits": 9}}},
            },
            "layer_reduction": {"enabled": True},
            "distillation": {"losses": {"hidden": {"kind": "l2"}}},
            "seed": 1.5,
        }
        assert set(problems_of(block)) == {
            "sparse_prunning",
            "sparse_pruning.shared_parameters.enabled",
            "sparse_pruning.shared_parameters.metod",
            "sparse_pruning.shared_parameters.momentum",
            "sparse_pruning.different_groups.a.params.dense_ratio",
            "sparse_pruning.different_groups.a.modules[0]",
            "sparse_pruning.different_groups.b.parms",
            "weight_quantization.shared_parameters.group_size",
            "weight_quantization.different_groups.w.params.target_bits",
            "layer_reduction.teacher_layer",
            "distillation.losses.hidden.kind",
            "seed",
        }

    def test_a_bad_group_does_not_hide_the_rules_between_the_others(self) -> None:
        block = pruning({}, bad={"dense_ratio": 2}, without={})
        assert set(problems_of(block)) == {
            "sparse_pruning.different_groups.bad.params.dense_ratio",
            "sparse_pruning.different_groups.without.params.dense_ratio",
        }

    def test_several_conflicts_of_one_object(self) -> None:
        shared = {"dense_ratio": 0.5, "method": "topk", "regrowth": False, "schedule": "linear"}
        assert set(problems_of(pruning(shared))) == {_shared("regrowth"), _shared("schedule_offset_end")}

    def test_the_message_lists_all_of_them(self) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config({"sed": 1, "distillation": {"enabled": 1}})
        assert str(caught.value) == (
            "2 problems in the compression_training config:\n"
            "\n"
            "compression_training.sed\n"
            '  got:     the unknown key "sed"\n'
            '  allowed: the keys "sparse_pruning", "weight_quantization", "activation_quantization", '
            '"row_pruning", "head_pruning", "channel_pruning", "depth_pruning", "hidden_pruning", '
            '"layer_reduction", "distillation", "gradient_compression", "parameter_compression", '
            '"robust_reduction", "seed", "kernels" and "export_to"\n'
            '  hint:    did you mean "seed"?\n'
            "\n"
            "compression_training.distillation.enabled\n"
            "  got:     1\n"
            "  allowed: true or false"
        )

    def test_the_error_survives_pickling(self) -> None:
        # A worker process hands its error to its parent so.
        error = ConfigError([Problem("a", "b", "c", "d")])
        assert pickle.loads(pickle.dumps(error)).problems == error.problems


class TestJsonSchema:
    def test_the_shipped_file_is_current(self) -> None:
        assert schema_module.SCHEMA_FILE.read_text(encoding="utf-8") == schema_module.schema_text()

    def test_it_describes_a_whole_deepspeed_config(self) -> None:
        schema = schema_module.json_schema()
        definitions = schema["$defs"]
        block = definitions["CompressionConfig"]
        assert schema["properties"]["compression_training"] == {"$ref": "#/$defs/CompressionConfig"}
        assert "additionalProperties" not in schema
        assert block["additionalProperties"] is False
        ratio = definitions["SparsePruningParams"]["properties"]["dense_ratio"]["anyOf"][0]
        assert (ratio["exclusiveMinimum"], ratio["maximum"]) == (0, 1)
        bits = definitions["ActivationQuantizationParams"]["properties"]["bits"]
        assert (bits["type"], bits["minimum"], bits["maximum"]) == ("integer", 4, 8)

    def test_every_field_is_documented(self) -> None:
        for name, definition in schema_module.json_schema()["$defs"].items():
            for key, field in definition["properties"].items():
                assert field.get("description"), f"{name}.{key} has no description"

    def test_writing_is_atomic_and_check_notices_a_stale_file(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "schema.json"
        monkeypatch.setattr(schema_module, "SCHEMA_FILE", path)
        assert schema_program.main(["--check"]) == 1
        path.write_text("stale")
        assert schema_program.main(["--check"]) == 1
        schema_module.write_schema(path)
        assert schema_program.main(["--check"]) == 0
        assert [file.name for file in tmp_path.iterdir()] == ["schema.json"]

    def test_an_interrupted_write_leaves_the_old_file(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "schema.json"
        path.write_text("old")

        def interrupted() -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(schema_module, "schema_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            schema_module.write_schema(path)
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["schema.json"]
