"""Inputs to try a convolutional network on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_SIZES = (32, 64, 224, 28, 96, 128, 256, 299)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of a forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    def images(self) -> list[torch.Tensor]:
        """All float arguments [batch, channels, height, width]."""
        return [value for value in (*self.args, *self.kwargs.values()) if _is_image(value)]

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """With `change` applied to every image."""
        args = tuple(change(value) if _is_image(value) else value for value in self.args)
        kwargs = {name: change(value) if _is_image(value) else value for name, value in self.kwargs.items()}
        return Inputs(args, kwargs)


def example_inputs_of(model: nn.Module, given: Mapping[str, Any] | None) -> Inputs:
    """`given`, or the model's `dummy_inputs`, or images of a size that its config names or that it accepts.

    Raises:
        ValueError: the model takes none of them.
    """
    if given is not None:
        return Inputs(kwargs={name: _double(value) for name, value in given.items()})
    candidates: list[Inputs] = []
    config = getattr(model, "config", None)
    if config is None:
        dummy = getattr(model, "dummy_inputs", None)
        if isinstance(dummy, Mapping):
            return Inputs(kwargs={name: _double(value) for name, value in dummy.items()})
        images: list[Inputs] = [Inputs(args=(image,)) for image in _images(model, _SIZES)]
        candidates += images
    else:
        size = getattr(config, "image_size", None)
        name = getattr(model, "main_input_name", "pixel_values")
        sizes = (size,) if isinstance(size, int) else (64, 224)
        candidates += [Inputs(kwargs={name: image}) for image in _images(model, sizes)]
    for candidate in candidates:
        try:
            with torch.no_grad():
                candidate.call(model)
        except Exception:  # any model may refuse any image in its own way
            continue
        return candidate
    raise ValueError(
        "it could not be run on an image of a usual size; give it a dummy_inputs property (keyword arguments of its "
        "forward), or say with modules and related_modules which layers go together"
    )


def tensors_of(output: Any) -> list[torch.Tensor]:
    """All floating-point tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []


def _is_image(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 4


def _images(model: nn.Module, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, s, s, generator=generator, dtype=torch.float64) for s in sizes]


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().to("cpu", torch.float64)
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
