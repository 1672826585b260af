"""One file per JSON block. A new one is a class and a line in `_BUILT_IN`; elsewhere, `register_technique`."""

from __future__ import annotations

from ds_compress.config.schema.block import Block
from ds_compress.config.schema.compression_training import register_block, unregister_block
from ds_compress.techniques.activation_quantization import ActivationQuantization
from ds_compress.techniques.base import Technique
from ds_compress.techniques.channel_pruning import ChannelPruning
from ds_compress.techniques.depth_pruning import DepthPruning
from ds_compress.techniques.distillation import Distillation
from ds_compress.techniques.expert_pruning import ExpertPruning
from ds_compress.techniques.gradient_reduction import GradientReduction
from ds_compress.techniques.head_pruning import HeadPruning
from ds_compress.techniques.hidden_pruning import HiddenPruning
from ds_compress.techniques.kv_cache import KvCacheQuantization
from ds_compress.techniques.parameter_compression import ParameterCompression
from ds_compress.techniques.row_pruning import RowPruning
from ds_compress.techniques.sparse_pruning import SparsePruning
from ds_compress.techniques.weight_quantization import WeightQuantization

_BUILT_IN: tuple[type[Technique], ...] = (
    RowPruning,
    HeadPruning,
    ChannelPruning,
    DepthPruning,
    HiddenPruning,
    ExpertPruning,
    SparsePruning,
    WeightQuantization,
    ActivationQuantization,
    KvCacheQuantization,
    GradientReduction,
    ParameterCompression,
    Distillation,
)
TECHNIQUES: dict[str, type[Technique]] = {technique.name: technique for technique in _BUILT_IN}
"""By name, in the order in which they act on a step: distillation, whose losses see what all others did, last."""


def register_technique(technique: type[Technique], block: type[Block]) -> None:
    """`compression_training` has one more block from now on, and `technique` does what it says.

    It acts after the built-in techniques that mask or quantize, and before distillation.

    Raises:
        ValueError: the names of the two differ, or are taken.
    """
    if technique.name != block.key or TECHNIQUES.get(technique.name, technique) is not technique:
        raise ValueError(
            f"technique {technique.name!r} of block {block.key!r}: one free name for both is needed"
        )
    register_block(block)
    last = TECHNIQUES.pop(Distillation.name)
    TECHNIQUES[technique.name] = technique
    TECHNIQUES[Distillation.name] = last


def unregister_technique(name: str) -> None:
    """What `register_technique` added is unknown again (for tests)."""
    if TECHNIQUES.get(name) not in _BUILT_IN:
        TECHNIQUES.pop(name, None)
        unregister_block(name)
