"""`reload_stock`, for `model.onnx`: onnxruntime runs it. Started as a script; knows nothing of us, or of transformers.

    python -P reload_onnx.py REQUESTS.json
"""

from __future__ import annotations

import json
import sys

import onnxruntime
import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    with open(sys.argv[1]) as file:
        requests = json.load(file)
    for request in requests:
        tensors: dict[str, torch.Tensor] = {}
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            # By default it rounds the activations of weight-only products to int8 by itself.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            session = onnxruntime.InferenceSession(f"{request['folder']}/model.onnx", options)
            inputs = {name: value.numpy() for name, value in load_file(request["inputs"]).items()}
            taken = {entry.name for entry in session.get_inputs()}
            output = session.run(["logits"], {name: value for name, value in inputs.items() if name in taken})
            tensors["logits"] = torch.from_numpy(output[0]).float()
            metadata = {"loaded": f"onnxruntime {onnxruntime.__version__}"}
        except Exception as error:
            metadata = {"error": f"{type(error).__name__}: {error}"}
        save_file(tensors, request["outputs"], metadata=metadata)


if __name__ == "__main__":
    main()
