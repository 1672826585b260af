"""Rows, heads, layers and hidden sizes: what is found, under which name, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import FoundGroups, find_groups
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup
from ds_compress.structure.pruning_plan import PruningPlan
from tests.zoo.models import ZOO

_LLAMA: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "pad_token_id": 0,
}


def _slices(group: PrunableGroup) -> dict[str, CoupledSlice]:
    return {coupled.tensor: coupled for coupled in group.slices}


def _reasons(found: FoundGroups) -> dict[str, str]:
    return {refusal.module: refusal.reason for refusal in found.unsupported}


class PlainAttention(nn.Module):
    """Somebody's own attention, with 32 inputs."""

    def __init__(self, heads: int | None = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.o = nn.Linear(32, 32)
        if heads is not None:
            self.num_heads = heads


class TestRows:
    def test_a_block_is_named_after_its_module_and_reached_by_its_projections(self) -> None:
        llama = find_groups(ZOO["llama"](), GroupKind.ROW).groups[0]
        assert llama.name == "model.layers.0.mlp"
        assert llama.modules == (
            "model.layers.0.mlp",
            "model.layers.0.mlp.gate_proj",
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.down_proj",
        )
        bert = find_groups(ZOO["bert"](), GroupKind.ROW).groups[1]
        assert bert.name == "bert.encoder.layer.1.intermediate.dense"
        assert bert.modules == (bert.name, "bert.encoder.layer.1.output.dense")
        assert bert.observed == "bert.encoder.layer.1.output.dense"

    def test_only_what_writes_neurons_is_scored(self) -> None:
        slices = _slices(find_groups(ZOO["llama"](), GroupKind.ROW).groups[0])
        scored = {name.split(".")[-2]: coupled.scored for name, coupled in slices.items()}
        assert scored == {"gate_proj": True, "up_proj": True, "down_proj": False}

    def test_a_transposed_layer_has_its_units_in_the_other_dimension(self) -> None:
        slices = _slices(find_groups(ZOO["gpt2"](), GroupKind.ROW).groups[0])
        assert slices["transformer.h.0.mlp.c_fc.weight"].dim == 1
        assert slices["transformer.h.0.mlp.c_fc.bias"].dim == 0
        assert slices["transformer.h.0.mlp.c_proj.weight"].dim == 0

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [("modernbert", "model.layers.0.mlp.Wi.weight"), ("phi3", "model.layers.0.mlp.gate_up_proj.weight")],
    )
    def test_fused_gate_and_up_are_two_rows_per_neuron(self, name: str, tensor: str) -> None:
        group = find_groups(ZOO[name](), GroupKind.ROW).groups[0]
        index = _slices(group)[tensor].index
        assert group.units == 48
        assert index.shape == (48, 2) and index[5].tolist() == [5, 53]

    def test_as_many_neurons_as_inputs_are_told_by_name(self) -> None:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**_LLAMA, "intermediate_size": 32}))
        groups = find_groups(model, GroupKind.ROW).groups
        assert [group.name for group in groups] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert _slices(groups[0])["model.layers.0.mlp.down_proj.weight"].dim == 1

    def test_neighbours_in_a_sequence_are_a_block_when_what_is_between_is_elementwise(self) -> None:
        plain = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 8))
        assert [s.name for s in find_groups(nn.ModuleList([plain]), GroupKind.ROW).groups] == ["0"]
        normed = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8))
        assert not find_groups(nn.ModuleList([normed]), GroupKind.ROW).groups

    def test_a_layer_between_two_projections_is_refused(self) -> None:
        class Mixing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc1, self.depthwise, self.fc2 = (
                    nn.Linear(8, 32),
                    nn.Conv1d(32, 32, 3, groups=32),
                    nn.Linear(32, 8),
                )

        found = find_groups(nn.ModuleList([Mixing()]), GroupKind.ROW)
        assert not found.groups
        assert "0.depthwise.weight" in _reasons(found)["0.fc1"]

    def test_experts_are_one_group_for_a_layer(self) -> None:
        config = hf.MixtralConfig(**_LLAMA, num_key_value_heads=4, num_local_experts=4)
        found = find_groups(hf.MixtralForCausalLM(config), GroupKind.ROW)
        assert not found.unsupported
        assert {group.parts for group in found.groups} == {4}
        assert found.groups[0].name == "model.layers.0.mlp.experts"

    def test_experts_in_an_unknown_layout_are_refused(self) -> None:
        class OddExperts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.matrices = nn.Parameter(torch.zeros(4, 8, 8))

        found = find_groups(nn.ModuleDict({"experts": OddExperts()}), GroupKind.ROW)
        assert not found.groups
        assert "not known here" in _reasons(found)["experts"]

    def test_adapters_are_refused_by_name(self) -> None:
        class Adapted(nn.Module):
            def __init__(self, base: nn.Linear) -> None:
                super().__init__()
                self.base_layer = base

        model = ZOO["llama"]()
        mlp: Any = model.get_submodule("model.layers.1.mlp")
        mlp.up_proj = Adapted(mlp.up_proj)
        found = find_groups(model, GroupKind.ROW)
        assert [group.name for group in found.groups] == [f"model.layers.{i}.mlp" for i in (0, 2, 3)]
        assert "up_proj is a Adapted" in _reasons(found)["model.layers.1.mlp"]

    def test_a_weight_that_another_module_shares_is_refused(self) -> None:
        model = ZOO["llama"]()
        layers: Any = model.get_submodule("model.layers")
        layers[3].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
        found = find_groups(model, GroupKind.ROW)
        assert [group.name for group in found.groups] == [f"model.layers.{i}.mlp" for i in (1, 2)]
        assert "tied to model.layers.3.mlp.up_proj.weight" in _reasons(found)["model.layers.0.mlp"]

    def test_partitioned_weights_are_found_by_their_full_shape(self) -> None:
        whole = find_groups(ZOO["phi3"](), GroupKind.ROW).groups
        model = ZOO["phi3"]()
        for parameter in model.parameters():
            parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)
        for kind in (GroupKind.ROW, GroupKind.HEAD, GroupKind.LAYER, GroupKind.HIDDEN):
            assert find_groups(model, kind).groups
        partitioned = find_groups(model, GroupKind.ROW).groups
        assert [s.units for s in partitioned] == [s.units for s in whole]


