"""Who does what a hint says gets further: the next error, if any, is not about what the hint made them write."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress import ConfigError, parse_config, plan
from ds_compress.config.schema.source import block_of
from ds_compress.errors import Problem
from ds_compress.modelinfo.inventory import covering_patterns
from tests.models import tiny_bert
from tests.unit.config.report.test_coverage import mixtral, with_slots

SHARED = {"enabled": True, "dense_ratio": 0.5}
_EXCLUDE = re.compile(r'add ("[^ ]*"(?:, "[^ ]*")*) (?:\(or .*?\) )?to (?:\S+ of )?\S*excluded_modules')


class Odd(nn.Module):
    """Everything that is no plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.own = nn.Parameter(torch.ones(4, 4))
        self.recurrent = nn.LSTM(8, 8)
        self.sound = nn.Conv1d(8, 8, 3)
        self.transposed = nn.ConvTranspose2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.sequence = nn.Sequential(nn.Linear(8, 8))
        self.table = nn.Embedding(8, 8)
        self.bag = nn.EmbeddingBag(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.table.weight
        self.again = self.first
        self.clipped = nn.Embedding(8, 8, max_norm=1.0)


def problem_after_following(model: nn.Module, block: dict[str, Any]) -> Problem | None:
    """The problem that is left when every hint to exclude something was followed; None: the config is accepted."""
    block = copy.deepcopy(block)
    for _ in range(4):
        try:
            plan(model, block)
            return None
        except ConfigError as error:
            for problem in error.problems:
                found = _EXCLUDE.search(problem.hint)
                if found is None:
                    return problem
                shared = block[problem.path.split(".")[1]]["shared_parameters"]
                shared.setdefault("excluded_modules", []).extend(json.loads(f"[{found[1]}]"))
    raise AssertionError(f"hints lead in a circle: {problem}")


def sparse(**group: Any) -> dict[str, Any]:
    return {
        "sparse_pruning": {"shared_parameters": SHARED, "different_groups": {"g": {"params": {}, **group}}}
    }


def rows(**group: Any) -> dict[str, Any]:
    shared = {**SHARED, "method": "l1"}
    return {"row_pruning": {"shared_parameters": shared, "different_groups": {"g": {"params": {}, **group}}}}


@pytest.mark.parametrize("model", [Odd, mixtral, tiny_bert])
@pytest.mark.parametrize("modules", [None, [".*"], [".", "a"]])
def test_hints_to_exclude_lead_to_an_accepted_config(model: Any, modules: list[str] | None) -> None:
    group = {} if modules is None else {"modules": modules[:1]}
    assert problem_after_following(model(), sparse(**group)) is None


def test_a_hint_covers_all_layers_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(with_slots(), sparse(modules=["layers"]))
    (problem,) = caught.value.problems
    assert "\\\\d+" in problem.hint and problem.hint.count("mlp") == 1


def test_a_regex_that_reaches_nothing_else_is_not_to_be_excluded() -> None:
    left = problem_after_following(with_slots(), sparse(modules=["mlp"]))
    assert left is not None and "mlp" in left.got and "reaches none" not in left.got
    assert "remove the regex" in left.hint


@pytest.mark.parametrize("modules", [None, ["mlp"], ["experts"], [".*"], ["layers"]])
def test_rows_of_experts(modules: list[str] | None) -> None:
    group = {} if modules is None else {"modules": modules}
    assert problem_after_following(mixtral(), rows(**group)) is None


def test_activations_of_fused_experts_are_refused_with_a_way_out() -> None:
    block = {"row_pruning": {"dense_ratio": 0.5, "shared_parameters": {"method": "activation"}}}
    with pytest.raises(ConfigError) as caught:
        plan(mixtral(), block)
    (problem,) = caught.value.problems
    assert problem.path.endswith("shared_parameters.method") and "taylor" in problem.hint


def test_rows_of_what_has_no_outputs() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(Odd(), rows(modules=[".*"]))
    assert caught.value.problems[0].path == "compression_training.row_pruning.different_groups.g.modules[0]"


def test_excluding_every_structure_is_an_error() -> None:
    block = rows(modules=["intermediate"])
    block["row_pruning"]["shared_parameters"] |= {"excluded_modules": ["encoder"]}
    with pytest.raises(ConfigError, match="exclude less"):
        plan(tiny_bert(), block)


def test_excluding_what_is_not_there_is_an_error() -> None:
    block = rows(modules=["intermediate"])
    block["row_pruning"]["shared_parameters"] |= {"excluded_modules": ["encoder.layers"]}
    with pytest.raises(ConfigError) as caught:
        plan(tiny_bert(), block)
    (problem,) = caught.value.problems
    assert problem.path.endswith("excluded_modules[0]") and "encoder.layer" in problem.hint


def test_structures_that_stay_whole_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A dense layer is pruned, and that experts of an unknown layout beside it are not is no secret."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    model = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
            num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8,
        )
    )  # fmt: skip
    strange = torch.nn.Module()
    strange.matrices = torch.nn.Parameter(torch.zeros(4, 16, 16))
    model.model.layers[1].mlp.experts = strange
    plan(model, {"row_pruning": {"dense_ratio": 0.5}})
    (warning,) = [record.getMessage() for record in caplog.records if "not pruned" in record.getMessage()]
    assert "model.layers.1.mlp" in warning


