"""Cuts: tensor by tensor, of whole models, and as JSON."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from ds_compress.structure.find import find_structures
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup
from ds_compress.structure.pruning_plan import PruningPlan
from tests.zoo.masked import kept_units, masked_copy
from tests.zoo.models import ZOO, logits_of


def _structure(name: str, *members: CoupledSlice, units: int = 4, removable: bool = True) -> PrunableGroup:
    return PrunableGroup(name, GroupKind.ROW, (name,), units, members, removable=removable)


def _rows(units: int = 4) -> torch.Tensor:
    return torch.arange(units).view(-1, 1)


def _cut(model: nn.Module, *kinds: GroupKind, fraction: float = 0.5) -> PruningPlan:
    structures = [s for kind in kinds for s in find_structures(model, kind).structures]
    return PruningPlan.of(structures, kept_units(structures, fraction))


class TestTensors:
    def test_two_structures_cut_two_dimensions_of_one_tensor(self) -> None:
        first = _structure("rows", CoupledSlice("w", 0, _rows()))
        second = _structure("columns", CoupledSlice("w", 1, torch.arange(8).view(4, 2)))
        cuts = PruningPlan.of(
            [first, second], {"rows": torch.tensor([1, 3]), "columns": torch.tensor([0, 2])}
        )
        tensor = torch.arange(32).view(4, 8)
        assert cuts.shape_of("w", tensor.shape) == (2, 4)
        assert torch.equal(cuts.apply("w", tensor), tensor[[1, 3]][:, [0, 1, 4, 5]])

    def test_two_structures_cut_the_same_dimension(self) -> None:
        first = _structure("a", CoupledSlice("w", 0, _rows()))
        second = _structure("b", CoupledSlice("w", 0, 4 + _rows()))
        cuts = PruningPlan.of([first, second], {"a": torch.tensor([0]), "b": torch.tensor([3])})
        assert cuts.apply("w", torch.arange(10)).tolist() == [0, 7, 8, 9]

    def test_weights_are_rescaled_and_moments_are_not(self) -> None:
        structure = _structure("norm", CoupledSlice("w", 0, _rows(), masked=False, rescale=-0.5))
        cuts = PruningPlan.of([structure], {"norm": torch.tensor([2])})
        tensor = torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert cuts.apply("w", tensor).tolist() == [6.0]
        assert cuts.apply("w", tensor, is_weight=False).tolist() == [3.0]

    @pytest.mark.parametrize("kept", [None, torch.arange(4)])
    def test_what_keeps_all_units_cuts_nothing(self, kept: torch.Tensor | None) -> None:
        structure = _structure("a", CoupledSlice("w", 0, _rows(), rescale=-0.5))
        cuts = PruningPlan.of([structure], {} if kept is None else {"a": kept})
        tensor = torch.randn(4)
        assert cuts.apply("w", tensor) is tensor and not cuts.touches("w") and not cuts.active()

    def test_what_is_not_removable_cuts_nothing(self) -> None:
        structure = _structure("a", CoupledSlice("w", 0, _rows()), removable=False)
        cuts = PruningPlan.of([structure], {"a": torch.tensor([0])})
        assert not cuts.active() and cuts.count(structure) == 4

    def test_second_names_of_tied_tensors(self) -> None:
        model = ZOO["llama"]()
        structures = find_structures(model, GroupKind.HIDDEN).structures
        cuts = PruningPlan.of(structures, kept_units(structures), model)
        assert cuts.shape_of("lm_head.weight", (61, 32)) == (61, 16)
        assert cuts.shape_of("model.embed_tokens.weight", (61, 32)) == (61, 16)

    @pytest.mark.parametrize(
        "kept", [[], [1, 0], [0, 0], [-1, 2], [4]], ids=["none", "unsorted", "twice", "negative", "too large"]
    )
    def test_bad_units(self, kept: list[int]) -> None:
        structure = _structure("a", CoupledSlice("w", 0, _rows()))
        with pytest.raises(ValueError, match="a: the kept units must be increasing numbers from 0 to 3"):
            PruningPlan.of([structure], {"a": torch.tensor(kept, dtype=torch.int64)})

    def test_unknown_and_repeated_names(self) -> None:
        structure = _structure("a", CoupledSlice("w", 0, _rows()))
        with pytest.raises(ValueError, match="no structure 'b'"):
            PruningPlan.of([structure], {"b": torch.arange(2)})
        with pytest.raises(ValueError, match="same name"):
            PruningPlan.of([structure, structure], {})


class TestLayers:
    def test_names_behind_deleted_layers_shift(self) -> None:
        model = ZOO["modernbert"]()
        (structure,) = find_structures(model, GroupKind.LAYER).structures
        assert structure.layers[0] == "model.layers.1"
        cuts = PruningPlan.of([structure], {"model.layers": torch.tensor([1])})
        assert cuts.renamed("model.layers.0.attn.Wo.weight") == "model.layers.0.attn.Wo.weight"
        assert cuts.renamed("model.layers.1.attn.Wo.weight") is None
        assert cuts.renamed("model.layers.2.attn.Wo.weight") == "model.layers.1.attn.Wo.weight"
        assert cuts.renamed("model.layers.3") is None
        assert cuts.renamed("model.embeddings.norm.weight") == "model.embeddings.norm.weight"
        assert cuts.deleted_layers() == {"model.layers": (1, 3)}

    def test_ten_layers_and_more_are_numbered_as_numbers(self) -> None:
        names = tuple(f"h.{index}" for index in range(12))
        structure = PrunableGroup("h", GroupKind.LAYER, ("h",), 12, (), layers=names)
        cuts = PruningPlan.of([structure], {"h": torch.tensor([0, 10, 11])})
        assert [cuts.renamed(name) for name in ("h.1.w", "h.10.w", "h.11.w")] == [None, "h.1.w", "h.2.w"]

    def test_attention_keeps_its_place_in_the_cache(self) -> None:
        model: Any = ZOO["llama"]()
        _cut(model, GroupKind.LAYER).rewrite(model)
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
        tokens = torch.randint(3, 61, (1, 5))
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            again = model(generated, use_cache=False).logits.argmax(-1)
        assert torch.equal(again[0, 4:8], generated[0, 5:])

    def test_lists_about_layers_are_cut_with_them(self) -> None:
        model: Any = ZOO["gemma3"]()
        (structure,) = find_structures(model, GroupKind.LAYER).structures
        PruningPlan.of([structure], {structure.name: torch.tensor([0, 3])}).rewrite(model)
        assert model.config.num_hidden_layers == 2
        assert model.config.layer_types == ["sliding_attention", "full_attention"]


class TestRewrite:
    def test_sizes_that_torch_layers_remember(self) -> None:
        model: Any = ZOO["bert"]()
        _cut(model, GroupKind.ROW, GroupKind.HEAD).rewrite(model)
        layer = model.bert.encoder.layer[0]
        assert (layer.intermediate.dense.in_features, layer.intermediate.dense.out_features) == (32, 32)
        assert (layer.output.dense.in_features, layer.attention.output.dense.in_features) == (32, 16)
        own = layer.attention.self
        assert (own.num_attention_heads, own.attention_head_size, own.all_head_size) == (2, 8, 16)
        assert (model.config.intermediate_size, model.config.num_attention_heads) == (32, 2)

    def test_sizes_of_transposed_layers(self) -> None:
        model: Any = ZOO["gpt2"]()
        _cut(model, GroupKind.ROW, GroupKind.HEAD).rewrite(model)
        block = model.transformer.h[0]
        assert (block.mlp.c_fc.nx, block.mlp.c_fc.nf, block.mlp.c_proj.nx) == (32, 64, 64)
        assert (block.attn.num_heads, block.attn.split_size, block.attn.head_dim) == (2, 16, 8)
        assert (model.config.n_inner, model.config.n_head) == (64, 2)

    def test_numbers_of_grouped_heads(self) -> None:
        model: Any = ZOO["llama"]()
        _cut(model, GroupKind.HEAD).rewrite(model)
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
        assert (model.config.head_dim, model.config.hidden_size) == (4, 32)

    def test_only_query_heads_of_a_single_key_value_head(self) -> None:
        config = hf.LlamaConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=1,
            intermediate_size=48,
        )  # fmt: skip
        model: Any = hf.LlamaForCausalLM(config).eval()
        structures = find_structures(model, GroupKind.HEAD).structures
        kept = kept_units(structures)
        masked = masked_copy(model, structures, kept)
        PruningPlan.of(structures, kept).rewrite(model)
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 1)
        assert model.model.layers[0].self_attn.num_key_value_groups == 4
        torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "name", ["bert", "phi3", "t5_gated", "gpt2", "modernbert", "olmo2", "gemma3", "whisper"]
    )
    def test_other_numbers_in_every_layer(self, name: str) -> None:
        model = ZOO[name]().double()
        structures = [
            s for k in (GroupKind.ROW, GroupKind.HEAD) for s in find_structures(model, k).structures
        ]
        kept = {}
        for position, structure in enumerate(structures):
            kept |= kept_units([structure], (0.25, 0.75, 0.5, 1.0)[position % 4], seed=position)
        masked = masked_copy(model, structures, kept)
        before = model.config.to_dict()  # type: ignore[operator]
        PruningPlan.of(structures, kept).rewrite(model)
        torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=0, atol=1e-5)
        # There is no true value that the config could have instead.
        assert model.config.to_dict() == before  # type: ignore[operator]

    def test_layers_that_are_not_cut_count_for_the_config(self) -> None:
        model: Any = ZOO["llama"]()
        structures = find_structures(model, GroupKind.ROW).structures[:2]
        PruningPlan.of(structures, kept_units(structures)).rewrite(model)
        assert model.config.intermediate_size == 48

    def test_encoder_and_decoder_are_counted_apart_where_the_config_does(self) -> None:
        model: Any = ZOO["whisper"]()
        structures = [s for s in find_structures(model, GroupKind.ROW).structures if "decoder" in s.name]
        PruningPlan.of(structures, kept_units(structures)).rewrite(model)
        assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (64, 32)

    def test_ties_flags_hooks_and_modes_survive(self) -> None:
        model: Any = ZOO["llama"]().train()
        model.model.layers[0].mlp.eval()
        calls: list[str] = []
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append("called"))
        frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        untouched = model.model.layers[0].self_attn.o_proj.weight
        _cut(model, GroupKind.ROW).rewrite(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.model.layers[1].mlp.up_proj.weight.requires_grad and frozen.shape == (48, 32)
        assert model.model.layers[0].self_attn.o_proj.weight is untouched
        assert model.training and not model.model.layers[0].mlp.training
        logits_of(model)
        assert calls == ["called"]

    def test_dtypes_survive(self) -> None:
        model = ZOO["olmo2"]().to(torch.bfloat16)
        _cut(model, GroupKind.HEAD, GroupKind.HIDDEN).rewrite(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_a_cut_model_trains(self) -> None:
        model: Any = ZOO["qwen2"]().train()
        _cut(model, GroupKind.ROW, GroupKind.HEAD, GroupKind.LAYER, GroupKind.HIDDEN).rewrite(model)
        tokens = torch.randint(3, 61, (2, 8))
        model(tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())

    def test_cutting_twice_is_an_error_and_finding_anew_is_not(self) -> None:
        model = ZOO["llama"]()
        cuts = _cut(model, GroupKind.ROW)
        cuts.rewrite(model)
        with pytest.raises(ValueError, match="it was cut before"):
            cuts.rewrite(model)
        _cut(model, GroupKind.ROW).rewrite(model)
        assert model.config.intermediate_size == 12  # type: ignore[union-attr]

    def test_a_partitioned_model_is_an_error(self) -> None:
        model: Any = ZOO["llama"]()
        cuts = _cut(model, GroupKind.ROW)
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)
        with pytest.raises(ValueError, match="not whole in this process"):
            cuts.rewrite(model)

    def test_a_skeleton_must_be_meant(self) -> None:
        model = ZOO["llama"]()
        cuts = _cut(model, GroupKind.ROW)
        with pytest.raises(ValueError, match="skeleton=True"):
            cuts.rewrite(copy.deepcopy(model).to("meta"))

    def test_another_model_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="has no tensor"):
            _cut(ZOO["bert"](), GroupKind.ROW).rewrite(ZOO["llama"]())

    def test_a_skeleton_whose_ties_are_lost_is_cut_everywhere(self) -> None:
        model: Any = ZOO["llama"]()
        found = _cut(model, GroupKind.HIDDEN)
        cuts = PruningPlan.of(found.structures, found.kept, model)
        skeleton: Any = copy.deepcopy(model).to("meta")
        assert skeleton.lm_head.weight is not skeleton.model.embed_tokens.weight
        cuts.rewrite(skeleton, skeleton=True)
        assert skeleton.lm_head.weight.shape == skeleton.model.embed_tokens.weight.shape == (61, 16)
