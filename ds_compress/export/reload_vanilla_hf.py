"""Loads exported folders with vanilla HF transformers, and runs each on given inputs. A script without ds_compress.

    python -P reload_vanilla_hf.py REQUESTS.json

REQUESTS: a list of {"folder", "class", "inputs", "outputs", "unread"}; inputs and outputs are safetensors files, unread
are tensors that may be left unread. Written are `logits`, and `exact_logits` with no activation quantized; as metadata
the fingerprints of what was loaded, and the error, if any. What is loaded in 16 bits computes in fp32 once its
weights were decompressed, which is in the dtype that it was loaded in; `loaded_logits` are those of that dtype.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

fingerprint = runpy.run_path(str(Path(__file__).with_name("fingerprint.py")))["fingerprint"]


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(sys.argv[1]) as file:
        requests = json.load(file)
    for request in requests:
        try:
            tensors, fingerprints = answer(request)
            metadata = {
                "loaded": f"{request['class']}.from_pretrained, transformers {transformers.__version__}",
                "fingerprints": json.dumps(fingerprints),
            }
        except Exception as error:
            tensors, metadata = {}, {"error": f"{type(error).__name__}: {error}"}
        save_file(tensors, request["outputs"], metadata=metadata)


@torch.no_grad()
def answer(request: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    model, info = getattr(transformers, request["class"]).from_pretrained(
        request["folder"], output_loading_info=True
    )
    wrong = {
        key: sorted({*map(str, info[key])} - set(request["unread"]))
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(wrong.values()):
        raise ValueError(", ".join(f"{key}: {names[:4]}" for key, names in wrong.items() if names))
    model.eval()
    inputs = load_file(request["inputs"])
    as_loaded = logits(model, inputs)  # the first forward decompresses the weights
    if not as_loaded.isfinite().all():
        raise ValueError(f"in {model.dtype}, as it is loaded, its logits are not finite")
    is_converted = False
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data, is_converted = tensor.data.float(), True
    found = {"logits": logits(model, inputs)}
    if is_converted:
        found["loaded_logits"] = as_loaded
    for module in model.modules():
        module.quantization_enabled = False
    found["exact_logits"] = logits(model, inputs)
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return found, {name: fingerprint(value) for name, value in held if value.is_floating_point()}


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
