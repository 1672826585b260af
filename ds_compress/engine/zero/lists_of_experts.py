"""Mixtures whose experts are modules of a list: processes whose tokens go to different experts take the same steps.

ZeRO-3 gathers each module when it is called, and all processes have to call the same ones: else it stops, or
waits for ever. So a block of such experts becomes a *leaf module*: all its parameters are gathered at once, and those
that took no part get gradients of zero. ZeRO-1 and 2 reduce the gradients that there are as they come: there, experts
that no token of this process went to get zeros, too, together with the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_compress.engine.zero import internals
from ds_compress.modelinfo.experts import MoeBlock, moe_blocks
from ds_compress.structure.layers import LAYER_LIST_NAMES
from ds_compress.techniques.depth_pruning import first_tensor, replace_hidden


def keep_lists_together(model: nn.Module) -> list[Any]:
    """Before an engine is constructed; returns the handles of hooks.

    Where the caller has marked a leaf module around or inside a block, that holds.
    """
    from deepspeed.utils import set_z3_leaf_module, z3_leaf_module

    handles: list[Any] = []
    for block in moe_blocks(model):
        if block.fused is not None or block.experts_name.rpartition(".")[2] in LAYER_LIST_NAMES:
            continue  # a stack of layers beside a head with as many outputs looks alike
        around = [
            m for name, m in model.named_modules() if not name or f"{block.name}.".startswith(f"{name}.")
        ]
        if not any(z3_leaf_module(module) for module in (*around, *block.module.modules())):
            set_z3_leaf_module(block.module, True)
        handles += _Together(model, block).hooks()
    return handles


class _Together:
    """Lets the gradients of all experts of a block arrive at once, in the same order in each process.

    ZeRO-1 and 2 put gradients into buckets as they come: not only their number, their order has to agree as well.
    """

    def __init__(self, model: nn.Module, block: MoeBlock) -> None:
        self._block = block.module
        experts = model.get_submodule(block.experts_name)
        self._places = [(module, name) for module in experts.modules() for name in module._parameters]
        self._first: torch.Tensor | None = None

    def hooks(self) -> list[Any]:
        return [
            self._block.register_forward_pre_hook(self._enter),
            self._block.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, block: nn.Module, args: Any) -> None:
        places = [(module, name, module._parameters[name]) for module, name in self._places]
        trained = [(m, n, p) for m, n, p in places if p is not None and p.requires_grad]
        if not trained or not torch.is_grad_enabled() or internals.is_zero3_parameter(trained[0][2]):
            return
        aliases = _Aliases.apply(*(parameter for _, _, parameter in trained))
        for (module, name, _), alias in zip(trained, aliases, strict=True):
            vars(module)[name] = alias  # hides the parameter of this name
        self._first = aliases[0]

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        for module, name in self._places:
            vars(module).pop(name, None)
        first, self._first = self._first, None
        if first is None or output is None:
            return None
        # So that gradients arrive even if no token of this process goes to any expert.
        return replace_hidden(output, _TakePart.apply(first_tensor(output), first))


class _Aliases(torch.autograd.Function):
    """The same tensors; gradients that nobody gives are zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


class _TakePart(torch.autograd.Function):
    """The first tensor; the other gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.like = other.new_empty(0), other.shape
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like, shape = ctx.like
        return gradient, like.new_zeros(shape)
