"""A block that is written and does nothing is a warning when the engine is made."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress import parse_config
from ds_compress.config.schema.enabled import idle_lines
from tests.models import tiny_bert
from tests.multirank.common import ds_config, engine_of, pruning_block

pytestmark = pytest.mark.usefixtures("single_process")


def without_enabled(block: dict[str, Any]) -> dict[str, Any]:
    shared = dict(block["sparse_pruning"]["shared_parameters"])
    shared.pop("enabled")
    return {"sparse_pruning": {**block["sparse_pruning"], "shared_parameters": shared}}


def lines(block: dict[str, Any]) -> list[str]:
    return list(idle_lines(parse_config(block)))


def test_enabled_was_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(tiny_bert(), ds_config(1, without_enabled(pruning_block()))):
        pass
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(
        'add "enabled": true to compression_training.sparse_pruning.shared' in text for text in warnings
    )
    assert any("trains uncompressed" in text for text in warnings)


@pytest.mark.parametrize("name", ["gradient_compression", "layer_reduction"])
def test_a_block_without_shared_parameters(name: str) -> None:
    block = {name: {"keep_number_layer": 1} if name == "layer_reduction" else {"bits": 8}, **pruning_block()}
    (line,) = lines(block)
    assert line.endswith(f'add "enabled": true to compression_training.{name}')


def test_what_is_off_on_purpose_is_no_mistake_beside_what_is_on() -> None:
    block = {**pruning_block(), "gradient_compression": {"enabled": False}}
    assert lines(block) == []


def test_all_off_on_purpose_still_trains_uncompressed() -> None:
    (line,) = lines({"gradient_compression": {"enabled": False}})
    assert "trains uncompressed" in line


def test_an_empty_block(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = lines({})
    assert "nothing is in it" in line
    with engine_of(tiny_bert(), ds_config(1, {})):
        pass
    assert line in caplog.text


def test_no_block_at_all_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ds_compress"), engine_of(tiny_bert(), ds_config(1)):
        pass
    assert "the model trains uncompressed" in caplog.text


def test_the_short_form_counts_as_enabled() -> None:
    assert lines({"head_pruning": {"dense_ratio": 0.5}}) == []


def test_a_density_of_one_removes_nothing() -> None:
    (line,) = lines(pruning_block(density=1.0))
    assert "removes nothing" in line


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ({"head_pruning": {"dense_ratio": 0.9, "shared_parameters": {"method": "l1"}}}, "attention"),
        (
            {"row_pruning": {"dense_ratio": 0.9, "shared_parameters": {"method": "l1", "round_to": 96}}},
            "intermediate",
        ),
        (pruning_block(density=0.5, pattern="32x32"), "attention.self.query"),
    ],
)
def test_a_ratio_that_rounds_up_to_everything(
    caplog: pytest.LogCaptureFixture, block: dict[str, Any], name: str
) -> None:
    with engine_of(tiny_bert(), ds_config(1, block)) as engine:
        (key,) = block
        assert engine.compression.techniques[key].untouched()
    (warning,) = [r.getMessage() for r in caplog.records if "removes nothing from" in r.getMessage()]
    assert name in warning


def test_a_ratio_that_leaves_less_is_no_mistake() -> None:
    block = {**pruning_block(), "head_pruning": {"dense_ratio": 0.5, "shared_parameters": {"method": "l1"}}}
    block["sparse_pruning"]["different_groups"] = {"ffn": block["sparse_pruning"]["different_groups"]["ffn"]}
    with engine_of(tiny_bert(), ds_config(1, block)) as engine:
        assert not any(stage.untouched() for stage in engine.compression.techniques.values())


def test_layers_that_are_all_kept(caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(tiny_bert(), ds_config(1, {"layer_reduction": {"enabled": True, "keep_number_layer": 2}})):
        pass
    assert "layer_reduction does nothing" in caplog.text
