"""onnxruntime: fp32, and its own dynamic int8."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic

from benchmarks.peers import worker
from benchmarks.peers.encoder_inputs import batches, stock_model


def main() -> None:
    example = batches()["32 x 40"][0]
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runs, facts = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        torch.onnx.export(
            stock_model(),
            (),
            str(path),
            kwargs=example,
            dynamo=True,
            dynamic_shapes=axes,
            external_data=False,
        )
        quantized = path.with_name("int8.onnx")
        quantize_dynamic(path, quantized)
        for name, file in (("onnxruntime fp32", path), ("onnxruntime dynamic int8", quantized)):
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            facts[name] = {"bytes": float(file.stat().st_size)}
            for shape, (batch,) in batches().items():
                values = {n: v.numpy() for n, v in batch.items()}
                runs[f"{name}, {shape}"] = lambda s=session, values=values: s.run(None, values)
        worker.serve(runs, ["onnxruntime", "onnx", "torch", "transformers"], facts)