class TestHeads:
    def test_legacy_scores_are_the_columns_of_the_output_projection(self) -> None:
        group = find_groups(ZOO["bert"](), GroupKind.HEAD).groups[0]
        assert group.name == "bert.encoder.layer.0.attention"
        assert [m.tensor for m in group.slices if m.scored] == [
            "bert.encoder.layer.0.attention.output.dense.weight"
        ]
        assert group.observed == "bert.encoder.layer.0.attention.output.dense"
        assert "bert.encoder.layer.0.attention.self.query" in group.modules

    def test_a_unit_is_a_group_of_heads_that_share_keys_and_values(self) -> None:
        group = find_groups(ZOO["llama"](), GroupKind.HEAD).groups[0]
        slices = _slices(group)
        assert group.units == 4
        assert slices["model.layers.0.self_attn.q_proj.weight"].index[1].tolist() == list(range(8, 16))
        assert slices["model.layers.0.self_attn.k_proj.weight"].index[1].tolist() == list(range(4, 8))

    def test_a_single_key_value_head_stays_and_query_heads_go_alone(self) -> None:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, num_key_value_heads=1))
        group = find_groups(model, GroupKind.HEAD).groups[0]
        assert group.units == 8
        assert {name.split(".")[-2] for name in _slices(group)} == {"q_proj", "o_proj"}

    @pytest.mark.parametrize(
        ("name", "tensor", "rows"),
        [
            ("gpt2", "attn.c_attn.weight", [[8], [40], [72]]),
            ("gpt_neox", "attention.query_key_value.weight", [[24, 32, 40]]),
            ("modernbert", "attn.Wqkv.weight", [[8], [40], [72]]),
            ("phi3", "self_attn.qkv_proj.weight", [[8, 12], [36], [52]]),
        ],
    )
    def test_fused_projections(self, name: str, tensor: str, rows: list[list[int]]) -> None:
        """`rows`: in each member, where the (query) heads of unit 1 begin."""
        group = find_groups(ZOO[name](), GroupKind.HEAD).groups[0]
        own = [coupled for coupled in group.slices if coupled.tensor.endswith(tensor)]
        assert len(own) == len(rows)
        for coupled, starts in zip(own, rows, strict=True):
            head_dim = 4 if name == "phi3" else 8
            assert coupled.index[1].tolist()[::head_dim] == starts

    def test_layers_that_share_a_position_bias_are_one_structure(self) -> None:
        groups = find_groups(ZOO["t5"](), GroupKind.HEAD).groups
        assert [group.name for group in groups] == [
            "encoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.1.EncDecAttention",
        ]
        table = _slices(groups[0])["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        assert table.dim == 1 and not table.masked
        assert groups[0].observed is None

    def test_norms_over_all_heads_are_rescaled_and_those_of_a_head_untouched(self) -> None:
        over_all = _slices(find_groups(ZOO["olmo2"](), GroupKind.HEAD).groups[0])
        norm = over_all["model.layers.0.self_attn.q_norm.weight"]
        assert norm.rescale == -0.5 and not norm.masked
        of_each = _slices(find_groups(ZOO["qwen3"](), GroupKind.HEAD).groups[0])
        assert not [name for name in of_each if "norm" in name]

    def test_ones_own_attention(self) -> None:
        found = find_groups(nn.ModuleList([PlainAttention()]), GroupKind.HEAD)
        assert [(s.name, s.units) for s in found.groups] == [("0", 4)]

    def test_the_number_of_heads_may_come_from_the_config(self) -> None:
        model = nn.ModuleList([PlainAttention(None)])
        assert "num_heads" in _reasons(find_groups(model, GroupKind.HEAD))["0"]
        assert find_groups(model, GroupKind.HEAD, num_heads=8).groups[0].units == 8

    def test_torchs_own_attention_is_refused(self) -> None:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
        found = find_groups(model, GroupKind.HEAD)
        assert not found.groups
        assert "MultiheadAttention" in _reasons(found)["layers.0.self_attn"]
        # Its feed-forward blocks are like any others.
        assert len(find_groups(model, GroupKind.ROW).groups) == 2

    def test_an_unknown_fused_layout_is_refused(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.num_heads = 4
                self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

        found = find_groups(nn.ModuleList([Attention()]), GroupKind.HEAD)
        assert "0.qkv lays out" in _reasons(found)["0"] and "related_modules" in _reasons(found)["0"]

    def test_weights_of_unknown_meaning_are_refused(self) -> None:
        model = nn.ModuleList([PlainAttention()])
        attention: Any = model[0]
        attention.talking = nn.Linear(4, 4)
        assert "0.talking" in _reasons(find_groups(model, GroupKind.HEAD))["0"]
        attention.talking = nn.Identity()
        attention.slopes = nn.Parameter(torch.ones(4))
        assert "a parameter slopes" in _reasons(find_groups(model, GroupKind.HEAD))["0"]

    def test_a_table_of_biases_above_the_layers_is_refused(self) -> None:
        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([PlainAttention()])
                self.relative_attention_bias = nn.Embedding(16, 4)

        found = find_groups(nn.ModuleList([Encoder()]), GroupKind.HEAD)
        assert "0.relative_attention_bias.weight" in _reasons(found)["0.layers.0"]


class TestLayers:
    def test_stacks_of_a_model_made_of_two(self) -> None:
        encoder = hf.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
        )
        decoder = hf.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=3, n_head=4, add_cross_attention=True, is_decoder=True
        )
        config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        model: Any = hf.VisionEncoderDecoderModel(config)
        found = find_groups(model, GroupKind.LAYER).groups
        assert [(s.name, s.units) for s in found] == [("encoder.layers", 2), ("decoder.transformer.h", 3)]
        kept = {"encoder.layers": torch.tensor([1]), "decoder.transformer.h": torch.tensor([0, 2])}
        apply_pruning(model, PruningPlan.of(found, kept))
        assert (model.config.encoder.num_hidden_layers, model.config.decoder.n_layer) == (1, 2)

    def test_encoder_decoders_have_two_stacks(self) -> None:
        found = find_groups(ZOO["whisper"](), GroupKind.LAYER)
        assert [(s.name, s.units) for s in found.groups] == [
            ("model.encoder.layers", 4),
            ("model.decoder.layers", 4),
        ]

    @pytest.mark.parametrize("name", ["t5", "modernbert"])
    def test_a_first_layer_unlike_the_others_is_no_unit(self, name: str) -> None:
        group = find_groups(ZOO[name](), GroupKind.LAYER).groups[0]
        assert [layer.rpartition(".")[2] for layer in group.layers] == ["1", "2", "3"]

    def test_stages_that_change_the_width_are_no_units(self) -> None:
        found = find_groups(ZOO["resnet"](), GroupKind.LAYER)
        assert not found.groups and "all different" in found.unsupported[0].reason

    def test_a_model_without_layers_is_refused(self) -> None:
        found = find_groups(nn.Linear(2, 2), GroupKind.LAYER)
        assert "ModuleList" in found.unsupported[0].reason and "\n" not in found.unsupported[0].reason


