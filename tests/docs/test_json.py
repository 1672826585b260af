"""Every JSON in README and docs is what the library accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest

import ds_compress
from ds_compress.config.schema.source import block_of
from tests.docs.pages import ROOT, Block, all_blocks

BLOCKS = type(ds_compress.parse_config({})).model_fields
OF_DEEPSPEED = {"train_batch_size", "train_micro_batch_size_per_gpu", "optimizer", "zero_optimization"}
JSON_BLOCKS = all_blocks("json")


def loaded(block: Block) -> dict[str, Any]:
    """A fragment such as `"row_pruning": {...}` is the inside of an object."""
    text = block.text.strip()
    value: dict[str, Any] = json.loads(text if text.startswith("{") else "{" + text.rstrip(",") + "}")
    return value


def test_there_is_json_to_look_at() -> None:
    assert len(JSON_BLOCKS) > 15


@pytest.mark.parametrize("block", JSON_BLOCKS, ids=lambda block: block.place)
def test_json_is_accepted(block: Block) -> None:
    content = loaded(block)
    if "compression_training" in content or OF_DEEPSPEED & set(content):
        ds_compress.parse_config(block_of({"compression_training": {}, **content}))
        return
    unknown = set(content) - set(BLOCKS)
    assert not unknown, f"{sorted(unknown)} is neither a block nor a key of DeepSpeed"
    ds_compress.parse_config(content)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").rglob("*.json")), ids=lambda path: path.name)
def test_complete_examples_are_accepted(path: Any) -> None:
    content = json.loads(path.read_text())
    ds_compress.parse_config(block_of({"compression_training": {}, **content}))
