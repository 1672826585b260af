"""Regexes on models: what is claimed, and every claim that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.config import ConfigError, Problem
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.targets import Target
from ds_compress.modelinfo.inventory import nearest_names
from ds_compress.modelinfo.kinds import ModuleKind
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return tiny_bert(
        layers=3, hidden=16, heads=2, intermediate_size=32, vocab_size=40, max_position_embeddings=8
    )


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return tiny_gpt2(n_positions=8, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_llama(hidden=16, heads=2, key_value_heads=1, intermediate=24, vocab_size=40)


class TinyNet(nn.Module):
    """One of everything that is not a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.volume = nn.Conv3d(4, 8, 3)
        self.recurrent = nn.LSTM(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 6)


def pruning(*patterns: str, **shared: Any) -> dict[str, Any]:
    return groups("sparse_pruning", {"g": list(patterns)} if patterns else {}, {"dense_ratio": 0.5}, **shared)


def groups(
    block: str, modules: dict[str, list[str]], params: dict[str, Any], **shared: Any
) -> dict[str, Any]:
    if block == "sparse_pruning" and not modules:
        shared = {**params, **shared}
    return {
        block: {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {name: {"params": params, "modules": list(m)} for name, m in modules.items()},
        }
    }


def bits(*patterns: str, **shared: Any) -> dict[str, Any]:
    return groups("weight_quantization", {"g": list(patterns)}, {"start_bits": 8, "target_bits": 8}, **shared)


def inputs(*patterns: str, **shared: Any) -> dict[str, Any]:
    return groups("activation_quantization", {"g": list(patterns)}, {"bits": 8}, **shared)


def targets_of(model: nn.Module, block: dict[str, Any]) -> tuple[Target, ...]:
    (technique,) = resolve(model, block).techniques.values()
    return technique.targets


def names_of(model: nn.Module, block: dict[str, Any]) -> list[str]:
    return [target.module_name for target in targets_of(model, block)]


def problems_of(model: nn.Module, block: dict[str, Any]) -> Sequence[Problem]:
    with pytest.raises(ConfigError) as caught:
        resolve(model, block)
    return caught.value.problems


def only_problem_of(model: nn.Module, block: dict[str, Any]) -> Problem:
    (problem,) = problems_of(model, block)
    return problem


