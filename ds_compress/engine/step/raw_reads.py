"""Weights that are read past their quantizing layer: `F.linear(x, self.child.weight)` instead of `self.child(x)`.

Such code computes with the unquantized weight, and nothing in the result says so. The first forward of each kind (in
training or eval mode, with gradients or without) is watched: a product with a quantized weight, outside the forward of
its layer, is an error. Later forwards cost nothing. The fused kernels of torch itself are closed before
(`quant.fast_paths`); a compiled model is not watched, it would be compiled for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ds_compress.engine.patches import Patches
from ds_compress.errors import ROOT, ConfigError, Problem, shown
from ds_compress.modelinfo.inventory import exact_pattern
from ds_compress.quant.layers import WEIGHT, QATModule

_PRODUCTS = frozenset(
    [
        "linear",
        "bilinear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "mv",
        "addmm",
        "addbmm",
        "baddbmm",
        "_grouped_mm",
        "grouped_mm",
        "addmv",
        "inner",
        "einsum",
        "tensordot",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "embedding",
        "embedding_bag",
        "multi_head_attention_forward",
        "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd",
    ]
)
_COPIES = frozenset(["to", "type", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach"])


def watch(engine: Any, patches: Patches) -> None:
    """Watches the forwards of `engine` until `patches` are closed."""
    names = _quantized_weights(engine.module)
    if not names:
        return
    seen: set[tuple[bool, bool]] = set()

    def forward(*args: Any, **kwargs: Any) -> Any:
        kind = (engine.module.training, torch.is_grad_enabled())
        if kind in seen or _is_compiled(engine.module):
            return original(*args, **kwargs)
        seen.add(kind)
        with _RawReads(names):
            return original(*args, **kwargs)

    original = patches.install(engine, "forward", forward)


def _quantized_weights(model: nn.Module) -> dict[int, str]:
    """{id of a weight: name of its layer}, for those that no other module owns."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for weight in _weights(module):
            owners.setdefault(id(weight), []).append((name, module))
    return {
        key: modules[0][0]
        for key, modules in owners.items()
        if all(isinstance(module, QATModule) for _, module in modules)
    }


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """`weight`, and of experts the matrices that are to be quantized."""
    quantized = dict(module.weight_quantizers()) if isinstance(module, QATModule) else {}
    names = {WEIGHT, *quantized}
    return [weight for name in sorted(names) if (weight := module._parameters.get(name)) is not None]


def _is_compiled(model: nn.Module) -> bool:
    return torch.compiler.is_compiling() or any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


class _RawReads(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        # Copies and views live as long as this, so that no id is used again.
        self._derived: dict[int, tuple[torch.Tensor, str]] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _COPIES and args and (of := self._layer_of(args[0])) is not None:
            if isinstance(result, torch.Tensor) and result is not args[0]:
                self._derived[id(result)] = (result, of)
        elif name in _PRODUCTS:
            for value in _tensors([*args, *(kwargs or {}).values()]):
                layer = self._layer_of(value)
                if layer is not None and (caller := _caller()) is not None:
                    raise ConfigError([_problem(layer, name, caller)])
        return result

    def _layer_of(self, value: Any) -> str | None:
        if not isinstance(value, torch.Tensor):
            return None
        for tensor in (value, value._base):
            if tensor is None:
                continue
            if id(tensor) in self._names:
                return self._names[id(tensor)]
            if id(tensor) in self._derived:
                return self._derived[id(tensor)][1]
        return None


def _tensors(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _caller() -> str | None:
    """Who multiplies, in words; None when it is the layer itself, or DeepSpeed."""
    caller: str | None = None
    frame = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("ds_compress.quant"):
            return None
        # DeepSpeed's own F.linear is whoever's calls it; what its hooks do is no forward.
        if module.startswith("deepspeed") and module != "deepspeed.runtime.zero.linear":
            return caller
        is_forward = not module.startswith(("torch.", "deepspeed.", "ds_compress.")) or module.startswith(
            "torch.nn.modules."
        )
        if caller is None and is_forward:
            code = frame.f_code
            caller = f"{module}.{getattr(code, 'co_qualname', code.co_name)}"
        frame = frame.f_back  # type: ignore[assignment]
    return caller


def _problem(layer: str, function: str, caller: str) -> Problem:
    return Problem(
        ROOT,
        f"{shown(layer)} quantized, whose weight {caller} reads itself ({function}): it would compute unquantized",
        "layers that are called",
        f"add {shown(exact_pattern(layer))} to excluded_modules of the quantization blocks, or let that code call it",
    )
