"""`reload_vanilla_hf`, for `model.onnx`: onnxruntime runs it. A script without ds_compress and transformers.

python -P reload_onnx.py REQUESTS.json
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

fingerprint = runpy.run_path(str(Path(__file__).with_name("fingerprint.py")))["fingerprint"]


def main() -> None:
    with open(sys.argv[1]) as file:
        requests = json.load(file)
    for request in requests:
        tensors: dict[str, torch.Tensor] = {}
        try:
            inputs = {name: value.numpy() for name, value in load_file(request["inputs"]).items()}
            model = onnx.load(f"{request['folder']}/model.onnx")
            tensors["logits"] = logits(f"{request['folder']}/model.onnx", inputs)
            scales = [entry for entry in model.graph.initializer if entry.name.endswith("input_scale")]
            found = {s.name: fingerprint(torch.from_numpy(numpy_helper.to_array(s).copy())) for s in scales}
            without_rounding_of_inputs(model.graph)
            tensors["exact_logits"] = logits(model.SerializeToString(), inputs)
            metadata = {"loaded": f"onnxruntime {onnxruntime.__version__}", "fingerprints": json.dumps(found)}
        except Exception as error:
            metadata = {"error": f"{type(error).__name__}: {error}"}
        save_file(tensors, request["outputs"], metadata=metadata)


def logits(model: str | bytes, inputs: dict[str, Any]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # By default it rounds the activations of weight-only products to int8 by itself.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(model, options)
    taken = {entry.name for entry in session.get_inputs()}
    output = session.run(["logits"], {name: value for name, value in inputs.items() if name in taken})
    return torch.from_numpy(output[0]).float()


def without_rounding_of_inputs(graph: Any) -> None:
    """Whoever reads what went through QuantizeLinear and DequantizeLinear reads what came before them."""
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    plain = {
        node.output[0]: rounded[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = plain.get(name, name)


if __name__ == "__main__":
    main()