class TestHidden:
    def test_norms_are_only_cut_and_rescaled(self) -> None:
        (group,) = find_groups(ZOO["llama"](), GroupKind.HIDDEN).groups
        assert group.units == 32
        for coupled in group.slices:
            is_norm = "norm" in coupled.tensor
            assert coupled.masked == coupled.scored == (not is_norm)
            assert coupled.rescale == (-0.5 if is_norm else 0.0)

    def test_tied_embeddings_are_one_member(self) -> None:
        (tied,) = find_groups(ZOO["llama"](), GroupKind.HIDDEN).groups
        assert "lm_head.weight" not in _slices(tied) and "lm_head" in tied.modules
        (untied,) = find_groups(ZOO["llama_untied"](), GroupKind.HIDDEN).groups
        assert "lm_head.weight" in _slices(untied)

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("bert", "bert.embeddings.LayerNorm is a LayerNorm"),
            ("gemma2", "root of the hidden size"),
            ("t5", "scaled by the hidden size"),
            ("cnn", "not known"),
        ],
    )
    def test_reasons(self, name: str, reason: str) -> None:
        (refusal,) = find_groups(ZOO[name](), GroupKind.HIDDEN).unsupported
        assert reason in refusal.reason

    def test_a_model_that_gives_its_hidden_states_away_is_refused(self) -> None:
        found = find_groups(hf.LlamaModel(hf.LlamaConfig(**_LLAMA)), GroupKind.HIDDEN)
        assert "gives its hidden states" in found.unsupported[0].reason


@pytest.mark.parametrize("name", ZOO)
def test_members_fit_their_tensors(name: str) -> None:
    model = ZOO[name]()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    names: list[str] = []
    for kind in (GroupKind.ROW, GroupKind.HEAD, GroupKind.LAYER, GroupKind.HIDDEN):
        for group in find_groups(model, kind).groups:
            names.append(group.name)
            assert set(group.modules) <= set(modules)
            if group.observed is not None:
                assert group.observed_index is not None and group.observed in group.modules
                weight = modules[group.observed].get_parameter("weight")
                reads = [m for m in group.slices if tensors[m.tensor] is weight]
                assert any(torch.equal(coupled.index, group.observed_index) for coupled in reads)
            seen: dict[tuple[str, int], list[int]] = {}
            for coupled in group.slices:
                assert coupled.index.dtype is torch.int64 and coupled.index.shape[0] == group.units
                seen.setdefault((coupled.tensor, coupled.dim), []).extend(coupled.index.flatten().tolist())
            for (tensor, dim), entries in seen.items():
                assert len(set(entries)) == len(entries) and max(entries) < tensors[tensor].shape[dim]
    assert len(set(names)) == len(names)
