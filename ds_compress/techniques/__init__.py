"""One file per JSON block. A new stage is one class here and one line in `TECHNIQUES`."""

from __future__ import annotations

from collections.abc import Callable

from ds_compress.techniques.activation_quantization import ActivationQuantization
from ds_compress.techniques.base import Technique
from ds_compress.techniques.channel_pruning import ChannelPruning
from ds_compress.techniques.depth_pruning import DepthPruning
from ds_compress.techniques.head_pruning import HeadPruning
from ds_compress.techniques.hidden_pruning import HiddenPruning
from ds_compress.techniques.row_pruning import RowPruning
from ds_compress.techniques.sparse_pruning import SparsePruning
from ds_compress.techniques.weight_quantization import WeightQuantization

TECHNIQUES: dict[str, Callable[..., Technique]] = {
    technique.name: technique
    for technique in (
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
