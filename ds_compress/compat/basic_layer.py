"""The class names of the removed library, for `isinstance`, and `QuantAct`.

The old library replaced modules by objects of these classes; here a module stays what it is and may get another class
that quantizes (`quant.layers`). `isinstance(module, LinearLayer_Compress)` therefore asks what user code meant by
it: is this an nn.Linear that `init_compression` prepared, because some block of the JSON claims it? It is true for a
layer that is pruned only, and stays true after `redundancy_clean` and in copies of the model. (The old library also
swapped layers that no block claims; those are not prepared here.) Objects made from these names are plain layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ds_compress.compat.utils import (
    AsymQuantizer,
    BinaryQuantizer,
    SymQuantizer,
    TernaryQuantizer,
    TopKBinarizer,
)

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

_MARK = "_ds_compress_prepared"


def mark_prepared(run: CompressionRun) -> None:
    """Marks every module of which a technique of `run` changes a weight, an input, or units."""
    names = {target.module_name for plan in run.plan.techniques.values() for target in plan.targets}
    for structures in run.plan.structures.values():
        for target in structures.targets:
            names |= {member.tensor.rpartition(".")[0] for member in target.structure.slices}
    for name in names:
        run.model.get_submodule(name).__dict__[_MARK] = True


def is_prepared(module: nn.Module) -> bool:
    """Whether `init_compression` prepared this very module."""
    return _MARK in vars(module)


def mark(module: nn.Module) -> None:
    """What `module_replacement` without a technique does."""
    module.__dict__[_MARK] = True


class _PreparedLayer(type):
    """Makes isinstance ask whether a layer of the base class is prepared."""

    _base: type[nn.Module]

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or (
            isinstance(instance, cls._base) and is_prepared(instance)
        )


class LinearLayer_Compress(nn.Linear, metaclass=_PreparedLayer):
    """A Linear layer that is prepared."""

    _base: ClassVar[type[nn.Module]] = nn.Linear


class Conv2dLayer_Compress(nn.Conv2d, metaclass=_PreparedLayer):
    """A Conv2d layer that is prepared."""

    _base: ClassVar[type[nn.Module]] = nn.Conv2d


class Embedding_Compress(nn.Embedding, metaclass=_PreparedLayer):
    """An Embedding that is prepared."""

    _base: ClassVar[type[nn.Module]] = nn.Embedding


class BNLayer_Compress(nn.BatchNorm2d, metaclass=_PreparedLayer):
    """A BatchNorm2d whose channels go with those of a pruned convolution."""

    _base: ClassVar[type[nn.Module]] = nn.BatchNorm2d


class _SplitLayer(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__}: layers split over processes cannot be compressed")


class ColumnParallelLinear_Compress(_SplitLayer):
    """No module is one: `init_compression` refuses an `mpu` of more than one process."""


class RowParallelLinear_Compress(_SplitLayer):
    """No module is one: `init_compression` refuses an `mpu` of more than one process."""


def is_module_compressible(module: nn.Module, mpu: Any = None) -> bool:
    """Whether the old library looked at such a module: Linear, Conv2d, Embedding, BatchNorm2d."""
    return isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.BatchNorm2d)


class QuantAct(nn.Module):
    """Quantizes what it is called with on one range for the whole tensor, an EMA of min and max over training.

    `forward(x, num_bits)` in the shape and dtype of `x`; in eval() the range stays. The range is a buffer, fp32
    (min, max). The layers of this library do not use it: their ranges are also reduced over processes
    (`techniques.activation_quantization`).
    """

    def __init__(self, act_range_momentum: float = 0.95, quant_mode: str = "symmetric") -> None:
        super().__init__()
        self.act_range_momentum = act_range_momentum
        self.quant_mode = quant_mode
        self.act_function = SymQuantizer.apply if quant_mode == "symmetric" else AsymQuantizer.apply
        self.x_min_max: torch.Tensor
        self.register_buffer("x_min_max", torch.zeros(2))

    def forward(self, x: torch.Tensor, num_bits: int, *args: Any) -> torch.Tensor:
        if self.training:
            extremes = torch.stack([x.detach().amin(), x.detach().amax()]).to(self.x_min_max)
            is_first = self.x_min_max[0] == self.x_min_max[1]
            old = torch.where(is_first, extremes, self.x_min_max)
            self.x_min_max.copy_(torch.lerp(extremes, old, self.act_range_momentum))
        quantized: torch.Tensor = self.act_function(x, num_bits, self.x_min_max[0], self.x_min_max[1])
        return quantized


__all__ = [
    "AsymQuantizer",
    "BNLayer_Compress",
    "BinaryQuantizer",
    "ColumnParallelLinear_Compress",
    "Conv2dLayer_Compress",
    "Embedding_Compress",
    "LinearLayer_Compress",
    "QuantAct",
    "RowParallelLinear_Compress",
    "SymQuantizer",
    "TernaryQuantizer",
    "TopKBinarizer",
]
