"""Loads exported folders as anybody would, and runs each on given inputs. Started as a script; knows nothing of us.

    python -P reload_stock.py REQUESTS.json

REQUESTS: a list of {"folder", "class", "inputs", "outputs"}; inputs and outputs are safetensors files. Written are
`logits`, and `exact_logits` with no activation quantized; the error, if there was one, as metadata.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(sys.argv[1]) as file:
        requests = json.load(file)
    for request in requests:
        try:
            tensors = answer(request)
            metadata = {"loaded": f"{request['class']}.from_pretrained, transformers {transformers.__version__}"}
        except Exception as error:
            tensors, metadata = {}, {"error": f"{type(error).__name__}: {error}"}
        save_file(tensors, request["outputs"], metadata=metadata)


@torch.no_grad()
def answer(request: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, info = getattr(transformers, request["class"]).from_pretrained(
        request["folder"], output_loading_info=True
    )
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(", ".join(f"{key}: {names[:4]}" for key, names in wrong.items() if names))
    model.eval()
    inputs = load_file(request["inputs"])
    found = {"logits": logits(model, inputs)}
    for module in model.modules():
        module.quantization_enabled = False
    found["exact_logits"] = logits(model, inputs)
    return found


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    given: dict[str, Any] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if getattr(model.config, "use_cache", None):
        given["use_cache"] = False
    output = model(**given)
    tensor: torch.Tensor = output["logits"] if "logits" in output else output[0]
    return tensor.float().contiguous()


if __name__ == "__main__":
    main()
