"""`row_pruning`: what removes neurons of feed-forward blocks."""

from __future__ import annotations

from pydantic import Field

from ds_compress.config.schema.structured_pruning import StructuredPruningConfig, StructuredShared
from ds_compress.structure.prunable_group import GroupKind


class RowPruningShared(StructuredShared):
    """What holds for all groups of `row_pruning` or `channel_pruning`."""


class RowPruningConfig(StructuredPruningConfig):
    """Removes inner neurons of feed-forward blocks (output rows of Linear layers)."""

    key = "row_pruning"
    kind = GroupKind.ROW

    shared_parameters: RowPruningShared = Field(
        default_factory=RowPruningShared, description="What holds for all groups."
    )
