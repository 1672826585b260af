"""An export says when compression is not in what it is given, and compares with the model that training began with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import transformers as hf
from torch import nn

import ds_compress
from ds_compress.api import export
from ds_compress.errors import ExportError
from tests.single import init_single_process
from tests.zoo.models import ZOO, inputs_of

QAT = {
    "weight_quantization": {
        "shared_parameters": {
            "enabled": True,
            "granularity": "per_channel",
            "quantize_weight_in_forward": True,
        },
        "different_groups": {"g": {"params": {"start_bits": 4, "target_bits": 4}, "modules": ["layer"]}},
    }
}
_HALF = {"enabled": True, "dense_ratio": 0.5, "method": "l1", "schedule_offset": 0}
ROWS = {"row_pruning": {"shared_parameters": _HALF}}
HALF_OF_THE_LAYERS = {
    "layer_reduction": {"enabled": True, "keep_number_layer": 2, "module_name_prefix": "bert.encoder.layer"}
    | {"teacher_layer": [0, 2]}
}


def trained(block: dict[str, Any], steps: int = 2) -> Any:
    init_single_process()
    model = ZOO["bert_classifier"]()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "compression_training": block,
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    for _ in range(steps):
        engine.backward(engine(**inputs_of(model), labels=torch.tensor([0, 2])).loss)
        engine.step()
    return engine


@pytest.mark.parametrize("block", [QAT, ROWS], ids=["quantized", "masked"])
def test_a_folder_of_plain_weights(tmp_path: Path, block: dict[str, Any]) -> None:
    engine = trained(block)
    engine.module.save_pretrained(tmp_path / "saved")  # as Trainer.save_model does
    hf.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    for source in (tmp_path / "saved", hf.BertForSequenceClassification.from_pretrained(tmp_path / "saved")):
        with pytest.raises(ExportError, match=f"trained under {next(iter(block))}.*export the engine"):
            export(source, tmp_path / "out", check=False)
    engine.destroy()


def test_the_model_of_an_engine_is_the_engine(tmp_path: Path) -> None:
    engine = trained(ROWS)
    report = export(engine.module, tmp_path / "out", check=False)
    assert report.source.startswith("engine") and report.ratio > 1.1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 32 and "ds_compress" not in config
    engine.destroy()


def test_a_copy_of_a_masked_model(tmp_path: Path) -> None:
    engine = trained(ROWS)
    copied = copy.deepcopy(engine.module)
    with pytest.raises(ExportError, match="row_pruning"):
        export(copied, tmp_path / "out", check=False)
    finalized = ds_compress.finalize(copied, ROWS)
    assert export(finalized, tmp_path / "out", check=False).ratio > 1.1
    engine.destroy()


def test_a_trainer(tmp_path: Path) -> None:
    engine = trained(QAT)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    trainer = SimpleNamespace(
        model_wrapped=engine, accelerator=None, model=engine.module, processing_class=Tokenizer()
    )
    report = export(trainer, tmp_path / "out", check=False)
    assert report.format == "compressed-tensors" and (tmp_path / "out" / "tokenizer.json").exists()
    engine.destroy()


@pytest.mark.parametrize("how", ["engine", "checkpoint", "folder"])
def test_smaller_than_what_training_began_with(tmp_path: Path, how: str) -> None:
    engine = trained(HALF_OF_THE_LAYERS)
    if how == "checkpoint":
        engine.save_checkpoint(str(tmp_path / "from"))
    if how == "folder":
        engine.module.save_pretrained(tmp_path / "from")
    report = export(engine if how == "engine" else tmp_path / "from", tmp_path / "out", check=False)
    whole = sum(parameter.numel() for parameter in ZOO["bert_classifier"]().parameters())
    assert report.dense_bytes == 4 * whole and report.ratio > 1.4
    engine.destroy()


def test_finalized_too(tmp_path: Path) -> None:
    engine = trained(ROWS)
    model = ds_compress.finalize(engine)
    report = export(model, tmp_path / "out", check=False)
    assert report.dense_bytes == 4 * sum(
        parameter.numel() for parameter in ZOO["bert_classifier"]().parameters()
    )


def test_masked_units_that_nobody_declared(tmp_path: Path) -> None:
    model: Any = ZOO["bert_classifier"]()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[:, :20] = 0
    report = export(model, tmp_path / "out", check=False)
    assert any("layer.1.output.dense are zero" in note and "finalize" in note for note in report.notes)
    assert not export(ZOO["bert_classifier"](), tmp_path / "whole", check=False).notes


def test_a_model_without_compression_is_not_marked() -> None:
    engine = trained({"sparse_pruning": {"shared_parameters": {"enabled": True, "method": "l1", "schedule_offset": 0},
        "different_groups": {"g": {"params": {"dense_ratio": 0.5}, "modules": ["layer"]}}}})  # fmt: skip
    assert not hasattr(engine.module.config, "ds_compress")
    engine.destroy()


def test_detached_quantizers_are_no_loss(tmp_path: Path) -> None:
    engine = trained(QAT)
    engine.compression.detach()
    module: nn.Module = engine.module
    assert export(module, tmp_path / "out", check=False).format == "hf"
    engine.destroy()
