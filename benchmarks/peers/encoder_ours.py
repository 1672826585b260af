"""Ours: W8A8 with dynamic and static ranges, trained for two steps, exported, and loaded as users load it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import deepspeed
import torch

import ds_compress
from benchmarks.engines import MINILM, bert, deepspeed_config, random_batch, start_single_process, w8a8_block
from benchmarks.peers import worker
from benchmarks.peers.encoder_inputs import batches


def exported(calibration: str, folder: Path) -> None:
    model = bert(MINILM)
    config = deepspeed_config(0, 8, w8a8_block(calibration))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for seed in range(2):
        engine.backward(engine(**random_batch(8, 40, seed)).loss)
        engine.step()
    ds_compress.export(engine, folder, format="torch", embeddings="int8", check=False)
    engine.destroy()


def main() -> None:
    start_single_process()
    runs, facts = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for calibration in ("dynamic", "static"):
            folder, name = Path(temporary) / calibration, f"ds_compress W8A8 {calibration}"
            exported(calibration, folder)
            model = ds_compress.from_pretrained(folder)
            facts[name] = {"bytes": worker.bytes_of(folder, "model*.safetensors")}
            for shape, (batch,) in batches().items():
                runs[f"{name}, {shape}"] = lambda model=model, batch=batch: model(**batch)
        with torch.inference_mode():
            worker.serve(runs, ["ds_compress", "torch", "transformers"], facts)
