"""A config resolved against a model, as data: which weight gets what, from which step."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_compress.config.schema.block import WeightBlock
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.structure_targets import StructurePlan
from ds_compress.config.targets import TechniquePlan, Weight


@dataclass
class ResolvedPlan:
    """What each enabled block does to which weight.

    techniques: the enabled blocks that claim weights or inputs, by key. structures: likewise those that claim prunable
    groups. weights: every parameter of the model. world_size: how many processes share the training state. notes: for
    the reader, such as in which formats the result can be exported. packs: stock transformers loads packed weights of
    this model.
    """

    config: CompressionConfig
    techniques: dict[str, TechniquePlan]
    weights: tuple[Weight, ...] = field(default=(), repr=False)
    structures: dict[str, StructurePlan] = field(default_factory=dict, repr=False)
    world_size: int = 1
    notes: tuple[str, ...] = field(default=(), repr=False)
    packs: bool = True

    def weight_block(self, key: str) -> WeightBlock:
        """The block of `techniques[key]`."""
        block = getattr(self.config, key)
        assert isinstance(block, WeightBlock)
        return block
