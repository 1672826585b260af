"""torch's fused kernels of nn.TransformerEncoder(Layer), switched off where a layer inside is quantized.

In eval mode without gradients both pass the weights of their children to one kernel and never call the children. The
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
_SAVED = "_ds_compress_fast_path"


def disable(model: nn.Module) -> None:
    """Switches off the kernel of every encoder or encoder layer with a quantized layer inside."""
    for module in model.modules():
        for kind, flag, off in _FLAGS:
            # A subclass with a forward of its own may do anything; see `engine.step.raw_reads`.
            if isinstance(module, kind) and _quantizes(module) and _SAVED not in vars(module):
                vars(module)[_SAVED] = getattr(module, flag, None)
                setattr(module, flag, off)


def restore(model: nn.Module) -> None:
    """Switches the kernel on again where no quantized layer is left inside."""
    for module in model.modules():
        for kind, flag, _ in _FLAGS:
            if isinstance(module, kind) and not _quantizes(module) and _SAVED in vars(module):
                setattr(module, flag, vars(module).pop(_SAVED))


def _quantizes(module: nn.Module) -> bool:
    return any(isinstance(child, QATModule) for child in module.modules())
