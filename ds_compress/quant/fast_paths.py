"""torch's fused kernels of nn.TransformerEncoder(Layer), closed where a layer inside is quantized.

In eval mode without gradients both hand the weights of their children to one kernel and never call the children. The
slow path computes the same, through our layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_compress.quant.layers import QATModule

_FLAGS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
"""The activation for the kernel (0: it has none for this layer), and whether padding goes as nested tensors."""
_KEPT = "_ds_compress_fast_path"


def close(model: nn.Module) -> None:
    """Of every encoder or encoder layer with a quantizing layer inside."""
    for module in model.modules():
        for kind, flag, closed in _FLAGS:
            # What has a forward of its own does what it does; see `engine.raw_reads`.
            if isinstance(module, kind) and _quantizes(module) and _KEPT not in vars(module):
                vars(module)[_KEPT] = getattr(module, flag, None)
                setattr(module, flag, closed)


def reopen(model: nn.Module) -> None:
    """Where no quantizing layer is left inside."""
    for module in model.modules():
        for kind, flag, _ in _FLAGS:
            if isinstance(module, kind) and not _quantizes(module) and _KEPT in vars(module):
                setattr(module, flag, vars(module).pop(_KEPT))


def _quantizes(module: nn.Module) -> bool:
    return any(isinstance(child, QATModule) for child in module.modules())
