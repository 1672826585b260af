"""OpenVINO: fp32, and int8 as NNCF calibrates it for transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch

from benchmarks.peers import worker
from benchmarks.peers.encoder_inputs import batches, stock_model


def compiled(model: Any, folder: Path) -> tuple[Any, float]:
    """On one thread, fp32 where it computes in floats; and the bytes of its folder."""
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return ov.Core().compile_model(folder / "model.xml", "CPU", settings), worker.bytes_of(folder, "model.*")


def main() -> None:
    example = batches()["32 x 40"][0]
    model = ov.convert_model(stock_model(), example_input=example)
    model.reshape({name: [-1, -1] for name in ("input_ids", "attention_mask")})
    calibration = [{n: v.numpy() for n, v in batch.items()} for batch in batches(20)["32 x 40"]]
    quantized = nncf.quantize(
        model, nncf.Dataset(calibration), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
    )
    runs, facts = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, each in (("OpenVINO fp32", model), ("OpenVINO NNCF int8", quantized)):
            folder = Path(temporary) / name.replace(" ", "-")
            folder.mkdir()
            request, size = compiled(each, folder)
            facts[name] = {"bytes": size}
            for shape, (batch,) in batches().items():
                values = {n: v.numpy() for n, v in batch.items()}
                runs[f"{name}, {shape}"] = lambda request=request, values=values: request(values)
        with torch.inference_mode():
            worker.serve(runs, ["openvino", "nncf", "torch", "transformers"], facts)
