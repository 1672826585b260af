"""Names and shapes of tensors as checkpoints on the hub have them, where transformers renames them when it loads.

transformers 5 fuses the experts of a layer into one parameter while it loads. A checkpoint has each expert's matrices
by names of their own ("experts.0.gate_proj.weight"), and so has what its `save_pretrained` writes. Servers and older
versions know those names only. Other models are stored by the names of their modules, as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.experts import fused_experts
from ds_compress.modelinfo.kinds import shape_of

Tensors = dict[str, torch.Tensor]
Converter = Callable[[Mapping[str, torch.Tensor]], Tensors]


def hub_names(final: nn.Module) -> Converter:
    """What makes the tensors of one module of `final`, by full name, those of a checkpoint.

    It changes nothing for models without fused experts, and where tensors of several modules make one of the
    checkpoint: transformers loads a model by its own names as well.
    """
    has_experts = any(fused_experts(module) is not None for module in final.modules())
    if not has_experts or not hasattr(getattr(final, "config", None), "to_diff_dict"):
        return dict
    from transformers.core_model_loading import revert_weight_conversion

    def convert(tensors: Mapping[str, torch.Tensor]) -> Tensors:
        model: Any = final
        reverted = revert_weight_conversion(model, dict(tensors))
        return {name: tensor.contiguous() for name, tensor in reverted.items()}

    return convert if _goes_by_module(final, convert) else dict


def _goes_by_module(final: nn.Module, convert: Converter) -> bool:
    """Whether the names of a model are those of its modules, converted one by one."""
    by_module = [
        {
            f"{prefix}.{name}" if prefix else name: torch.empty(shape_of(p), device="meta", dtype=p.dtype)
            for name, p in module._parameters.items()
            if p is not None
        }
        for prefix, module in final.named_modules()
        if not is_auxiliary(prefix)
    ]
    every = {name: tensor for tensors in by_module for name, tensor in tensors.items()}
    try:
        together = {name: tensor.shape for name, tensor in convert(every).items()}
        apart = {name: t.shape for tensors in by_module for name, t in convert(tensors).items()}
    except Exception:  # a conversion that needs values, or other tensors beside these
        return False
    return together == apart


def expert_rows(
    converter: Converter, name: str, shape: tuple[int, ...], outputs: int
) -> dict[str, tuple[int, torch.Tensor]]:
    """Which rows of which expert each tensor of a checkpoint holds of the fused matrices `name`.

    shape: (experts, ...); outputs: the dimension of their outputs. Returns {name in the checkpoint: (expert, int64
    numbers of its outputs)}; nothing where the checkpoint has the matrices fused, too, or transposed.
    """
    width = shape[outputs]
    numbers = torch.arange(shape[0] * width, dtype=torch.int64).view(shape[0], width)
    numbers = numbers.unsqueeze(3 - outputs).expand(shape)
    found = {}
    for stored, tensor in converter({name: numbers}).items():
        if tensor.dim() != 2 or bool((tensor != tensor[:, :1]).any()):
            return {}
        rows = tensor[:, 0]
        found[stored] = (int(rows[0]) // width, rows % width)
    return found
