"""What a config means for one model: the weights that each block claims."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from ds_compress.modelinfo.kinds import ModuleKind


@dataclass(frozen=True)
class Target:
    """One weight that one block claims.

    module_name: qualified name of the module; param_name: name of its weight in `model.named_parameters()`
    (the first-listed name when tied). shape: full shape. group, params: the JSON group that claimed it.
    pruned: whether another block makes weights of it zero, which have to be zero in forward too. parameter: the local
    name of the weight; a matrix of fused experts has `module_name` "<the module>.<parameter>".
    """

    module_name: str
    module: nn.Module
    kind: ModuleKind
    param_name: str
    param: nn.Parameter
    shape: tuple[int, ...]
    group: str
    params: Any
    pruned: bool = False
    parameter: str = "weight"

    @property
    def matrices(self) -> int:
        """How many matrices the weight is: one for each expert of a stack, else 1."""
        return self.shape[0] if self.kind.is_experts else 1


@dataclass(frozen=True)
class TechniquePlan:
    """One enabled block: its key, what holds for all its groups, and its weights in model order."""

    block: str
    shared: Any
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter of the model as it is stored: full shape, bytes per element, whether it trains, whose it is.

    owner: name of the class of the module that holds it. users: names of all modules that do. routes: whether it
    decides which experts see a token. experts, chosen: of a weight of experts how many there are in its layer, and how
    many of them see a token.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trainable: bool
    owner: str = ""
    users: tuple[str, ...] = ()
    routes: bool = False
    experts: int = 1
    chosen: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def inputs_of(target: Target) -> int:
    """Weights that one output sums over."""
    if target.kind.is_experts:
        return target.shape[1 if target.kind.is_transposed else 2]
    return target.shape[0] if target.kind.is_transposed else math.prod(target.shape[1:])


@functools.lru_cache(maxsize=4096)
def exact_ceil(density: float, units: int) -> int:
    """ceil(density * units) for the decimal that the JSON shows: 0.07 of 100 is 7, not 8."""
    return math.ceil(Fraction(repr(density)) * units)
