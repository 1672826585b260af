"""`channel_pruning`: what removes channels of convolutions."""

from __future__ import annotations

from pydantic import Field

from ds_compress.config.schema.row_pruning import RowPruningShared
from ds_compress.config.schema.structured_pruning import StructuredPruningConfig
from ds_compress.structure.prunable_group import GroupKind


class ChannelPruningConfig(StructuredPruningConfig):
    """Removes output channels of Conv2d layers."""

    key = "channel_pruning"
    kind = GroupKind.CHANNEL

    shared_parameters: RowPruningShared = Field(
        default_factory=RowPruningShared, description="What holds for all groups."
    )
