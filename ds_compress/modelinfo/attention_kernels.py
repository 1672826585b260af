"""What a model's attention kernel is called with: query, key and value after rotation, to look at or to change.

transformers looks attention kernels up by name. While a model is open here, that name is one of a wrapper that calls
the hooks of the attention module, and then the model's own kernel on what they return. So any kernel, rotary embeddings
and grouped queries are supported.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

_PREFIX = "ds_compress_hooks_before_"
_USERS = "_ds_compress_kernel_users"


@dataclass(frozen=True)
class KernelInputs:
    """query: (batch, heads, tokens, width of a head), rotated if the model does. key, value: likewise, perhaps fewer
    heads. scaling: of the scores."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float


class KeyValue(NamedTuple):
    """What the kernel computes with instead."""

    key: torch.Tensor
    value: torch.Tensor


Hook = Callable[[KernelInputs], KeyValue | None]
_hooks: weakref.WeakKeyDictionary[nn.Module, list[Hook]] = weakref.WeakKeyDictionary()


class Handle:
    """`remove()` forgets the hook."""

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self._module, self._hook = weakref.ref(module), hook

    def remove(self) -> None:
        module = self._module()
        hooks = _hooks.get(module, []) if module is not None else []
        if self._hook in hooks:
            hooks.remove(self._hook)


def add_hook(module: nn.Module, hook: Hook) -> Handle:
    """`hook` is called before the kernel of the attention module, once its model is open; None: nothing changes."""
    _hooks.setdefault(module, []).append(hook)
    return Handle(module, hook)


def can_open(model: Any) -> bool:
    """Whether it is a model of transformers with exchangeable attention kernels."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name is not None and hasattr(model, "set_attn_implementation")


def open_kernels(model: Any) -> None:
    """The model's kernels call their hooks until `close_kernels` was called as often.

    Raises:
        ValueError: see `can_open`.
    """
    if not can_open(model):
        raise ValueError(f"a {type(model).__name__} has no attention kernels that can be exchanged")
    users = vars(model).get(_USERS, 0)
    name = model.config._attn_implementation
    if not name.startswith(_PREFIX):
        model.set_attn_implementation(_registered(name))
    vars(model)[_USERS] = users + 1


def close_kernels(model: Any) -> None:
    """Restores the name of the kernel when nobody uses the hooks any more."""
    users = vars(model).get(_USERS, 0)
    vars(model)[_USERS] = max(0, users - 1)
    name = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if users <= 1 and name.startswith(_PREFIX):
        model.set_attn_implementation(name.removeprefix(_PREFIX))


def _registered(name: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    kernels, masks = AttentionInterface(), AttentionMaskInterface()
    # "eager" is no kernel of the library: each model's file defines one, with its own soft caps and sinks.
    kernel = kernels[name] if name in kernels.valid_keys() else None
    AttentionInterface.register(_PREFIX + name, _with_hooks(kernel))
    if name in masks.valid_keys():
        AttentionMaskInterface.register(_PREFIX + name, masks[name])
    return _PREFIX + name


def _with_hooks(kernel: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        for hook in _hooks.get(module, ()):
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            changed = hook(KernelInputs(module, query, key, value, scaling))
            if changed is not None:
                key, value = changed
        return (kernel or _eager_kernel(type(module)))(module, query, key, value, *args, **kwargs)

    return attention


def _eager_kernel(of: type[nn.Module]) -> Callable[..., Any]:
    from transformers import AttentionInterface

    files = (vars(sys.modules[base.__module__]) for base in of.__mro__)
    found = (file["eager_attention_forward"] for file in files if "eager_attention_forward" in file)
    kernel: Callable[..., Any] = next(found, AttentionInterface()["sdpa"])
    return kernel
