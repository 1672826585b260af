"""Cuts: tensor by tensor, of whole models, and as JSON."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup
from ds_compress.structure.pruning_plan import PruningPlan
from tests.zoo.masked import kept_units, masked_copy
from tests.zoo.models import ZOO, logits_of


def _structure(name: str, *slices: CoupledSlice, units: int = 4, removable: bool = True) -> PrunableGroup:
    return PrunableGroup(name, GroupKind.ROW, (name,), units, slices, removable=removable)


def _rows(units: int = 4) -> torch.Tensor:
    return torch.arange(units).view(-1, 1)


def _cut(model: nn.Module, *kinds: GroupKind, fraction: float = 0.5) -> PruningPlan:
    groups = [s for kind in kinds for s in find_groups(model, kind).groups]
    return PruningPlan.of(groups, kept_units(groups, fraction))


class TestTensors:
    def test_two_structures_cut_two_dimensions_of_one_tensor(self) -> None:
        first = _structure("rows", CoupledSlice("w", 0, _rows()))
        second = _structure("columns", CoupledSlice("w", 1, torch.arange(8).view(4, 2)))
        pruning_plan = PruningPlan.of(
            [first, second], {"rows": torch.tensor([1, 3]), "columns": torch.tensor([0, 2])}
        )
        tensor = torch.arange(32).view(4, 8)
        assert pruning_plan.shape_of("w", tensor.shape) == (2, 4)
        assert torch.equal(pruning_plan.prune_tensor("w", tensor), tensor[[1, 3]][:, [0, 1, 4, 5]])

    def test_two_structures_cut_the_same_dimension(self) -> None:
        first = _structure("a", CoupledSlice("w", 0, _rows()))
        second = _structure("b", CoupledSlice("w", 0, 4 + _rows()))
        pruning_plan = PruningPlan.of([first, second], {"a": torch.tensor([0]), "b": torch.tensor([3])})
        assert pruning_plan.prune_tensor("w", torch.arange(10)).tolist() == [0, 7, 8, 9]

    def test_weights_are_rescaled_and_moments_are_not(self) -> None:
        group = _structure("norm", CoupledSlice("w", 0, _rows(), masked=False, rescale=-0.5))
        pruning_plan = PruningPlan.of([group], {"norm": torch.tensor([2])})
        tensor = torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert pruning_plan.prune_tensor("w", tensor).tolist() == [6.0]
        assert pruning_plan.prune_tensor("w", tensor, is_weight=False).tolist() == [3.0]

    @pytest.mark.parametrize("kept", [None, torch.arange(4)])
    def test_what_keeps_all_units_cuts_nothing(self, kept: torch.Tensor | None) -> None:
        group = _structure("a", CoupledSlice("w", 0, _rows(), rescale=-0.5))
        pruning_plan = PruningPlan.of([group], {} if kept is None else {"a": kept})
        tensor = torch.randn(4)
        assert (
            pruning_plan.prune_tensor("w", tensor) is tensor
            and not pruning_plan.touches("w")
            and not pruning_plan.active()
        )

    def test_what_is_not_removable_cuts_nothing(self) -> None:
        group = _structure("a", CoupledSlice("w", 0, _rows()), removable=False)
        pruning_plan = PruningPlan.of([group], {"a": torch.tensor([0])})
        assert not pruning_plan.active() and pruning_plan.count(group) == 4

    def test_second_names_of_tied_tensors(self) -> None:
        model = ZOO["llama"]()
        groups = find_groups(model, GroupKind.HIDDEN).groups
        pruning_plan = PruningPlan.of(groups, kept_units(groups), model)
        assert pruning_plan.shape_of("lm_head.weight", (61, 32)) == (61, 16)
        assert pruning_plan.shape_of("model.embed_tokens.weight", (61, 32)) == (61, 16)

    @pytest.mark.parametrize(
        "kept", [[], [1, 0], [0, 0], [-1, 2], [4]], ids=["none", "unsorted", "twice", "negative", "too large"]
    )
    def test_bad_units(self, kept: list[int]) -> None:
        group = _structure("a", CoupledSlice("w", 0, _rows()))
        with pytest.raises(ValueError, match="a: the kept units must be increasing numbers from 0 to 3"):
            PruningPlan.of([group], {"a": torch.tensor(kept, dtype=torch.int64)})

    def test_unknown_and_repeated_names(self) -> None:
        group = _structure("a", CoupledSlice("w", 0, _rows()))
        with pytest.raises(ValueError, match="no prunable group 'b'"):
            PruningPlan.of([group], {"b": torch.arange(2)})
        with pytest.raises(ValueError, match="same name"):
            PruningPlan.of([group, group], {})


class TestLayers:
    def test_names_behind_deleted_layers_shift(self) -> None:
        model = ZOO["modernbert"]()
        (group,) = find_groups(model, GroupKind.LAYER).groups
        assert group.layers[0] == "model.layers.1"
        pruning_plan = PruningPlan.of([group], {"model.layers": torch.tensor([1])})
        assert pruning_plan.renamed("model.layers.0.attn.Wo.weight") == "model.layers.0.attn.Wo.weight"
        assert pruning_plan.renamed("model.layers.1.attn.Wo.weight") is None
        assert pruning_plan.renamed("model.layers.2.attn.Wo.weight") == "model.layers.1.attn.Wo.weight"
        assert pruning_plan.renamed("model.layers.3") is None
        assert pruning_plan.renamed("model.embeddings.norm.weight") == "model.embeddings.norm.weight"
        assert pruning_plan.deleted_layers() == {"model.layers": (1, 3)}

    def test_ten_layers_and_more_are_numbered_as_numbers(self) -> None:
        names = tuple(f"h.{index}" for index in range(12))
        group = PrunableGroup("h", GroupKind.LAYER, ("h",), 12, (), layers=names)
        pruning_plan = PruningPlan.of([group], {"h": torch.tensor([0, 10, 11])})
        assert [pruning_plan.renamed(name) for name in ("h.1.w", "h.10.w", "h.11.w")] == [
            None,
            "h.1.w",
            "h.2.w",
        ]

    def test_attention_keeps_its_place_in_the_cache(self) -> None:
        model: Any = ZOO["llama"]()
        apply_pruning(model, _cut(model, GroupKind.LAYER))
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
        tokens = torch.randint(3, 61, (1, 5))
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            again = model(generated, use_cache=False).logits.argmax(-1)
        assert torch.equal(again[0, 4:8], generated[0, 5:])

    def test_lists_about_layers_are_cut_with_them(self) -> None:
        model: Any = ZOO["gemma3"]()
        (group,) = find_groups(model, GroupKind.LAYER).groups
        apply_pruning(model, PruningPlan.of([group], {group.name: torch.tensor([0, 3])}))
        assert model.config.num_hidden_layers == 2
        assert model.config.layer_types == ["sliding_attention", "full_attention"]


class TestRewrite:
    def test_sizes_that_torch_layers_remember(self) -> None:
        model: Any = ZOO["bert"]()
        apply_pruning(model, _cut(model, GroupKind.ROW, GroupKind.HEAD))
        layer = model.bert.encoder.layer[0]
        assert (layer.intermediate.dense.in_features, layer.intermediate.dense.out_features) == (32, 32)
        assert (layer.output.dense.in_features, layer.attention.output.dense.in_features) == (32, 16)
        own = layer.attention.self
        assert (own.num_attention_heads, own.attention_head_size, own.all_head_size) == (2, 8, 16)
        assert (model.config.intermediate_size, model.config.num_attention_heads) == (32, 2)

    def test_sizes_of_transposed_layers(self) -> None:
        model: Any = ZOO["gpt2"]()
        apply_pruning(model, _cut(model, GroupKind.ROW, GroupKind.HEAD))
        block = model.transformer.h[0]
        assert (block.mlp.c_fc.nx, block.mlp.c_fc.nf, block.mlp.c_proj.nx) == (32, 64, 64)
        assert (block.attn.num_heads, block.attn.split_size, block.attn.head_dim) == (2, 16, 8)
        assert (model.config.n_inner, model.config.n_head) == (64, 2)

    def test_numbers_of_grouped_heads(self) -> None:
        model: Any = ZOO["llama"]()
        apply_pruning(model, _cut(model, GroupKind.HEAD))
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
        assert (model.config.head_dim, model.config.hidden_size) == (4, 32)

    def test_only_query_heads_of_a_single_key_value_head(self) -> None:
        config = hf.LlamaConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=1,
            intermediate_size=48,
        )  # fmt: skip
        model: Any = hf.LlamaForCausalLM(config).eval()
        groups = find_groups(model, GroupKind.HEAD).groups
        kept = kept_units(groups)
        masked = masked_copy(model, groups, kept)
        apply_pruning(model, PruningPlan.of(groups, kept))
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 1)
        assert model.model.layers[0].self_attn.num_key_value_groups == 4
        torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "name", ["bert", "phi3", "t5_gated", "gpt2", "modernbert", "olmo2", "gemma3", "whisper"]
    )
    def test_other_numbers_in_every_layer(self, name: str) -> None:
        model = ZOO[name]().double()
        groups = [s for k in (GroupKind.ROW, GroupKind.HEAD) for s in find_groups(model, k).groups]
        kept = {}
        for position, group in enumerate(groups):
            kept |= kept_units([group], (0.25, 0.75, 0.5, 1.0)[position % 4], seed=position)
        masked = masked_copy(model, groups, kept)
        before = model.config.to_dict()  # type: ignore[operator]
        apply_pruning(model, PruningPlan.of(groups, kept))
        torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=0, atol=1e-5)
        # There is no true value that the config could have instead.
        assert model.config.to_dict() == before  # type: ignore[operator]

    def test_layers_that_are_not_cut_count_for_the_config(self) -> None:
        model: Any = ZOO["llama"]()
        groups = find_groups(model, GroupKind.ROW).groups[:2]
        apply_pruning(model, PruningPlan.of(groups, kept_units(groups)))
        assert model.config.intermediate_size == 48

    def test_encoder_and_decoder_are_counted_apart_where_the_config_does(self) -> None:
        model: Any = ZOO["whisper"]()
        groups = [s for s in find_groups(model, GroupKind.ROW).groups if "decoder" in s.name]
        apply_pruning(model, PruningPlan.of(groups, kept_units(groups)))
        assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (64, 32)

    def test_ties_flags_hooks_and_modes_survive(self) -> None:
        model: Any = ZOO["llama"]().train()
        model.model.layers[0].mlp.eval()
        calls: list[str] = []
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append("called"))
        frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        untouched = model.model.layers[0].self_attn.o_proj.weight
        apply_pruning(model, _cut(model, GroupKind.ROW))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.model.layers[1].mlp.up_proj.weight.requires_grad and frozen.shape == (48, 32)
        assert model.model.layers[0].self_attn.o_proj.weight is untouched
        assert model.training and not model.model.layers[0].mlp.training
        logits_of(model)
        assert calls == ["called"]

    def test_dtypes_survive(self) -> None:
        model = ZOO["olmo2"]().to(torch.bfloat16)
        apply_pruning(model, _cut(model, GroupKind.HEAD, GroupKind.HIDDEN))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_a_cut_model_trains(self) -> None:
        model: Any = ZOO["qwen2"]().train()
        apply_pruning(model, _cut(model, GroupKind.ROW, GroupKind.HEAD, GroupKind.LAYER, GroupKind.HIDDEN))
        tokens = torch.randint(3, 61, (2, 8))
        model(tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())

    def test_cutting_twice_is_an_error_and_finding_anew_is_not(self) -> None:
        model = ZOO["llama"]()
        pruning_plan = _cut(model, GroupKind.ROW)
        apply_pruning(model, pruning_plan)
        with pytest.raises(ValueError, match="it was pruned before"):
            apply_pruning(model, pruning_plan)
        apply_pruning(model, _cut(model, GroupKind.ROW))
        assert model.config.intermediate_size == 12  # type: ignore[union-attr]

    def test_a_partitioned_model_is_an_error(self) -> None:
        model: Any = ZOO["llama"]()
        pruning_plan = _cut(model, GroupKind.ROW)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)
        with pytest.raises(ValueError, match="is sharded"):
            apply_pruning(model, pruning_plan)

    def test_a_skeleton_must_be_meant(self) -> None:
        model = ZOO["llama"]()
        pruning_plan = _cut(model, GroupKind.ROW)
        with pytest.raises(ValueError, match="meta=True"):
            apply_pruning(copy.deepcopy(model).to("meta"), pruning_plan)

    def test_another_model_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="has no tensor"):
            apply_pruning(ZOO["llama"](), _cut(ZOO["bert"](), GroupKind.ROW))

    def test_a_skeleton_whose_ties_are_lost_is_cut_everywhere(self) -> None:
        model: Any = ZOO["llama"]()
        found = _cut(model, GroupKind.HIDDEN)
        pruning_plan = PruningPlan.of(found.groups, found.kept, model)
        meta_model: Any = copy.deepcopy(model).to("meta")
        assert meta_model.lm_head.weight is not meta_model.model.embed_tokens.weight
        apply_pruning(meta_model, pruning_plan, meta=True)
        assert meta_model.lm_head.weight.shape == meta_model.model.embed_tokens.weight.shape == (61, 16)
