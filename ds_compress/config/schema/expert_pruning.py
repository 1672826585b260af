"""`expert_pruning`: what removes experts of a mixture, or merges them, while training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_compress.config.schema.fields import StrictBool
from ds_compress.config.schema.structured_pruning import (
    Rounding,
    StructuredPruningConfig,
    StructuredShared,
)
from ds_compress.config.structure_targets import StructurePlan
from ds_compress.structure.prunable_group import GroupKind


class ExpertPruningShared(StructuredShared):
    """What holds for `expert_pruning`."""

    method: Literal["reap", "frequency", "l1", "l2", "taylor", "random"] = Field(  # type: ignore[assignment]
        default="reap",
        description=(
            "Score of an expert, since the last mask: reap mean over its tokens of gate weight times norm of its "
            "output (arXiv 2510.13999); frequency tokens routed to it; l1, l2 norm of its weights; taylor accumulated "
            "|w*g|; random (seeded)."
        ),
    )
    scope: Literal["uniform"] = Field(
        default="uniform",
        description="Every mixture of a group keeps the same number, which stock configs can express.",
    )
    round_to: Rounding = Field(default=1, description="The number of kept experts is a multiple of this.")
    merge: StrictBool = Field(
        default=False,
        description=(
            "Whether an expert that goes is first merged into the kept one whose router row is most similar, weighted "
            "by the tokens of each (arXiv 2310.01334)."
        ),
    )

    @property
    def rounds_up(self) -> bool:
        return False


class ExpertPruningConfig(StructuredPruningConfig):
    """Removes experts of a mixture, with what routes tokens to them."""

    key = "expert_pruning"
    kind = GroupKind.EXPERT

    shared_parameters: ExpertPruningShared = Field(
        default_factory=ExpertPruningShared, description="What holds for all groups."
    )

    def describe(self, plan: StructurePlan | None = None) -> str:
        text = super().describe(plan)
        return f"{text}, merged into those that stay" if self.shared_parameters.merge else text
