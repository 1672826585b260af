"""The schema as editors get it, and configs that name it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ds_compress import parse_config
from ds_compress.cli import app
from ds_compress.compat.migrate import migrate
from ds_compress.config import ConfigError
from ds_compress.config.schema.compression_training import json_schema
from ds_compress.config.schema.source import block_of
from tests.complete_block import COMPLETE

GROUPS = {"all": {"params": {"start_bits": 8, "target_bits": 8}}}
BLOCK: dict[str, Any] = {
    "weight_quantization": {"shared_parameters": {"enabled": True}, "different_groups": GROUPS}
}
ADDRESS = {"$schema": "./ds_compress.schema.json"}


def schema(*options: str | Path) -> Result:
    return CliRunner().invoke(app, ["schema", *map(str, options)])


def test_it_is_printed_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ds_compress", "schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json_schema()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported and not imported & {"torch", "deepspeed", "transformers"}


def test_it_is_written_and_replaces_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "ds_compress.schema.json"
    result = schema("--out", out)
    assert result.exit_code == 0 and '"$schema": "./ds_compress.schema.json"' in result.stdout
    assert json.loads(out.read_text()) == json_schema()
    assert schema("--out", out).exit_code == 0
    out.write_text("mine")
    result = schema("--out", out)
    assert result.exit_code == 2 and "--overwrite" in result.stderr and out.read_text() == "mine"
    assert schema("--out", out, "--overwrite").exit_code == 0
    assert json.loads(out.read_text()) == json_schema()


def test_every_reference_in_it_is_there() -> None:
    found = json_schema()

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [name for item in value.values() for name in references(item)]
        return [name for item in value for name in references(item)] if isinstance(value, list) else []

    assert {name.removeprefix("#/$defs/") for name in references(found)} <= set(found["$defs"])


def test_a_validator_accepts_a_whole_config_that_names_it_and_no_slip() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for config in (
        {**ADDRESS, "train_batch_size": 8, "compression_training": COMPLETE},
        {"compression_training": {**ADDRESS, **BLOCK}},
    ):
        assert [error.message for error in validator.iter_errors(config)] == []
    assert not validator.is_valid({**ADDRESS, "compression_training": {"weight_quantisation": {}}})
    assert not validator.is_valid({"$schema": 3})


def test_the_key_means_nothing_to_anybody_else(tmp_path: Path) -> None:
    expected = parse_config(BLOCK)
    path = tmp_path / "config.json"
    for config in (
        {**ADDRESS, "compression_training": BLOCK},
        {"compression_training": {**ADDRESS, **BLOCK}},
        {**ADDRESS, **BLOCK},
    ):
        path.write_text(json.dumps(config))
        assert parse_config(block_of(path)) == expected
        assert migrate(config).config.get("$schema", ADDRESS["$schema"]) == ADDRESS["$schema"]
    with pytest.raises(ConfigError, match="the key"):
        block_of({**ADDRESS, "train_batch_size": 8})
    with pytest.raises(ConfigError, match="unknown key"):
        parse_config({"$schema": 3})


def test_training_accepts_the_key_and_deepspeed_does_not_see_it() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = {**ADDRESS, "train_micro_batch_size_per_gpu": 1, "compression_training": {**ADDRESS, **BLOCK}}
    parsed: Any = DeepSpeedConfig(config)
    assert parsed._ds_compress_config == parse_config(BLOCK)
    assert "$schema" not in parsed._param_dict and "$schema" in config
