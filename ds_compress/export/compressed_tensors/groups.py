"""`config_groups` of a `quantization_config`: one for each way in which layers are quantized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ds_compress.export.compressed_tensors.arguments import preset_of
from ds_compress.export.compressed_tensors.experts import targets_of

Arguments = dict[str, Any] | None


class ConfigGroups:
    """Filled layer by layer."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, module: str, scheme: dict[str, Any]) -> bool:
        """scheme: weights, input_activations and format. True: it is the first layer with this one."""
        key = json.dumps(scheme, sort_keys=True)
        is_new = key not in self._groups
        group = self._groups.setdefault(key, {"targets": [], "output_activations": None, **scheme})
        group["targets"].append(module)
        return is_new

    def modules(self) -> set[str]:
        return {name for group in self._groups.values() for name in group["targets"]}

    def format(self) -> str:
        """Of the whole model."""
        formats = {group["format"] for group in self._groups.values()}
        return "mixed-precision" if len(formats) > 1 else next(iter(formats), "dense")

    def as_json(self) -> dict[str, Any]:
        """A single one is for all nn.Linear that are not ignored."""
        groups = list(self._groups.values())
        if len(groups) == 1:
            groups = [{**groups[0], "targets": ["Linear"]}]
        else:
            groups = [{**group, "targets": targets_of(group["targets"])} for group in groups]
        return {f"group_{number}": group for number, group in enumerate(groups)}


def notes_on(module: str, weights: Arguments, inputs: Arguments) -> Iterator[str]:
    """What servers make of a scheme that has floats; module: the first that has it."""
    types = [None if one is None else one["type"] for one in (weights, inputs)]
    if types == ["int", "float"]:
        yield (
            "vLLM's kernel of 4-bit integers with FP8 inputs rounds the scales of groups to FP8, and takes groups "
            "of 128 only: its weights are not quite those of training"
        )
    if "float" in types and preset_of(weights, inputs) is None:
        yield (
            f"{module}: no preset of compressed-tensors has these weights with these inputs; transformers reads them, "
            "a server may have no kernel"
        )
