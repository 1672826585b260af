"""Which structures the blocks claim: found ones, stated ones, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ds_compress import ConfigError, plan
from ds_compress.config.structure_targets import kept_units
from tests.models import tiny_bert


@pytest.fixture
def bert() -> nn.Module:
    return tiny_bert(intermediate_size=64, vocab_size=50, max_position_embeddings=16)


def block(key: str, ratio: float = 0.5, group: dict[str, Any] | None = None, **shared: Any) -> dict[str, Any]:
    groups = {} if group is None else {"g": {"params": {"dense_ratio": ratio}, **group}}
    ratios = {} if group is not None else {"dense_ratio": ratio}
    return {key: {"shared_parameters": {"enabled": True, **ratios, **shared}, "different_groups": groups}}


def claimed(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    return {t.structure.name: t.structure for p in plan(model, config).structures.values() for t in p.targets}


def problem(model: nn.Module, config: dict[str, Any]) -> Any:
    with pytest.raises(ConfigError) as caught:
        plan(model, config)
    assert len(caught.value.problems) == 1, caught.value
    return caught.value.problems[0]


class TestClaims:
    @pytest.mark.parametrize(
        ("key", "count"), [("row_pruning", 2), ("head_pruning", 2), ("depth_pruning", 1)]
    )
    def test_the_short_form_takes_everything(self, bert: nn.Module, key: str, count: int) -> None:
        assert len(claimed(bert, {key: {"dense_ratio": 0.5}})) == count

    def test_a_regex_reaches_the_layers_that_lose_rows_not_their_readers(self, bert: nn.Module) -> None:
        assert list(claimed(bert, block("row_pruning", group={"modules": ["layer.0.intermediate"]}))) == [
            "bert.encoder.layer.0.intermediate.dense"
        ]
        only = claimed(bert, block("row_pruning", group={"modules": [r"layer\.1\.output\.dense"]}))
        assert [s.removable for s in only.values()] == [False]

    def test_excluded(self, bert: nn.Module) -> None:
        only = claimed(bert, block("head_pruning", excluded_modules=[r"layer\.0"]))
        assert list(only) == ["bert.encoder.layer.1.attention"]

    def test_stated_relations_find_what_the_model_says(self, bert: nn.Module) -> None:
        group = {"modules": ["intermediate.dense"], "related_modules": [[r"layer.\d+.output.dense"]]}
        stated = claimed(bert, block("row_pruning", group=group))
        assert stated.keys() == claimed(bert, {"row_pruning": {"dense_ratio": 0.5}}).keys()

    def test_legacy_heads(self, bert: nn.Module) -> None:
        group = {
            "modules": ["attention.output.dense"],
            "related_modules": [["self.query", "self.key", "self.value"]],
        }
        heads = claimed(bert, block("head_pruning", group=group, num_heads=4))
        assert [s.units for s in heads.values()] == [4, 4]

    def test_two_pairs_in_one_group_are_cut_by_their_own_masks(self) -> None:
        model = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("a_up", "a_down", "b_up", "b_down")})
        group = {"modules": ["a_up", "b_up"], "related_modules": [["a_down"], ["b_down"]]}
        found = claimed(model, block("row_pruning", group=group))
        tensors = {name: {m.tensor for m in s.slices} for name, s in found.items()}
        assert {frozenset(t) for t in tensors.values()} == {
            frozenset({"a_up.weight", "a_up.bias", "a_down.weight"}),
            frozenset({"b_up.weight", "b_up.bias", "b_down.weight"}),
        }


class TestErrors:
    def test_a_regex_that_reaches_nothing(self, bert: nn.Module) -> None:
        found = problem(bert, block("head_pruning", group={"modules": ["atention"]}))
        assert "bert.encoder.layer.0.attention" in found.hint
        assert found.path == "compression_training.head_pruning.different_groups.g.modules[0]"

    def test_a_model_without_such_structures_says_why(self) -> None:
        found = problem(nn.Sequential(nn.Conv2d(3, 4, 3)), {"head_pruning": {"dense_ratio": 0.5}})
        assert "attention" in found.allowed or "attention" in found.hint

    def test_one_kv_head_stays(self) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes))
        (structure,) = claimed(model, {"head_pruning": {"dense_ratio": 0.5}}).values()
        assert structure.units == 4
        assert not any("k_proj" in m.tensor or "v_proj" in m.tensor for m in structure.slices)

    def test_hidden_size_under_layer_norm(self, bert: nn.Module) -> None:
        found = problem(bert, {"hidden_pruning": {"dense_ratio": 0.5}})
        assert "LayerNorm" in found.hint

    def test_two_groups(self, bert: nn.Module) -> None:
        groups = {n: {"params": {"dense_ratio": 0.5}, "modules": ["layer.0"]} for n in ("a", "b")}
        config = {"row_pruning": {"shared_parameters": {"enabled": True}, "different_groups": groups}}
        assert '"a"' in problem(bert, config).got

    def test_frozen(self, bert: nn.Module) -> None:
        bert.get_parameter("bert.encoder.layer.1.output.dense.weight").requires_grad_(False)
        assert "layer.1" in problem(bert, {"row_pruning": {"dense_ratio": 0.5}}).got

    def test_relations_that_do_not_fit(self, bert: nn.Module) -> None:
        group = {"modules": ["intermediate.dense"], "related_modules": [["pooler.dense"]]}
        assert "related_modules" in problem(bert, block("row_pruning", group=group)).path


ROWS = {"row_pruning": {"dense_ratio": 0.4}}


class TestOtherBlocks:
    def test_a_pattern_that_a_cut_would_break(self, bert: nn.Module) -> None:
        sparse = block("sparse_pruning", group={"modules": ["intermediate"]}, pattern="2:4")
        assert "intermediate" in problem(bert, {**sparse, **ROWS}).got
        elsewhere = block("sparse_pruning", group={"modules": ["attention"]}, pattern="2:4")
        assert len(claimed(bert, {**elsewhere, **ROWS})) == 2

    def test_groups_of_columns_that_no_longer_fit(self, bert: nn.Module) -> None:
        shared = {"enabled": True, "granularity": "per_column_group", "group_size": 32}
        groups = {"g": {"params": {"start_bits": 4, "target_bits": 4}, "modules": [r"\d.output.dense"]}}
        bits = {"weight_quantization": {"shared_parameters": shared, "different_groups": groups}}
        found = problem(bert, {**bits, **ROWS})
        assert found.path.endswith("group_size") and "[32, 24]" in found.got
        assert len(claimed(bert, {**bits, "row_pruning": {"dense_ratio": 0.5}})) == 2


class TestForecast:
    def test_the_plan_says_what_is_left(self, bert: nn.Module) -> None:
        text = str(plan(bert, {"row_pruning": {"dense_ratio": 0.5}, "head_pruning": {"dense_ratio": 0.25}}))
        assert "32 of 64 rows" in text and "1 of 4 heads" in text

    @pytest.mark.parametrize(
        ("ratio", "units", "round_to", "kept"),
        [
            (0.5, 12, 1, 6),
            (0.667, 6, 1, 4),
            (0.5, 100, 8, 48),
            (0.01, 64, 8, 8),
            (1.0, 11, 8, 11),
            (0.5, 5, 8, 5),
        ],
    )
    def test_kept_units(self, ratio: float, units: int, round_to: int, kept: int) -> None:
        assert kept_units(ratio, units, round_to) == kept
