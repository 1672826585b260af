"""A prunable group: units that can be removed one by one, and the tensor entries that go with each of them.

An FFN of 1536 neurons is one group of 1536 units; unit u owns row u of the first matrix, entry u of its bias and
column u of the second matrix. An attention layer is a group of heads (with grouped-query attention, of key/value
heads with their query heads), a model's stack of layers one group whose units are layers. Nothing here knows a process
or an optimizer: masks during training, scores and the final pruning are all computed from `CoupledSlice.index`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch


class GroupKind(StrEnum):
    ROW = "row"
    """Inner neurons of a feed-forward block."""
    HEAD = "head"
    """Attention heads; groups of them that share a key/value head under grouped-query attention."""
    CHANNEL = "channel"
    """Output channels of convolutions, coupled through all that must keep the same ones (residual sums)."""
    LAYER = "layer"
    """Layers of a stack."""
    HIDDEN = "hidden"
    """The width of the residual stream, one group for the model."""
    EXPERT = "expert"
    """Experts of one mixture, with all that the routing knows of them."""


@dataclass(frozen=True, eq=False)
class CoupledSlice:
    """The entries of one tensor, along one dimension, that belong to the units of a group.

    tensor: name of a parameter (the first-listed one when tied) or buffer. dim: which dimension of its full shape.
    index: int64 (units, width); row u lists the entries along `dim` of unit u. No entry belongs to two units, and
    entries that belong to none are never removed. scored: whether these weights count in the unit's score (`l1`, `l2`,
    `taylor`). masked: whether training zeroes them (a normalization's weight, say, is only sliced). rescale: when k of
    n units are kept, the kept values are multiplied by (k / n) ** rescale, because a root mean square over n entries,
    n - k of them zero, is not that over the k others. of_experts: dimension 0 of the tensor counts fused experts, of
    which each has units of its own: `index` counts the entries of (dimension 0, dim) together, entry i of expert e is
    e * shape[dim] + i.
    """

    tensor: str
    dim: int
    index: torch.Tensor
    scored: bool = False
    masked: bool = True
    rescale: float = 0.0
    of_experts: bool = False


@dataclass(frozen=True, eq=False)
class PrunableGroup:
    """Units that are scored, masked and removed as a whole.

    name: unique in the model; stable over runs. modules: names of the modules by which a regex of the JSON may select
    the group. units: how many there are. slices: all tensor entries of the units; empty for layers, which are bypassed
    in training and deleted in the end. observed: the module whose *input* holds the units' activations (for activation
    scores), with the positions along its last dimension (dim 1 of a convolution's) as in `CoupledSlice.index`; None
    where there is none. removable: False when the units can only be zeroed, because what reads them is not known
    (legacy blocks without related_modules). aligned: groups of equal `aligned` text must keep the same units (T5
    shares one position bias among all layers); "" when there is no such group. layers: names of the modules that are
    the units, one by one: of GroupKind.LAYER, and of experts in a ModuleList. parts: the units are so many runs of
    equal length, each of which keeps the same number of its own (the rows of each fused expert; the experts of each
    group among which a router chooses first). multiple: counts of kept units (of each part) are multiples of it,
    whatever `round_to` is. fewest: a model with fewer units than that does not run.
    """

    name: str
    kind: GroupKind
    modules: tuple[str, ...]
    units: int
    slices: tuple[CoupledSlice, ...]
    observed: str | None = None
    observed_index: torch.Tensor | None = None
    removable: bool = True
    aligned: str = ""
    layers: tuple[str, ...] = field(default=())
    parts: int = 1
    multiple: int = 1
    fewest: int = 1

    @property
    def width(self) -> int:
        """Units of each part."""
        return self.units // self.parts


@dataclass(frozen=True)
class Unsupported:
    """A module that seems to have units, and why they cannot be removed: a sentence that says what to do."""

    module: str
    reason: str
