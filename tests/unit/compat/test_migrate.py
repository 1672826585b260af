"""`ds_compress migrate`: meaning kept, differences said, what has no counterpart refused; and the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ds_compress import plan
from ds_compress.cli import app
from ds_compress.compat import init_compression
from ds_compress.compat.migrate import Migration, NoteKind, migrate
from ds_compress.config import ConfigError, parse_config
from ds_compress.engine.registry import run_of
from ds_compress.engine.zero.internals import removed_config_keys
from tests.legacy_blocks import (
    CHANNELS,
    ENCODER_BLOCKS,
    HEADS,
    REDUCTION,
    ConvNet,
    row_pruning,
    sparse_pruning,
)
from tests.models import tiny_bert
from tests.multirank.common import ds_config

BLOCKS = {**ENCODER_BLOCKS, "channel_pruning": CHANNELS}


def of_block(block: dict[str, Any]) -> tuple[dict[str, Any], Migration]:
    result = migrate({"compression_training": block})
    return result.config["compression_training"], result


def texts(result: Migration, kind: NoteKind, part: str) -> list[str]:
    return [note.text for note in result.notes if note.kind is kind and part in note.path]


@pytest.mark.parametrize("name", BLOCKS)
def test_migrated_jsons_parse_mean_the_same_and_stay(name: str) -> None:
    old = ds_config(2, copy.deepcopy(BLOCKS[name]))
    before = copy.deepcopy(old)
    result = migrate(old)
    assert old == before
    block = result.config["compression_training"]
    assert {k: v for k, v in result.config.items() if k != "compression_training"} == {
        k: v for k, v in old.items() if k != "compression_training"
    }
    parse_config(block)
    again = migrate(result.config)
    assert again.config == result.config and not texts(again, NoteKind.CHANGED, "")
    model = ConvNet() if name == "channel_pruning" else tiny_bert(layers=4)
    ours, theirs = plan(model, block), plan(model, BLOCKS[name])
    for key, technique in theirs.techniques.items():
        assert [t.module_name for t in ours.techniques[key].targets] == [
            t.module_name for t in technique.targets
        ]
        assert ours.techniques[key].shared.schedule_offset == technique.shared.schedule_offset


def test_a_json_without_anything_old_is_left_alone() -> None:
    for config in ({"train_batch_size": 4}, {"compression_training": {"row_pruning": {"dense_ratio": 0.5}}}):
        result = migrate(config)
        assert result.config == config and result.notes == []


def test_documented_offsets_are_written() -> None:
    block = {**sparse_pruning("l1"), **ENCODER_BLOCKS["activation_quantization_static"]}
    block = copy.deepcopy(block)
    for technique in block.values():
        del technique["shared_parameters"]["schedule_offset"]
    made, result = of_block(block)
    for key, technique in made.items():
        assert technique["shared_parameters"]["schedule_offset"] == 0
        assert "1000" in texts(result, NoteKind.CHANGED, key)[0]
    assert "KeyError" in texts(result, NoteKind.NOW, "sparse_pruning")[0]
    assert "all processes" in texts(result, NoteKind.NOW, "range_calibration")[0]


def test_counts_of_rows_are_rounded_up_as_before() -> None:
    block = row_pruning("l1")
    block["row_pruning"]["different_groups"]["rp1"]["params"]["dense_ratio"] = 0.3
    made, _ = of_block(block)
    assert made["row_pruning"]["shared_parameters"]["round_to"] == 1
    targets = plan(tiny_bert(), made).structures["row_pruning"]
    from ds_compress.config.structure_targets import kept_units

    assert targets.shared.rounds_up and kept_units(0.3, 96, 1, rounds_up=True) == 29  # ceil(28.8)
    assert kept_units(0.26, 96, 1, rounds_up=True) == 25  # ceil(24.96)
    assert kept_units(0.251, 96, 1, rounds_up=True) == 25  # ceil(24.096): nearest would be 24


def test_a_ladder_in_forward_is_said_and_kept() -> None:
    made, result = of_block(copy.deepcopy(ENCODER_BLOCKS["weight_quantization"]))
    assert made == ENCODER_BLOCKS["weight_quantization"]
    said = texts(result, NoteKind.NOW, "weight_quantization.different_groups")
    assert any("quantization_period 0" in text for text in said) and any("above 8" in text for text in said)
    assert any("narrow_range" in text for text in texts(result, NoteKind.BETTER, "quantization_type"))


def test_what_moq_and_forward_read_now() -> None:
    shared = {
        "rounding": "stochastic",
        "quantizer_kernel": True,
        "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.1},
    }
    block = copy.deepcopy(ENCODER_BLOCKS["weight_quantization"])
    block["weight_quantization"]["shared_parameters"] |= shared
    _, result = of_block(block)
    for key, word in (
        ("rounding", "to nearest"),
        ("quantizer_kernel", "does not start"),
        ("fp16_mixed", "never read"),
    ):
        assert word in texts(result, NoteKind.NOW, key)[0]
    block["weight_quantization"]["shared_parameters"]["quantize_weight_in_forward"] = False
    _, result = of_block(block)
    assert not texts(result, NoteKind.NOW, "rounding") and not texts(result, NoteKind.NOW, "fp16_mixed")
    assert "MoQ" in texts(result, NoteKind.NOW, "quantize_weight_in_forward")[0]


def test_letters_nulls_and_keys_that_nothing_reads() -> None:
    block = copy.deepcopy(HEADS)
    group = block["head_pruning"]["different_groups"]["rp1"]
    block["head_pruning"]["shared_parameters"]["method"] = "l1"
    group |= {"modules": "attention.output.dense", "related_modules": None, "comment": "heads"}
    made, result = of_block(block)
    assert made["head_pruning"]["different_groups"]["rp1"] == {
        "params": {"dense_ratio": 0.5},
        "modules": ["attention.output.dense"],
    }
    assert len(texts(result, NoteKind.CHANGED, "rp1")) == 3
    assert "NotImplementedError" in texts(result, NoteKind.NOW, "method")[0]


def test_an_enabled_block_without_groups_does_nothing_as_before() -> None:
    made, result = of_block({"row_pruning": {"shared_parameters": {"enabled": True}, "different_groups": {}}})
    assert made["row_pruning"]["shared_parameters"] == {"enabled": False}
    assert "did nothing" in texts(result, NoteKind.CHANGED, "enabled")[0]
    model = tiny_bert()
    init_compression(model, made)
    assert run_of(model) is None


def test_a_number_of_layers_that_nothing_read() -> None:
    block = copy.deepcopy(REDUCTION)
    block["layer_reduction"]["keep_number_layer"] = 5
    with pytest.raises(ConfigError):
        parse_config(block)
    made, result = of_block(block)
    assert made["layer_reduction"]["keep_number_layer"] == 2
    assert "never read" in texts(result, NoteKind.CHANGED, "keep_number_layer")[0]


def test_slips_are_named_and_not_dropped() -> None:
    block = copy.deepcopy(HEADS)
    block["head_pruning"]["different_groups"]["rp1"]["module"] = block["head_pruning"]["different_groups"][
        "rp1"
    ].pop("modules")
    with pytest.raises(ConfigError, match='did you mean "modules"'):
        of_block(block)


# -- what DeepSpeed removed beside the block -----------------------------------------------------------------------


MOQ = {
    "enabled": True,
    "quantize_verbose": True,
    "quantizer_kernel": False,
    "quantize-algo": {"q_type": "asymmetric", "rounding": "stochastic"},
    "quantize_bits": {"start_bits": 12, "target_bits": 6},
    "quantize_schedule": {"quantize_period": 400, "schedule_offset": 7},
    "quantize_groups": 8,
    "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.01},
    "eigenvalue": {"enabled": False, "layer_num": 12},
}


def test_moq_becomes_weight_quantization() -> None:
    result = migrate({"train_batch_size": 8, "quantize_training": MOQ})
    assert list(result.config) == ["train_batch_size", "compression_training"]
    quantization = parse_config(result.config["compression_training"]).weight_quantization
    assert quantization is not None
    shared, params = quantization.shared_parameters, quantization.groups["all"].params
    assert (shared.quantization_type, shared.rounding, shared.schedule_offset) == (
        "asymmetric",
        "stochastic",
        7,
    )
    assert (shared.quantize_groups, shared.quantize_weight_in_forward) == (8, False)
    assert shared.fp16_mixed_quantize.enabled and shared.fp16_mixed_quantize.quantize_change_ratio == 0.01
    assert (params.start_bits, params.target_bits, params.quantization_period) == (12, 6, 400)
    targets = plan(tiny_bert(), result.config).techniques["weight_quantization"].targets
    matrices = [name for name, weight in tiny_bert().named_parameters() if weight.dim() > 1]
    assert [target.param_name for target in targets] == matrices  # MoQ quantized all that has two dimensions
    assert migrate(result.config).config == result.config


def test_moq_defaults_are_the_old_ones() -> None:
    result = migrate({"quantize_training": {"enabled": True, "quantize_type": "symmetric"}})
    quantization = parse_config(result.config["compression_training"]).weight_quantization
    assert quantization is not None
    params = quantization.groups["all"].params
    assert quantization.shared_parameters.schedule_offset == 1000
    assert (params.start_bits, params.target_bits, params.quantization_period) == (16, 8, 1000)


OFF = {
    "eigenvalue": {"enabled": False},
    "quantize_training": {"enabled": False},
    "amp": {"enabled": False},
    "nebula": {"enabled": False},
    "elasticity": {"enabled": False},
    "curriculum_learning": {"enabled": False},
    "progressive_layer_drop": {"enabled": False},
    "sparse_gradients": True,
    "graph_harvesting": True,
    "zero_optimization": {"stage": 3, "mics_shard_size": -1, "mics_hierarchical_params_gather": False},
}


def test_what_is_off_goes() -> None:
    result = migrate({"train_batch_size": 1, **OFF})
    assert result.config == {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    assert len(result.notes) == 11


def test_every_removed_key_has_an_answer() -> None:
    top_level, of_zero = removed_config_keys()
    config: dict[str, Any] = {key: {"enabled": True} for key in top_level if key != "compression_training"}
    config["zero_optimization"] = dict.fromkeys(of_zero, 8)
    config["quantize_training"] = {"enabled": True, "eigenvalue": {"enabled": True}, "bits": 8}
    with pytest.raises(ConfigError) as caught:
        migrate(config)
    refused = {problem.path.split(".")[0] for problem in caught.value.problems}
    assert refused == {*top_level, "zero_optimization"} - {
        "compression_training",
        "sparse_gradients",
        "graph_harvesting",
    }
    assert all(problem.hint for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantize_training": 3}, "an object"),
        ({"quantize_training": {"enabled": True, "quantize_bits": 8}}, "an object"),
        ({"quantize_training": {"enabled": True, "quantize_bitz": {}}}, 'did you mean "quantize_bits"'),
        (
            {"quantize_training": MOQ, "compression_training": ENCODER_BLOCKS["weight_quantization"]},
            "one of the two",
        ),
        ({"compression_training": [1]}, "an object"),
        ([1], "a JSON object"),
    ],
)
def test_refusals(config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        migrate(config)


# -- the command ---------------------------------------------------------------------------------------------------


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["migrate", *map(str, arguments)])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.json"
    text = json.dumps(ds_config(0, {**HEADS, **row_pruning("topk")}))
    path.write_text("// a comment, as DeepSpeed allows\n" + text)
    return path


def test_the_command_writes_and_explains(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.json"
    result = invoke(old, "--output", new)
    assert result.exit_code == 0, result.output
    assert "changed compression_training.row_pruning.shared_parameters.round_to" in result.stdout
    assert f"written to {new}" in result.stdout
    parse_config(json.loads(new.read_text())["compression_training"])
    again = invoke(new, "--output", tmp_path / "again.json")
    assert again.exit_code == 0 and "nothing to change" in again.stdout
    assert (tmp_path / "again.json").read_text() == new.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "new.json", "old.json"]


def test_without_output_the_json_can_be_piped(old: Path) -> None:
    result = invoke(old)
    assert result.exit_code == 0
    assert (
        json.loads(result.stdout)["compression_training"]["row_pruning"]["shared_parameters"]["round_to"] == 1
    )
    assert "round_to" in result.stderr


def test_existing_files_need_overwrite(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.json"
    new.write_text("mine")
    result = invoke(old, "--output", new)
    assert result.exit_code == 2 and new.read_text() == "mine" and "--overwrite" in result.stderr
    assert invoke(old, "--output", new, "--overwrite").exit_code == 0 and new.read_text() != "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can be read"),
        ("{", "JSON"),
        ('{"compression_training": {"head_pruning": {"shared_parameters": {"enabled": "yes"}}}}', "enabled"),
        ('{"amp": {"enabled": true}}', "torch_autocast"),
    ],
)
def test_bad_input_is_one_line_and_code_2(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    result = invoke(path, "--output", tmp_path / "new.json")
    assert result.exit_code == 2 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout == ""
    assert not (tmp_path / "new.json").exists()
