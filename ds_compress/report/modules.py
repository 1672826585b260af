"""Modules of a model by layer, so that a page with ten thousand of them opens; zeros by the masks of a checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ds_compress.errors import CheckpointError

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_ONES = torch.tensor([byte.bit_count() for byte in range(256)])


def by_layer(modules: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{"layer", "parameters", "nonzeros", "bytes", "stored_as", "modules"}], in the order of the modules.

    A layer is the name up to its first number, `model.layers.3`; a module without one stands for itself. bytes: None
    where they are not known. stored_as: what its modules are stored as, each once.
    """
    layers: dict[str, dict[str, Any]] = {}
    for module in modules:
        found = _LAYER.match(module["name"])
        name = found[1] if found else module["name"]
        new: dict[str, Any] = {
            "layer": name,
            "parameters": 0,
            "nonzeros": 0,
            "bytes": None,
            "stored_as": [],
            "modules": [],
        }
        layer = layers.setdefault(name, new)
        layer["parameters"] += module["parameters"]
        layer["nonzeros"] += module["nonzeros"]
        if module.get("bytes") is not None:
            layer["bytes"] = (layer["bytes"] or 0) + module["bytes"]
        if module.get("stored_as") and module["stored_as"] not in layer["stored_as"]:
            layer["stored_as"].append(module["stored_as"])
        layer["modules"].append(module)
    return list(layers.values())


def of_checkpoint(files: Iterable[Path], treatments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"name", "parameters", "nonzeros", ...}] of the weights that a block claims, or that have a mask in `files`.

    files: fragments of a checkpoint. treatments: of the record of its run; stored_as is what these say.

    Raises:
        CheckpointError: a file is damaged.
    """
    counts: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for part in json.loads((file.metadata() or {})["index"]):
                    if part["kind"] != "mask" or not part["is_mask"]:
                        continue
                    # Bits beyond the last element are zero.
                    packed = torch.bincount(file.get_tensor(part["key"]), minlength=256)
                    count = counts.setdefault(part["parameter"], [0, 0])
                    count[0] += part["numel"]
                    count[1] += int(packed @ _ONES)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error
    claimed = {name: (entry["parameters"], entry["treatment"]) for name, entry in treatments.items()}
    found = []
    for name in [*claimed, *(name for name in counts if name not in claimed)]:
        of_plan, treatment = claimed.get(name, (0, None))
        numel, kept = counts.get(name, (of_plan, of_plan))
        found.append(
            {"name": name, "parameters": numel, "nonzeros": kept, "bytes": None, "stored_as": treatment}
        )
    return found
