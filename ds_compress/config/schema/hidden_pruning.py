"""`hidden_pruning`: what narrows the hidden size."""

from __future__ import annotations

from pydantic import Field

from ds_compress.config.schema.structured_pruning import StructuredPruningConfig, WholeModelShared
from ds_compress.structure.prunable_group import GroupKind


class HiddenPruningShared(WholeModelShared):
    """What holds for `hidden_pruning`."""


class HiddenPruningConfig(StructuredPruningConfig):
    """Narrows the hidden size of models whose normalizations allow it."""

    key = "hidden_pruning"
    kind = GroupKind.HIDDEN

    shared_parameters: HiddenPruningShared = Field(
        default_factory=HiddenPruningShared, description="What holds for the model."
    )
