"""`channel_pruning`: convolutions lose output channels.

    "channel_pruning": {"dense_ratio": 0.5}

A channel is a filter, its bias and BatchNorm entries, and a slice of the weights that read it; convolutions whose
results are added lose the same channels. See `techniques.structured_pruning` for the keys.
"""

from __future__ import annotations

from typing import ClassVar

from ds_compress.techniques.structured_pruning import StructuredPruning


class ChannelPruning(StructuredPruning):
    name: ClassVar[str] = "channel_pruning"
