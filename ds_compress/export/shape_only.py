"""The `weight` of a layer that holds integers packed for a kernel: models may ask for its shape and dtype, no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ASKED = frozenset(
    ["__get__", "size", "dim", "ndimension", "numel", "element_size", "is_floating_point", "__len__"]
)


class ShapeOnly(torch.Tensor):
    """On the meta device, whose tensors some products of the CPU take for uninitialized memory, without an error."""

    @classmethod
    def of(cls, *shape: int) -> ShapeOnly:
        """fp32 of `shape`, without memory."""
        return torch.empty(shape, device="meta").as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raises RuntimeError for all that would compute with it."""
        name = getattr(function, "__name__", str(function))
        if name not in _ASKED:
            raise RuntimeError(
                f"{name} of the weight of a layer that runs on packed integers: this model reads the weight past the "
                "layer, so it cannot be served so; ds_compress.from_pretrained(..., activations=False) gives floats"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))
