"""The command: each subcommand on real folders, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ds_compress.cli import app
from ds_compress.export.report import ExportReport
from tests.zoo.models import ZOO


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ZOO["bert_classifier"]().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    return tmp_path / "model"


def test_export_and_inspect(model: Path, tmp_path: Path) -> None:
    result = invoke("export", model, tmp_path / "out", "--format", "torch")
    assert result.exit_code == 0, result.output
    assert "smaller than fp32" in result.output and "checked with" in result.output
    assert ExportReport.read(tmp_path / "out").format == "torch"
    result = invoke("inspect", tmp_path / "out")
    assert result.exit_code == 0 and "word_embeddings" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "nowhere", "out"), "is no checkpoint"),
        (("inspect", "nowhere"), "no such file"),
        (("plan", "nowhere", "config.json"), "no config.json"),
    ],
)
def test_errors_are_one_line_and_code_2(arguments: tuple[str, ...], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_existing_folder_needs_overwrite(model: Path, tmp_path: Path) -> None:
    assert invoke("export", model, tmp_path / "out", "--no-check").exit_code == 0
    assert invoke("export", model, tmp_path / "out", "--no-check").exit_code == 2
    assert invoke("export", model, tmp_path / "out", "--no-check", "--overwrite").exit_code == 0


def test_damage_is_found_by_inspect(model: Path, tmp_path: Path) -> None:
    assert invoke("export", model, tmp_path / "out", "--no-check").exit_code == 0
    assert invoke("inspect", tmp_path / "out").exit_code == 0
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = invoke("inspect", tmp_path / "out")
    assert result.exit_code == 2 and "model.safetensors was changed" in result.stderr


def test_plan(model: Path, tmp_path: Path) -> None:
    block = {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1"},
            "different_groups": {"a": {"params": {"dense_ratio": 0.5}, "modules": ["layer"]}},
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(block))
    result = invoke("plan", model, tmp_path / "config.json")
    assert result.exit_code == 0 and "sparse_pruning" in result.output
