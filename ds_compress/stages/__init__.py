"""One file per JSON block. A new stage is one class here and one line in `STAGES`."""

from __future__ import annotations

from collections.abc import Callable

from ds_compress.stages.activation_quantization import ActivationQuantization
from ds_compress.stages.base import Stage
from ds_compress.stages.channel_pruning import ChannelPruning
from ds_compress.stages.depth_pruning import DepthPruning
from ds_compress.stages.head_pruning import HeadPruning
from ds_compress.stages.hidden_pruning import HiddenPruning
from ds_compress.stages.row_pruning import RowPruning
from ds_compress.stages.sparse_pruning import SparsePruning
from ds_compress.stages.weight_quantization import WeightQuantization

STAGES: dict[str, Callable[..., Stage]] = {
    stage.name: stage
    for stage in (
        RowPruning,
        HeadPruning,
        ChannelPruning,
        DepthPruning,
        HiddenPruning,
        SparsePruning,
        WeightQuantization,
        ActivationQuantization,
    )
}
