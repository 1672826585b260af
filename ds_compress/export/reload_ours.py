"""`reload_vanilla_hf`, for folders of the `torch` format: `ds_compress.from_pretrained` loads them.

python -m ds_compress.export.reload_ours REQUESTS.json
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file, save_file

from ds_compress.export.fingerprint import fingerprint
from ds_compress.export.inputs import run
from ds_compress.export.load import from_pretrained
from ds_compress.export.loaded_tensors import fingerprints_of, input_scales


def main() -> None:
    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        requests = json.load(file)
    for request in requests:
        tensors: dict[str, torch.Tensor] = {}
        try:
            inputs = load_file(request["inputs"])
            # The same weights as floats: without the rounding of activations, any difference is an error.
            exact = from_pretrained(request["folder"], fused=False, activations=False)
            tensors["exact_logits"] = run(exact, inputs)
            fingerprints = fingerprints_of(exact)
            served = from_pretrained(request["folder"], fused=False)
            fingerprints |= {name: fingerprint(scale) for name, scale in input_scales(served).items()}
            tensors["logits"] = run(from_pretrained(request["folder"]), inputs)
            metadata = {"loaded": "ds_compress.from_pretrained", "fingerprints": json.dumps(fingerprints)}
        except Exception as error:
            metadata = {"error": f"{type(error).__name__}: {error}"}
        save_file(tensors, request["outputs"], metadata=metadata)


if __name__ == "__main__":
    main()
