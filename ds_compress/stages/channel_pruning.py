"""`channel_pruning`: convolutions lose output channels.

    "channel_pruning": {"dense_ratio": 0.5}

A channel is a filter, its bias and BatchNorm entries, and a slice of the weights that read it; convolutions whose
results are added lose the same channels. See `stages.structured_pruning` for the keys.
"""

from __future__ import annotations

from typing import ClassVar

from ds_compress.stages.structured_pruning import StructuredPruning


class ChannelPruning(StructuredPruning):
    name: ClassVar[str] = "channel_pruning"
