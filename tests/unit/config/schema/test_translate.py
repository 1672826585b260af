"""Every mistake of a block is named once, with its place and what to change."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from ds_compress.config import ConfigError, Problem, parse_config
from tests.unit.config.schema.test_compression_training import (
    activation,
    only_problem_of,
    problems_of,
    pruning,
    quantization,
    shared_path,
)


class TestOneProblem:
    """One mistake, one problem: where, what was got, what is allowed, what to change."""

    def test_unknown_key(self) -> None:
        problem = only_problem_of(pruning({"dense_ratio": 0.5, "metod": "l1"}), shared_path("metod"))
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
        problem = only_problem_of(pruning({"dense_ratio": 0.5, key: value}), shared_path(key))
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
        assert list(problems) == [shared_path("excluded_modules[1]"), shared_path("excluded_modules[2]")]
        assert "does not compile" in problems[shared_path("excluded_modules[1]")].hint
        assert '".*"' in problems[shared_path("excluded_modules[2]")].hint

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
        assert allowed in only_problem_of(pruning({"dense_ratio": 0.5, **shared}), shared_path(key)).allowed

    def test_a_ratio_is_required_somewhere(self) -> None:
        assert only_problem_of(pruning({}), shared_path("dense_ratio")).got == "nothing"
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
        only_problem_of(quantization(shared), shared_path(key, "weight_quantization"))

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
        only_problem_of(activation(shared), shared_path(key, "activation_quantization"))

    @pytest.mark.parametrize("key", ["row_pruning", "head_pruning", "channel_pruning", "depth_pruning"])
    def test_structured_pruning_needs_a_ratio(self, key: str) -> None:
        only_problem_of({key: {"shared_parameters": {"enabled": True}}}, shared_path("dense_ratio", key))
        block = {key: {"shared_parameters": {"enabled": True}, "different_groups": {"g": {}}}}
        only_problem_of(block, f"{key}.different_groups.g.params.dense_ratio")
        only_problem_of({key: {"dense_ratio": 0.0}}, f"{key}.dense_ratio")
        both = {"dense_ratio": 0.5, "shared_parameters": {"dense_ratio": 0.5}}
        only_problem_of({key: both}, f"{key}.dense_ratio")

    def test_what_cannot_learn_scores(self) -> None:
        shared = {"method": "topk", "dense_ratio": 0.5}
        only_problem_of(
            {"depth_pruning": {"shared_parameters": shared}}, shared_path("method", "depth_pruning")
        )

    def test_shrinking_needs_the_last_word_of_topk(self) -> None:
        shared = {"method": "topk", "dense_ratio": 0.5, "shrink_at_end_of_schedule": True}
        block = {"head_pruning": {"shared_parameters": shared}}
        only_problem_of(block, shared_path("schedule_offset_end", "head_pruning"))

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
        assert set(problems_of(pruning(shared))) == {
            shared_path("regrowth"),
            shared_path("schedule_offset_end"),
        }

    def test_the_message_lists_all_of_them(self) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_config({"sed": 1, "distillation": {"enabled": 1}})
        assert str(caught.value) == (
            "2 problems in the compression_training config:\n"
            "\n"
            "compression_training.sed\n"
            '  got:     the unknown key "sed"\n'
            '  allowed: the keys "recipe", "sparse_pruning", "weight_quantization", "activation_quantization", '
            '"kv_cache", "row_pruning", "head_pruning", "channel_pruning", "depth_pruning", "hidden_pruning", '
            '"expert_pruning", "layer_reduction", "distillation", "gradient_compression", "parameter_compression", '
            '"robust_reduction", "security", "seed", "kernels", "scheme" and "export_to"\n'
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
