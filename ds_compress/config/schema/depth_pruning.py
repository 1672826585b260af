"""`depth_pruning`: what removes whole layers while training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_compress.config.schema.structured_pruning import Rounding, StructuredPruningConfig, WholeModelShared
from ds_compress.structure.prunable_group import GroupKind


class DepthPruningShared(WholeModelShared):
    """What holds for `depth_pruning`."""

    method: Literal["l1", "l2", "topk", "taylor", "activation", "random"] = Field(
        default="activation",
        description="Score of a layer; activation: 1 - cosine of its input and output (Men et al. 2024).",
    )
    round_to: Rounding = Field(default=1, description="The number of kept layers is a multiple of this.")
    module_name_prefix: str | None = Field(
        default=None,
        description=(
            "Module that holds the layers, e.g. vision_model.encoder.layers; absent: found automatically, which a "
            "model of several towers leaves open."
        ),
    )


class DepthPruningConfig(StructuredPruningConfig):
    """Removes whole layers by importance, while training."""

    key = "depth_pruning"
    kind = GroupKind.LAYER

    shared_parameters: DepthPruningShared = Field(
        default_factory=DepthPruningShared, description="What holds for the stack."
    )