class TestClaims:
    def test_a_regex_is_searched_in_the_qualified_name(self, bert: nn.Module) -> None:
        names = names_of(bert, pruning("attention.self"))
        assert names == [
            f"bert.encoder.layer.{layer}.attention.self.{part}"
            for layer in range(3)
            for part in ("query", "key", "value")
        ]

    def test_a_target_knows_its_weight(self, bert: nn.Module) -> None:
        (target,) = targets_of(bert, pruning(r"layer\.1\.intermediate"))
        assert target.param is bert.get_parameter(target.param_name)
        assert target.module is bert.get_submodule(target.module_name)
        assert (target.kind, target.shape, target.group) == (ModuleKind.LINEAR, (32, 16), "g")
        assert target.params.dense_ratio == 0.5

    @pytest.mark.parametrize("block", [pruning(), pruning("*")])
    def test_a_star_or_nothing_is_every_layer_but_no_embedding(self, bert: nn.Module, block: Any) -> None:
        linears = [name for name, module in bert.named_modules() if isinstance(module, nn.Linear)]
        assert names_of(bert, block) == linears
        assert {target.group for target in targets_of(bert, block)} == {
            "g" if block == pruning("*") else "all"
        }

    def test_an_embedding_is_claimed_by_name(self, bert: nn.Module) -> None:
        assert names_of(bert, bits("word_embeddings")) == ["bert.embeddings.word_embeddings"]

    def test_containers_norms_and_dropouts_are_reached_quietly(self, bert: nn.Module) -> None:
        names = names_of(bert, pruning(r"layer\.0\.output"))
        assert names == ["bert.encoder.layer.0.output.dense"]

    def test_two_regexes_of_a_group_may_overlap(self, bert: nn.Module) -> None:
        names = names_of(bert, pruning(r"layer\.0\.attention\.self", "query"))
        assert names.count("bert.encoder.layer.0.attention.self.query") == 1

    def test_excluded_modules(self, bert: nn.Module) -> None:
        names = names_of(bert, pruning(excluded_modules=["pooler", "classifier", r"layer\.[12]"]))
        assert names and all("layer.0." in name for name in names)

    def test_conv1d_and_conv2d(self, gpt2: nn.Module) -> None:
        conv1d = targets_of(gpt2, pruning(r"h\.0\.attn\.c_attn"))[0]
        assert (conv1d.kind, conv1d.shape) == (ModuleKind.CONV1D, (16, 48))
        conv2d = targets_of(TinyNet(), pruning("conv"))[0]
        assert (conv2d.kind, conv2d.shape) == (ModuleKind.CONV2D, (8, 4, 3, 3))

    def test_a_tied_weight_goes_by_its_first_name(self, gpt2: nn.Module) -> None:
        (target,) = targets_of(gpt2, pruning("lm_head"))
        assert (target.module_name, target.param_name) == ("lm_head", "transformer.wte.weight")

    def test_a_module_with_two_names_is_one_target_under_either(self) -> None:
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"first": shared, "second": shared})
        assert names_of(model, pruning("second")) == ["first"]
        assert names_of(model, pruning("first|second")) == ["first"]

    def test_the_model_may_be_the_layer(self) -> None:
        (target,) = targets_of(nn.Linear(4, 4), pruning("*"))
        assert (target.module_name, target.param_name) == ("", "weight")

    def test_the_input_of_an_embedding_is_no_activation(self, bert: nn.Module) -> None:
        names = names_of(bert, inputs("bert"))
        assert names and not any("embeddings" in name for name in names)

    def test_weights_held_in_part_have_their_full_shape(self) -> None:
        model = nn.Sequential(nn.Linear(6, 4))
        weight = model[0].weight
        weight.ds_shape = torch.Size([4, 6])  # type: ignore[attr-defined]
        weight.data = torch.empty(0)
        plan = resolve(model, pruning("0", pattern="3:6"))
        assert plan.techniques["sparse_pruning"].targets[0].shape == (4, 6)
        assert plan.weights[0].shape == (4, 6)

    def test_a_swapped_class_is_resolved_like_its_base(self) -> None:
        class QATLinear(nn.Linear):
            _ds_compress_base_class = nn.Linear

            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return super().forward(input)

        model = nn.Sequential(nn.Linear(4, 4))
        before = names_of(model, pruning("*"))
        model[0].__class__ = QATLinear
        assert names_of(model, pruning("*")) == before == ["0"]

    def test_a_disabled_block_claims_nothing(self, bert: nn.Module) -> None:
        block = pruning("no such module")
        block["sparse_pruning"]["shared_parameters"]["enabled"] = False
        assert resolve(bert, block).techniques == {}

    def test_a_frozen_weight_may_be_quantized(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
        assert names_of(model, bits("*")) == ["0"]

    def test_a_model_that_will_be_cut_is_planned_as_it_will_be(self, bert: nn.Module) -> None:
        block = {
            **pruning("attention.self.query"),
            "layer_reduction": {"enabled": True, "teacher_layer": [0, 2]},
        }
        plan = resolve(bert, block)
        names = [target.module_name for target in plan.techniques["sparse_pruning"].targets]
        assert names == [f"bert.encoder.layer.{layer}.attention.self.query" for layer in range(2)]
        assert not any("layer.2." in weight.name for weight in plan.weights)


class TestRefusals:
    def test_a_regex_that_reaches_nothing(self, bert: nn.Module) -> None:
        problem = only_problem_of(bert, pruning("attention.self", "atention.slf.query"))
        assert problem.path == "compression_training.sparse_pruning.different_groups.g.modules[1]"
        assert '"atention.slf.query"' in problem.got
        assert problem.hint.count('"') == 6
        assert problem.hint.startswith('the nearest names are "bert.encoder.layer.0.attention.self.query"')

    def test_a_regex_that_reaches_no_weight(self, bert: nn.Module) -> None:
        assert "reaches none" in only_problem_of(bert, pruning("LayerNorm")).got
        assert "reaches none" in only_problem_of(bert, inputs("word_embeddings")).got

    def test_a_star_on_a_model_without_layers(self) -> None:
        problem = only_problem_of(nn.Sequential(nn.ReLU()), pruning())
        assert problem.path == "compression_training.sparse_pruning"
        assert problem.hint == "this model has no such layer"

    @pytest.mark.parametrize(
        ("pattern", "names", "hint"),
        [
            ("volume|conv", ["volume (Conv3d)"], "excluded_modules"),
            # Excluding all that a regex reaches would be the next error.
            ("recurrent", ["recurrent (LSTM)"], "remove the regex"),
            (
                "attention",
                ["attention (MultiheadAttention)", "out_proj (NonDynamicallyQuantizableLinear)"],
                "remove the regex",
            ),
        ],
    )
    def test_a_regex_that_reaches_an_unsupported_module(
        self, pattern: str, names: list[str], hint: str
    ) -> None:
        problem = only_problem_of(TinyNet(), pruning(pattern))
        assert all(name in problem.got for name in names)
        assert hint in problem.hint

    def test_following_the_hint_about_an_unsupported_module_helps(self) -> None:
        assert '"^volume$"' in only_problem_of(TinyNet(), pruning("volume|conv")).hint
        assert names_of(TinyNet(), pruning("volume|conv", excluded_modules=["^volume$"])) == ["conv"]

    def test_a_star_refuses_only_unsupported_linears(self) -> None:
        problem = only_problem_of(TinyNet(), pruning("*"))
        assert "out_proj" in problem.got and "volume" not in problem.got
        assert names_of(TinyNet(), pruning("*", excluded_modules=["attention"])) == ["conv", "head"]

    @pytest.mark.parametrize("kernel_size", [2, 3])
    def test_small_parts_that_are_no_layers_stay_as_they_are(
        self, kernel_size: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As the short convolution of a state-space mixer: up to 2 % of what the regex reaches."""
        mixer = nn.ModuleDict(
            {"conv": nn.Conv1d(100, 100, kernel_size, groups=100), "proj": nn.Linear(100, 100)}
        )
        if kernel_size == 3:
            assert "conv (Conv1d)" in only_problem_of(mixer, pruning("conv|proj")).got
            return
        with caplog.at_level("INFO", "ds_compress"):
            assert names_of(mixer, pruning("conv|proj")) == ["proj"]
        assert "1 small parts that are no layers stay as they are, such as conv (Conv1d)" in caplog.text
        assert "they have 2.0 % of the weights" in caplog.text

    def test_a_small_part_alone_is_refused(self) -> None:
        mixer = nn.ModuleDict({"conv": nn.Conv1d(100, 100, 2, groups=100), "proj": nn.Linear(100, 100)})
        assert "conv (Conv1d)" in only_problem_of(mixer, pruning("conv")).got

    def test_two_groups_that_claim_one_weight(self, bert: nn.Module) -> None:
        block = groups(
            "sparse_pruning", {"a": ["attention"], "b": [r"layer\.0.*query"]}, {"dense_ratio": 0.5}
        )
        problem = only_problem_of(bert, block)
        assert problem.path == "compression_training.sparse_pruning.different_groups.b.modules"
        assert "bert.encoder.layer.0.attention.self.query" in problem.got and '"a"' in problem.got
        assert '"a" or "b"' in problem.hint

    @pytest.mark.parametrize("model", ["gpt2", "llama"])
    def test_a_tied_weight_reached_twice(self, model: str, request: pytest.FixtureRequest) -> None:
        tied = request.getfixturevalue(model)
        problem = only_problem_of(tied, pruning("wte|embed_tokens|lm_head"))
        assert '"lm_head"' in problem.got and "share one weight" in problem.got
        assert '"^lm_head$"' in problem.hint
        assert len(names_of(tied, pruning("wte|embed_tokens|lm_head", excluded_modules=["^lm_head$"]))) == 1

    def test_inputs_of_tied_layers_are_not_shared(self) -> None:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        assert names_of(nn.Sequential(first, second), inputs("*")) == ["0", "1"]

    @pytest.mark.parametrize("settings", [{"method": "taylor"}, {"method": "topk"}, {"regrowth": True}])
    def test_training_dependent_masks_of_a_frozen_weight(
        self, bert: nn.Module, settings: dict[str, Any]
    ) -> None:
        bert.get_submodule("bert.pooler").requires_grad_(False)
        try:
            problem = only_problem_of(bert, pruning(**settings))
        finally:
            bert.get_submodule("bert.pooler").requires_grad_(True)
        assert problem.path.endswith("sparse_pruning.shared_parameters.method")
        assert "bert.pooler.dense, whose weight is frozen" in problem.got
        assert '"l1" or "random"' in problem.allowed
        assert r'"^bert\\.pooler\\.dense$"' in problem.hint

    @pytest.mark.parametrize("method", ["l1", "random"])
    def test_a_frozen_weight_may_be_pruned_once(self, bert: nn.Module, method: str) -> None:
        bert.get_submodule("bert.pooler").requires_grad_(False)
        try:
            assert "bert.pooler.dense" in names_of(bert, pruning(method=method))
        finally:
            bert.get_submodule("bert.pooler").requires_grad_(True)

    def test_a_group_of_which_nothing_is_left(self, bert: nn.Module) -> None:
        problem = only_problem_of(bert, pruning("pooler", excluded_modules=["pooler"]))
        assert problem.path.endswith("different_groups.g")
        assert "excluded_modules" in problem.hint

    def test_an_exclusion_that_reaches_nothing(self, bert: nn.Module) -> None:
        problem = only_problem_of(bert, pruning(excluded_modules=["pooler", "clasifier"]))
        assert problem.path.endswith("shared_parameters.excluded_modules[1]")
        assert '"classifier"' in problem.hint

    def test_n_of_m_needs_whole_groups_of_inputs(self, gpt2: nn.Module) -> None:
        problem = only_problem_of(gpt2, {**pruning(pattern="2:32", dense_ratio=2 / 32)})
        assert problem.path.endswith("shared_parameters.pattern")
        # 16 inputs, though stored as [16, 48]: Conv1D keeps its inputs first.
        assert "transformer.h.0.attn.c_attn (16 inputs)" in problem.got
        resolve(gpt2, pruning("c_attn", pattern="8:16"))

    def test_quantize_groups_divide_the_weight(self, bert: nn.Module) -> None:
        problem = only_problem_of(bert, bits("classifier", "word_embeddings", quantize_groups=48))
        assert problem.path.endswith("shared_parameters.quantize_groups")
        assert "classifier [2, 16]" in problem.got and "word_embeddings" not in problem.got

    @pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}])
    def test_embeddings_that_cannot_be_quantized(self, option: dict[str, Any]) -> None:
        problem = only_problem_of(nn.ModuleDict({"table": nn.Embedding(4, 4, **option)}), bits("table"))
        assert next(iter(option)) in problem.got

    def test_layer_reduction_names_modules_that_exist(self, bert: nn.Module) -> None:
        block = {
            "layer_reduction": {"enabled": True, "keep_number_layer": 2, "other_module_name": ["bert.poler"]}
        }
        assert '"bert.pooler"' in only_problem_of(bert, block).hint
        block = {
            "layer_reduction": {
                "enabled": True,
                "keep_number_layer": 2,
                "module_name_prefix": "bert.encoder.layr",
            }
        }
        assert "bert.encoder.layer" in only_problem_of(bert, block).hint

    def test_all_problems_of_all_blocks_at_once(self, bert: nn.Module) -> None:
        block = {
            **pruning("nowhere", "pooler", excluded_modules=["neither"]),
            **bits("nothing", quantize_groups=1),
            **inputs("LayerNorm"),
            "row_pruning": {"dense_ratio": 0.5, "different_groups": {"g": {"modules": ["nobody"]}}},
        }
        paths = [problem.path.removeprefix("compression_training.") for problem in problems_of(bert, block)]
        assert paths == [
            "sparse_pruning.shared_parameters.excluded_modules[0]",
            "sparse_pruning.different_groups.g.modules[0]",
            "weight_quantization.different_groups.g.modules[0]",
            "activation_quantization.different_groups.g.modules[0]",
            "row_pruning.different_groups.g.modules[0]",
        ]

    def test_an_invalid_block_is_refused_before_any_model_is_read(self) -> None:
        with pytest.raises(ConfigError, match="dense_ration"):
            resolve(nn.Linear(2, 2), {"sparse_pruning": {"shared_parameters": {"dense_ration": 1}}})


class TestNearestNames:
    NAMES = tuple(
        f"encoder.layer.{layer}.{part}"
        for layer in range(12)
        for part in ("attention.query", "attention.key", "output.dense", "intermediate.dense")
    )

    @pytest.mark.parametrize(
        ("pattern", "nearest"),
        [
            ("atention.query", "encoder.layer.0.attention.query"),
            (r"layer\.\d+\.attention\.kei$", "encoder.layer.0.attention.key"),
            ("intermediat_dense", "encoder.layer.0.intermediate.dense"),
        ],
    )
    def test_the_best_comes_first_once_per_kind_of_layer(self, pattern: str, nearest: str) -> None:
        names = nearest_names(pattern, self.NAMES)
        assert names[0] == nearest
        assert len(names) == 3 and all(".0." in name for name in names)

    def test_fewer_names_than_three(self) -> None:
        assert nearest_names("x", ["only"]) == ["only"]
        assert nearest_names("x", [""]) == []
