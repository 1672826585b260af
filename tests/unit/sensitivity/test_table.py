"""A table as a file: as it was written, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_compress.sensitivity.increase import Metric
from ds_compress.sensitivity.table import GroupSensitivity, Sensitivity
from ds_compress.sheet import uncut

TABLE = Sensitivity(
    "LlamaForCausalLM",
    Metric.KL,
    ("int4", "nvfp4"),
    {
        "a.{q,k}": GroupSensitivity(("a.q", "a.k"), 128, {"int4": 0.5, "nvfp4": None}),
        "b": GroupSensitivity(("b",), 64, {"int4": 0.25}),
    },
    10,
    70,
    {"seed": 3},
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    TABLE.write(tmp_path / "s.json")
    assert Sensitivity.read(tmp_path / "s.json") == TABLE


def test_it_prints_what_does_not_fit_and_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    uncut().print(TABLE)
    printed = capsys.readouterr().out
    assert "not finite" in printed and "nats per prediction" in printed and "a.{q,k}" in printed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version 2"),
        (("formats",), ["int4", "int99"], "damaged table.*int99"),
        (("formats",), ["int4"], "damaged table.*does not list"),
        (("groups",), {}, "damaged table.*no groups"),
        (("groups", "b", "increase", "int4"), "0.5", "damaged table.*number"),
        (("groups", "b", "increase", "int4"), True, "damaged table.*number"),
        (("groups", "b", "modules"), "b", "damaged table.*list"),
        (("groups", "b"), None, "damaged table"),
        (("metric",), "fisher", "damaged table.*fisher"),
    ],
)
def test_damaged_files(tmp_path: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    content: Any = TABLE.as_data()
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "s.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"s.json .*{message}"):
        Sensitivity.read(file)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"version": 1}'])
def test_other_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"s\.json is no"):
        Sensitivity.read(file)
