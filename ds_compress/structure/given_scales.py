"""Scales that are parameters, `weight_step_size` beside `weight`: they lose the outputs that the weight loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ds_compress.modelinfo.experts import fused_experts
from ds_compress.modelinfo.kinds import STEP_SIZE_SUFFIX, shape_of


@dataclass(frozen=True)
class GivenScales:
    """weight: its full name. shape: of the weight. outputs: the dimension of the weight with an entry per output.

    stacked: the weight is one of fused experts, and its scales have a first dimension of experts.
    """

    weight: str
    shape: tuple[int, ...]
    outputs: int
    stacked: bool = False

    def gone(self, removed: Mapping[int, torch.Tensor], scales: Sequence[int]) -> dict[int, torch.Tensor]:
        """What the scales, of shape `scales`, lose by dimension, when the weight loses `removed`."""
        if self.stacked:
            places = {0: 0, self.outputs: 1 if self.outputs == 1 else len(scales) - 1}
        else:
            places = {self.outputs: 0}
        return {
            place: removed[dim]
            for dim, place in places.items()
            # Else one scale serves all.
            if dim in removed and place < len(scales) and scales[place] == self.shape[dim]
        }


def given_scales(model: nn.Module) -> dict[str, GivenScales]:
    """Of all parameters of the model that are scales, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for local, parameter in module._parameters.items():
            weight = module._parameters.get(local.removesuffix(STEP_SIZE_SUFFIX))
            if parameter is None or weight is None or not local.endswith(STEP_SIZE_SUFFIX):
                continue
            name = f"{prefix}.{local}".lstrip(".")
            of = name.removesuffix(STEP_SIZE_SUFFIX)
            fused = fused_experts(module)
            if fused is not None:
                found[name] = GivenScales(of, shape_of(weight), 2 if fused.transposed else 1, stacked=True)
            else:
                found[name] = GivenScales(of, shape_of(weight), 1 if "Conv1D" in type(module).__name__ else 0)
    return found
