"""What is made from the recipes is in step with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_compress.config.recipes import find, newest
from ds_compress.config.recipes.__main__ import ZERO_STAGES, files, main
from ds_compress.config.recipes.deepspeed import json_text, whole_config

FOLDER = Path(__file__).parents[4] / "ds_configs" / "recipes"


def test_the_configs_are_current() -> None:
    """python -m ds_compress.config.recipes ds_configs/recipes"""
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == dict(files())
    assert len(dict(files())) == len(newest()) * len(ZERO_STAGES)


def test_stale_missing_and_foreign_files_are_found_and_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0 and main(["--check", str(tmp_path)]) == 0
    (tmp_path / "fp8_zero2.json").write_text("{}")
    (tmp_path / "fp8_zero3.json").unlink()
    (tmp_path / "gone_zero2.json").write_text("{}")
    capsys.readouterr()
    assert main(["--check", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3 and "gone_zero2.json is stale" in said
    assert main([str(tmp_path)]) == 0 and main(["--check", str(tmp_path)]) == 0
    assert not (tmp_path / "gone_zero2.json").exists()


@pytest.mark.parametrize("arguments", [[], ["--check"], ["a", "b"], ["--all", "a"]])
def test_usage(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_recipes_are_written_as_the_configs_are() -> None:
    import ds_compress.config.recipes as package

    for path in Path(package.__file__).parent.glob("*.json"):
        assert path.read_text() == json_text(json.loads(path.read_text())), path.name


def test_what_stands_around_the_block() -> None:
    config = whole_config(find("bad_workers"), 3, batch_size=2, steps=200, on_gpu=True)
    assert config["optimizer"]["params"] == {"lr": 1e-4, "weight_decay": 0.01, "betas": [0.0, 0.999]}
    assert config["scheduler"]["params"]["total_num_steps"] == 200
    assert config["scheduler"]["params"]["warmup_num_steps"] == 10
    assert config["zero_optimization"] == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert whole_config(find("llm"), 1)["optimizer"]["params"]["lr"] == 1e-5


def test_what_a_trainer_decides_is_auto() -> None:
    config = whole_config(find("w8a8"), 2, for_trainer=True)
    assert config["optimizer"]["params"] == {"lr": "auto", "weight_decay": "auto", "torch_adam": True}
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    assert config["compression_training"] == {"scheme": "W8A8"}


@pytest.mark.parametrize(
    "value", [{}, [], {"a": []}, [{"b": {}}], "text", 1.5, None, {"a": ["x" * 60, "y" * 60]}]
)
def test_text_is_json(value: object) -> None:
    text = json_text(value)
    assert json.loads(text) == value
    assert all(len(line) <= 110 for line in text.splitlines())
