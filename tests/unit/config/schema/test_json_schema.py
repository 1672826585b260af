"""The JSON schema that the package ships for editors."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress.config.schema import __main__ as schema_program
from ds_compress.config.schema import compression_training as schema_module


class TestJsonSchema:
    def test_the_shipped_file_is_current(self) -> None:
        assert schema_module.SCHEMA_FILE.read_text(encoding="utf-8") == schema_module.schema_text()

    def test_it_describes_a_whole_deepspeed_config(self) -> None:
        schema = schema_module.json_schema()
        definitions = schema["$defs"]
        block = definitions["CompressionConfig"]
        assert schema["properties"]["compression_training"] == {"$ref": "#/$defs/CompressionConfig"}
        assert "additionalProperties" not in schema
        assert block["additionalProperties"] is False
        ratio = definitions["SparsePruningParams"]["properties"]["dense_ratio"]["anyOf"][0]
        assert (ratio["exclusiveMinimum"], ratio["maximum"]) == (0, 1)
        bits = definitions["ActivationQuantizationParams"]["properties"]["bits"]["anyOf"][0]
        assert (bits["type"], bits["minimum"], bits["maximum"]) == ("integer", 4, 8)

    def test_every_field_is_documented(self) -> None:
        for name, definition in schema_module.json_schema()["$defs"].items():
            for key, field in definition["properties"].items():
                assert field.get("description"), f"{name}.{key} has no description"

    def test_writing_is_atomic_and_check_notices_a_stale_file(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "schema.json"
        monkeypatch.setattr(schema_module, "SCHEMA_FILE", path)
        assert schema_program.main(["--check"]) == 1
        path.write_text("stale")
        assert schema_program.main(["--check"]) == 1
        schema_module.write_schema(path)
        assert schema_program.main(["--check"]) == 0
        assert [file.name for file in tmp_path.iterdir()] == ["schema.json"]

    def test_an_interrupted_write_leaves_the_old_file(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "schema.json"
        path.write_text("old")

        def interrupted() -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(schema_module, "schema_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            schema_module.write_schema(path)
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["schema.json"]
