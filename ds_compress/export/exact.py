"""A 16-bit model that computes in fp32 with its own weights, for the comparison with its export.

In 16 bits the order of two sums may change a logit by several percent, which would hide a lost layer; in fp32 two loads
of the same weights agree to 1e-5. Parameters are converted inside the context; sharded ones, those of each module
around its forward, so that no more than one module is in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.quant import layers

_16_BIT = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def in_fp32(model: nn.Module, stored: torch.dtype | None = None) -> Iterator[None]:
    """16-bit parameters and buffers are fp32 inside, and as they were afterwards; the values are the same.

    stored: parameters that are not quantized are rounded to this dtype, as an export will store them.
    """

    def value(parameter: torch.Tensor, is_quantized: bool) -> torch.Tensor:
        rounded = parameter if stored is None or is_quantized else parameter.to(stored)
        return rounded.float()

    if is_sharded(model):
        with _modules_in_fp32(model, value), _buffers_in_fp32(model):
            yield
        return
    quantized = {
        id(module._parameters[name])
        for module in model.modules()
        for name in layers.quantized_parameters(module)
    }
    before: list[tuple[nn.Parameter, torch.Tensor]] = []
    for name, parameter in model.named_parameters():
        if not _is_converted(parameter, stored) or is_auxiliary(name):
            continue
        before.append((parameter, parameter.data))
        is_quantized = is_kept_in_fp32(model, name) or id(parameter) in quantized or layers.is_step_size(name)
        parameter.data = value(parameter.data, is_quantized)
    try:
        with _buffers_in_fp32(model):
            yield
    finally:
        for parameter, data in before:
            parameter.data = data


def is_kept_in_fp32(model: nn.Module, name: str) -> bool:
    """Whether transformers holds this parameter in fp32, whatever the dtype of the model is: routers often are."""
    kept: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(part in name for part in kept)


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of any parameter."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def _is_converted(parameter: torch.Tensor, stored: torch.dtype | None) -> bool:
    return parameter.dtype in _16_BIT or (stored is not None and parameter.is_floating_point())


@contextlib.contextmanager
def _buffers_in_fp32(model: nn.Module) -> Iterator[None]:
    """Buffers that are not stored are computed anew, as a loader does: rounded frequencies give other angles."""
    changed: list[tuple[nn.Module, str, torch.Tensor]] = []
    fresh: dict[str, torch.Tensor] | None = None
    for prefix, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype not in _16_BIT or is_auxiliary(prefix):
                continue
            changed.append((module, name, buffer))
            new = buffer.float()
            if name in module._non_persistent_buffers_set:
                fresh = _fresh_buffers(model) if fresh is None else fresh
                computed = fresh.get(f"{prefix}.{name}" if prefix else name)
                if computed is not None and computed.shape == buffer.shape:
                    new = computed.to(buffer.device, torch.float32)
            module._buffers[name] = new
    try:
        yield
    finally:
        for module, name, buffer in changed:
            module._buffers[name] = buffer


def _fresh_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return {}
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            built = type(model)(config)
    except Exception:  # a class that takes more than a config: its buffers stay as they are
        return {}
    return dict(built.named_buffers())


@contextlib.contextmanager
def _modules_in_fp32(model: nn.Module, value: Callable[[torch.Tensor, bool], torch.Tensor]) -> Iterator[None]:
    """By hooks that run after a module's parameters are gathered and before they are released."""
    handles = []
    for name, module in model.named_modules():
        if not is_auxiliary(name):
            convert, restore = _hooks(value)
            handles.append(module.register_forward_pre_hook(convert, with_kwargs=True))
            handles.append(module.register_forward_hook(restore, prepend=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(
    value: Callable[[torch.Tensor, bool], torch.Tensor],
) -> tuple[Callable[..., Any], Callable[..., None]]:
    before: list[list[tuple[nn.Parameter, torch.Tensor]]] = []

    def convert(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        own = [
            (name, parameter)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_floating_point()
        ]
        before.append([(parameter, parameter.data) for _, parameter in own])
        fake_quantized = layers.quantized_parameters(module)
        for name, parameter in own:
            is_quantized = layers.is_step_size(name) or name in fake_quantized
            parameter.data = value(parameter.data, is_quantized)
        return _in_fp32(args), _in_fp32(kwargs)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for parameter, data in before.pop():
            parameter.data = data

    return convert, restore


def _in_fp32(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        return values.float() if values.dtype in _16_BIT else values
    if type(values) is tuple or type(values) is list:
        return type(values)(_in_fp32(value) for value in values)
    if type(values) is dict:
        return {key: _in_fp32(value) for key, value in values.items()}
    return values