@pytest.mark.parametrize("key", ["schedule_offset", "schedule_offset_end", "excluded_modules", "method"])
@pytest.mark.parametrize("place", [(), ("sparse_pruning",), ("sparse_pruning", "different_groups", "g")])
def test_a_key_of_shared_parameters_elsewhere(key: str, place: tuple[str, ...]) -> None:
    block = copy.deepcopy(sparse())
    inner: Any = block
    for step in place:
        inner = inner[step]
    inner[key] = 3
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    (problem,) = caught.value.problems
    home = "shared_parameters" if place else "sparse_pruning.shared_parameters"
    assert problem.hint == f'"{key}" belongs under "{home}"'


def test_start_bits_is_target_bits_by_default() -> None:
    group = {"params": {"target_bits": 4}}
    block = {
        "weight_quantization": {"shared_parameters": {"enabled": True}, "different_groups": {"g": group}}
    }
    parsed = parse_config(block).weight_quantization
    assert parsed is not None and parsed.different_groups["g"].params.start_bits == 4
    block["weight_quantization"]["different_groups"]["g"]["params"] = {"target_bits": 9}  # type: ignore[index]
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    (problem,) = caught.value.problems
    assert problem.path.endswith("target_bits")


def test_patterns_cover_names_that_differ_in_numbers() -> None:
    names = ["a.0.b", "a.11.b", "c", "a.0.d.3"]
    patterns = covering_patterns(names)
    assert len(patterns) == 3
    for name in names:
        assert any(re.search(pattern, name) for pattern in patterns)
    assert not any(re.search(pattern, "a.0.bb") for pattern in patterns)


def test_a_broken_json_with_comments_says_where_it_is_broken(tmp_path: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n  // sizes\n  "train_batch_size": 8,\n  "compression_training": {\n')
    with pytest.raises(ConfigError) as caught:
        block_of(str(path))
    (problem,) = caught.value.problems
    assert "line 2" not in problem.path and "sizes" not in problem.got


def test_a_json_with_comments_is_read(tmp_path: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{\n  # sizes\n  "train_batch_size": 8, /* more */\n  "compression_training": {"seed": 3,},\n}'
    )
    assert block_of(str(path)) == {"seed": 3}


def test_a_lone_surrogate_can_be_printed(tmp_path: Any) -> None:
    path = tmp_path / "ds.json"
    shared = '{"enabled": true, "method": "\\ud800"}'
    path.write_text(f'{{"compression_training": {{"sparse_pruning": {{"shared_parameters": {shared}}}}}}}')
    with pytest.raises(ConfigError) as caught:
        parse_config(block_of(str(path)))
    assert "ud800" in str(caught.value).encode("utf-8").decode()


def test_structures_count_as_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model = tiny_bert()
    inner = sum(p.numel() for n, p in model.named_parameters() if "intermediate" in n)
    inner += sum(
        m.weight.numel() for n, m in model.named_modules() if re.search(r"layer\.\d\.output\.dense$", n)
    )
    text = str(plan(model, {"row_pruning": {"dense_ratio": 0.5}}))
    assert f"claimed: {inner:,} of" in text
