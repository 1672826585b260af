"""The command: its exit status, and where it prints what."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ds_compress.cli import app
from tests.multirank.common import ds_config, pruning_block
from tests.zoo.models import ZOO


def validate(config: Any, folder: Path, *options: str | Path) -> Result:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return CliRunner().invoke(app, ["validate", str(path), *map(str, options)])


def test_valid(tmp_path: Path) -> None:
    result = validate(ds_config(2, pruning_block()), tmp_path)
    assert result.exit_code == 0 and result.stdout.startswith("valid: ")
    assert "sparse_pruning" in result.stdout and result.stderr == ""


def test_all_problems_are_on_standard_error(tmp_path: Path) -> None:
    config = ds_config(3, {"sparse_prunning": {}}, zero={"zero_quantized_weights": True})
    result = validate(config, tmp_path)
    assert result.exit_code == 1 and result.stdout == ""
    for words in (
        "2 problems",
        "compression_training.sparse_prunning",
        "did you mean",
        "zero_quantized_weights",
    ):
        assert words in result.stderr
    result = validate(config, tmp_path, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 1 and data["ok"] is False and "2 problems" in result.stderr
    assert [set(problem) for problem in data["problems"]] == [{"path", "got", "allowed", "hint"}] * 2


@pytest.mark.parametrize(
    "text", ['{"compression_training": ', "[1]", '{"a": 1, "a": 2}', '{"train_batch_size": 8}']
)
def test_what_is_no_config_is_not_valid(tmp_path: Path, text: str) -> None:
    result = validate(text, tmp_path)
    assert result.exit_code == 1 and "1 problem" in result.stderr


def test_with_a_model(tmp_path: Path) -> None:
    ZOO["bert_classifier"]().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "model" / "model.safetensors").unlink()
    block = pruning_block()
    assert validate(ds_config(2, block), tmp_path, "--model", tmp_path / "model").exit_code == 0
    block = copy.deepcopy(block)
    next(iter(block["sparse_pruning"]["different_groups"].values()))["modules"] = ["no_such_layer"]
    assert validate(ds_config(2, block), tmp_path).exit_code == 0
    result = validate(ds_config(2, block), tmp_path, "--model", tmp_path / "model", "--json")
    assert result.exit_code == 1 and "reaches none" in json.loads(result.stdout)["problems"][0]["got"]


@pytest.mark.parametrize("arguments", [["nowhere.json"], ["{}", "--model", "nowhere"], []])
def test_usage_is_2(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(pruning_block()))
    given = [str(tmp_path / "config.json") if word == "{}" else word for word in arguments]
    result = CliRunner().invoke(app, ["validate", *given])
    assert result.exit_code == 2 and result.stdout == ""
