"""What the quantizing classes have in common, and how a learned step size is called.

A module has one weight, `weight`, or the matrices of several experts, each a parameter with a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.modelinfo.kinds import STEP_SIZE_SUFFIX
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.quantizers import InputQuantizer, WeightQuantizer

WEIGHT = "weight"
STEP_SIZE = f"{WEIGHT}{STEP_SIZE_SUFFIX}"
MATRICES = "s_by_matrix"
"""Behind "weight_quantizer" and "input_quantizer": the attributes of a module with several matrices, a dict each."""


def step_size_name(parameter: str) -> str:
    """The local name of the given scales of a parameter, e.g. `weight_step_size`."""
    return f"{parameter}{STEP_SIZE_SUFFIX}"


def is_step_size(name: str) -> bool:
    """Whether a parameter of this name, local or full, has the given scales of another."""
    return name.endswith(STEP_SIZE_SUFFIX)


def weight_of_step_size(name: str) -> str:
    """The inverse of `step_size_name`, for local and full names."""
    return name.removesuffix(STEP_SIZE_SUFFIX)


class QATModule(nn.Module):
    """The base of the quantized classes; each derives from it and from the class that it replaces."""

    _ds_compress_base_class: ClassVar[type[nn.Module]]
    weight_quantizer: WeightQuantizer | None
    input_quantizer: InputQuantizer | None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Classes derived from a user's subclass are made at run time: pickle the base, not their name.
        return *self._rebuilder(), self.__dict__

    def extra_repr(self) -> str:
        """The base class's, and how weight and input are quantized now."""
        parts = [self._sizes()]
        if self.weight_quantizer is not None:
            parts.append(f"weight={self.weight_quantizer.describe()}")
        if self.input_quantizer is not None:
            parts.append(f"input={self.input_quantizer.describe()}")
        return ", ".join(part for part in parts if part)

    def set_weight_quantizer(self, parameter: str, quantizer: WeightQuantizer | None) -> None:
        """parameter: the local name of the weight that it quantizes."""
        self.weight_quantizer = quantizer

    def set_input_quantizer(self, parameter: str, quantizer: InputQuantizer | None) -> None:
        """parameter: the local name of the weight whose input it quantizes."""
        self.input_quantizer = quantizer

    def weight_quantizers(self) -> Iterator[tuple[str, WeightQuantizer]]:
        """(local name of the weight, its quantizer), of those that have one."""
        if self.weight_quantizer is not None:
            yield WEIGHT, self.weight_quantizer

    def input_quantizers(self) -> Iterator[tuple[str, InputQuantizer]]:
        """(local name of the weight that the input is multiplied by, its quantizer), of those that have one."""
        if self.input_quantizer is not None:
            yield WEIGHT, self.input_quantizer

    def _rebuilder(self) -> tuple[Callable[..., QATModule], tuple[Any, ...]]:
        """A function of a module and its arguments, that make an empty module of this class."""
        raise NotImplementedError

    def _sizes(self) -> str:
        return self._ds_compress_base_class.extra_repr(self)

    def _fake_quant(self, parameter: str = WEIGHT) -> FakeQuantConfig | None:
        return next((q.fake_quant for name, q in self.weight_quantizers() if name == parameter), None)

    def _step_size(self, fake_quant: FakeQuantConfig | None, parameter: str = WEIGHT) -> torch.Tensor | None:
        if fake_quant is None or not fake_quant.grid.learned:
            return None
        return self._parameters[step_size_name(parameter)]
