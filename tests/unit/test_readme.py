"""README's first example, word for word: it trains, it comes out smaller, and stock classes load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import ds_compress
from ds_compress.export.serve import Int8Linear
from tests.multirank.common import batches, tiny_bert, train
from tests.single import init_single_process

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.fixture(autouse=True, scope="module")
def single_process() -> None:
    init_single_process()


def first_example() -> dict[str, Any]:
    found = re.search(r"```diff\n( \{.*?)```", README, re.DOTALL)
    assert found is not None
    lines = [line[1:] for line in found[1].splitlines() if not line.startswith("-")]
    config: dict[str, Any] = json.loads("\n".join(lines))
    return config


def test_the_first_example_comes_out_smaller_and_on_integers(tmp_path: Path) -> None:
    config = first_example()
    rows = config["compression_training"]["row_pruning"]["shared_parameters"]
    assert rows["schedule_offset_end"] > 100
    rows["schedule_offset_end"] = 3  # a test has no time for the ramp
    config["train_batch_size"] = 4
    config["optimizer"]["params"]["torch_adam"] = True
    model = tiny_bert().train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    train(engine, batches(4))
    report = ds_compress.export(engine, tmp_path / "small")
    engine.destroy()
    assert report.format == "torch" and report.check
    assert report.ratio > 2.5
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    inner = loaded.bert.encoder.layer[0].intermediate.dense
    assert isinstance(inner, Int8Linear) and inner.out_features == 48
    (batch,) = batches(1)
    with torch.no_grad():
        assert torch.isfinite(loaded(**batch).logits).all()


def test_every_json_of_the_readme_is_accepted() -> None:
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        ds_compress.parse_config(json.loads("{" + block + "}"))
