"""Layers that vLLM joins to one, and what it then needs to be the same in all of them.

Its kernels take one global scale for the joined matrix, the largest, without computing the other scales anew; the
scales of whole tensors in FP8 it makes one, and rounds the weights again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ds_compress.techniques.global_scales import fused_families

_OF_TENSOR = ("weight_global_scale", "input_global_scale", "weight_scale", "input_scale")


class ScalesOfTensors:
    """Collects, of every layer, the scales that a whole tensor has one of."""

    def __init__(self) -> None:
        self._scales: dict[str, dict[str, float]] = {}

    def add(self, module: str, stored: Mapping[str, torch.Tensor]) -> None:
        """stored: by local name."""
        found = {
            name: float(stored[name]) for name in _OF_TENSOR if name in stored and stored[name].shape == (1,)
        }
        if found:
            self._scales[module] = found

    def notes(self) -> Iterator[str]:
        for name in _OF_TENSOR:
            different = [
                members
                for members in fused_families(list(self._scales))
                if len({self._of(m, name) for m in members}) > 1
            ]
            if different:
                yield (
                    f"{', '.join(different[0])} have different {name}s ({len(different)} such places): stock "
                    f"transformers reads them as they were trained, vLLM joins these layers and {_what(name)}"
                )

    def _of(self, module: str, name: str) -> float | None:
        return self._scales[module].get(name)


def _what(name: str) -> str:
    if "global" in name:
        return "takes the largest for all of them, which is wrong for the others: train with shared global scales"
    if name == "weight_scale":
        return "rounds their weights again, to the largest"
    return "takes the largest"
