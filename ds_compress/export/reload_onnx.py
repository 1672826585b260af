"""`reload_vanilla_hf`, for `model.onnx`: onnxruntime runs it. A script without ds_compress and transformers.

python -P reload_onnx.py REQUESTS.json
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
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
    clips = [node for node in graph.node if node.op_type == "Clip" and node.input[0] in rounded]
    rounded |= {node.output[0]: rounded[node.input[0]] for node in clips}
    integer_products_in_floats(graph, rounded)
    plain = {
        node.output[0]: rounded[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = plain.get(name, name)


def integer_products_in_floats(graph: Any, rounded: dict[str, str]) -> None:
    """MatMulInteger of rounded rows, times the scales of the rows, becomes MatMul of the rows, times one."""
    nodes = list(graph.node)
    readers = {name: node for node in nodes for name in node.input}
    products = [node for node in nodes if node.op_type == "MatMulInteger"]
    one = numpy_helper.from_array(np.array([[1]], np.float32), "check_one")
    graph.initializer.extend([one] if products else [])
    before = []
    for node in products:
        floats = f"{node.output[0]}_check_floats"
        before.append((node, helper.make_node("Cast", [node.input[1]], [floats], to=onnx.TensorProto.FLOAT)))
        rows = rounded[node.input[0]]
        del node.input[:]
        node.input.extend([rows, floats])
        node.op_type = "MatMul"
        cast = readers[node.output[0]]
        readers[cast.output[0]].input[1] = one.name
    casts = {id(node): cast for node, cast in before}
    ordered = [new for node in nodes for new in (casts.get(id(node)), node) if new is not None]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


if __name__ == "__main__":
    main()
