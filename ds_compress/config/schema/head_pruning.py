"""`head_pruning`: what removes attention heads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.schema.fields import StrictInt
from ds_compress.config.schema.structured_pruning import Rounding, StructuredPruningConfig, StructuredShared
from ds_compress.structure.prunable_group import GroupKind


class HeadPruningShared(StructuredShared):
    """What holds for all groups of `head_pruning`."""

    method: Literal["l1", "l2", "topk", "taylor", "activation", "random"] = Field(
        default="topk", description="Score of a head; see row_pruning."
    )
    round_to: Rounding = Field(
        default=1,
        description="Kept heads (key/value groups) are multiples of this; 1: ceil(dense_ratio * heads).",
    )
    num_heads: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Attention heads of a layer; absent: as the model says."
    )


class HeadPruningConfig(StructuredPruningConfig):
    """Removes attention heads, whole key/value groups under grouped-query attention."""

    key = "head_pruning"
    kind = GroupKind.HEAD

    shared_parameters: HeadPruningShared = Field(
        default_factory=HeadPruningShared, description="What holds for all groups."
    )
