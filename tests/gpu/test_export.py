"""Exports from engines on a GPU: stock transformers loads them, and they compute what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ds_compress
from tests.gpu.runs import engine_of, everything, structures
from tests.models import tiny_bert
from tests.multirank.common import batches, device, train
from tests.multirank.exporting import SCENARIOS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]


def logits_of(anything: Any, where: torch.device) -> torch.Tensor:
    batch = next(iter(batches(1, seed=9)))
    with torch.no_grad():
        kept = {name: batch[name].to(where) for name in ("input_ids", "attention_mask")}
        return anything(**kept).logits.float().cpu()


@pytest.mark.parametrize(("layout", "dtype"), [("0", "fp32"), ("3 offload", "bf16")])
def test_stock_transformers_computes_what_was_trained(layout: str, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    block = {**structures(method="l1"), **everything()}
    # Half of the heads is no BERT of stock transformers, and quantized weights are another format.
    block = {key: block[key] for key in ("row_pruning", "depth_pruning", "sparse_pruning")}
    with engine_of(layout, block, dtype, model=lambda: tiny_bert(layers=4)) as engine:
        train(engine, batches(5))
        engine.eval()
        trained = logits_of(engine, device())
        report = ds_compress.export(engine, tmp_path / "out", "hf")
        assert report.check["verdict"]
    for where in (device(), torch.device("cpu")):
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").to(where).eval().float()
        torch.testing.assert_close(
            logits_of(stock, where), trained, rtol=0, atol=1e-4 if dtype == "fp32" else 2e-2
        )
    assert sum(p.numel() for p in stock.parameters()) < 0.8 * sum(
        p.numel() for p in tiny_bert(layers=4).parameters()
    )


@pytest.mark.parametrize(
    ("name", "layout"), [("w8a8-learned", "3"), ("w4a16-rows", "2 offload"), ("w8a8-cut", "0")]
)
def test_quantized_formats_of_engine_and_checkpoint_are_equal(name: str, layout: str, tmp_path: Path) -> None:
    format, block = SCENARIOS[name]
    with engine_of(layout, block, model=lambda: tiny_bert(layers=4)) as engine:
        train(engine, batches(4))
        engine.save_checkpoint(str(tmp_path / "checkpoint"))
        ds_compress.export(engine, tmp_path / "engine", format, check=False)
    ds_compress.export(tmp_path / "checkpoint", tmp_path / "again", format, check=False)
    ours, theirs = (
        {k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()}
        for d in ("engine", "again")
    )
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("layout", ["3"])
def test_int8_model_runs_on_the_device(layout: str, tmp_path: Path) -> None:
    """The exported model of our own format, loaded and moved to the device: as on the CPU."""
    format, block = SCENARIOS["w8a8-cut"]
    with engine_of(layout, block, model=lambda: tiny_bert(layers=4)) as engine:
        train(engine, batches(4))
        engine.eval()
        trained = logits_of(engine, device())
        ds_compress.export(engine, tmp_path / "out", format, check=False)
    loaded = ds_compress.from_pretrained(str(tmp_path / "out"))
    on_cpu = logits_of(loaded, torch.device("cpu"))
    torch.testing.assert_close(on_cpu, trained, rtol=0, atol=2e-2)
    torch.testing.assert_close(logits_of(loaded.to(device()), device()), on_cpu, rtol=0, atol=2e-2)
