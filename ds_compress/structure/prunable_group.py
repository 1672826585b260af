"""A structure: units that can only be removed together, and every tensor entry that goes with each of them.

An FFN of 1536 neurons is one structure of 1536 units; unit u owns row u of the first matrix, entry u of its bias and
column u of the second matrix. An attention layer is a structure of heads (under grouped-query attention of key/value
groups), a model's stack of layers one structure whose units are layers. Nothing here knows a process or an optimizer:
masks during training, scores and the final cut are all computed from `CoupledSlice.index`.
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
    """Output channels of convolutions, with all that must shrink alike (residual sums)."""
    LAYER = "layer"
    """Whole layers of the stack."""
    HIDDEN = "hidden"
    """The width of the residual stream, one structure for the whole model."""


@dataclass(frozen=True, eq=False)
class CoupledSlice:
    """The entries of one tensor, along one dimension, that belong to the units of a structure.

    tensor: name of a parameter (the first-listed one when tied) or buffer. dim: which dimension of its full shape.
    index: int64 (units, width); row u lists the entries along `dim` of unit u. No entry belongs to two units, and
    entries that belong to none are never removed. scored: whether these weights speak for the unit (`l1`, `l2`,
    `taylor`). masked: whether training zeroes them (a normalization's weight, say, is only cut). rescale: after a
    cut from n to k units the kept values are multiplied by (k / n) ** rescale: a root mean square over n
    entries, some of them zero, is not that over the k others.
    """

    tensor: str
    dim: int
    index: torch.Tensor
    scored: bool = False
    masked: bool = True
    rescale: float = 0.0


@dataclass(frozen=True, eq=False)
class PrunableGroup:
    """Units that are scored, masked and removed as wholes.

    name: unique in the model; stable over runs. modules: names of the modules that a regex of the JSON may reach it
    by. units: how many there are. members: everything that goes with them; empty for layers, which are bypassed in
    training and deleted in the end. observed: module whose *input* carries the units (for activation scores), with
    the positions along its last dimension (dim 1 of a convolution's) as in `CoupledSlice.index`; None where there is
    none.
    removable: False when the units can only be zeroed, because what reads them is not known (legacy blocks without
    related_modules). aligned: structures of equal `aligned` text must keep the same units (T5 shares one
    position bias among all layers); "" when it stands alone.
    """

    name: str
    kind: GroupKind
    modules: tuple[str, ...]
    units: int
    members: tuple[CoupledSlice, ...]
    observed: str | None = None
    observed_index: torch.Tensor | None = None
    removable: bool = True
    aligned: str = ""
    layers: tuple[str, ...] = field(default=())
    """Names of the layer modules, unit by unit; of StructureKind.LAYER only."""


@dataclass(frozen=True)
class Unsupported:
    """A module that looks as if it had units, and why they cannot be removed; a sentence that says what to do."""

    module: str
    reason: str
