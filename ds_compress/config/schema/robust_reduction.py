"""`robust_reduction`: what becomes of the gradients of all workers when some of them are bad."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ds_compress.config.schema.block import Block
from ds_compress.config.schema.fields import (
    Conflict,
    StrictBool,
    StrictFloat,
    StrictInt,
    without_effect,
)

Rule = Literal["mean", "trimmed_mean", "median", "centered_clip", "norm_clip"]
OnOutlier = Literal["report", "exclude", "abort"]


class RobustReductionConfig(Block):
    """Replaces the mean over workers by a rule that a few bad contributions cannot move far.

    Workers are *named* by the length of their gradient, or NaN and Inf in it. An attack of ordinary length is withstood
    as far as the rule goes, and never named, reported, excluded or a reason to abort: a gradient of the opposite sign
    (not longer), "a little is enough" (ALIE, Baruch et al. 2019) and inner-product manipulation (IPM, Xie et al. 2020)
    are named in 0 % of all steps.
    """

    key = "robust_reduction"

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    rule: Rule = Field(
        default="centered_clip",
        description=(
            "mean; trimmed_mean and median per coordinate; centered_clip: distances to the centre are clipped at "
            "their median, three times; norm_clip: norms are clipped at their median."
        ),
    )
    max_malicious: Annotated[StrictInt, Field(ge=0)] = Field(
        default=1, description="Bad workers f to withstand; needs at least 2 f + 1 workers."
    )
    neighbor_mixing: StrictBool = Field(
        default=True,
        description=(
            "Before any rule but mean, each worker's gradient becomes the mean of the n - f nearest to it; helps where "
            "workers see different data."
        ),
    )
    worker_momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description=(
            "Workers send running means of their gradients with this beta per step, which attacks have less room in. "
            "Costs 2 bytes per parameter in each process, and stands for the optimizer's own momentum: set that to 0."
        ),
    )
    on_outlier: OnOutlier = Field(
        default="report",
        description=(
            "A worker with an outlying norm is named in the log; left out from the next step on, and at once if it is "
            "one by this reduction alone; or ends the run. Attacks of ordinary length (sign flip, ALIE, IPM) are not "
            "named by any rule."
        ),
    )
    outlier_ratio: Annotated[StrictFloat, Field(gt=1)] = Field(
        default=5.0,
        description=(
            "A worker is an outlier when its norm is this many times the median of all workers, in the geometric mean "
            "of about twenty steps, or the square of it in one step."
        ),
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.neighbor_mixing:
            yield from without_effect(
                self, "neighbor_mixing", self.rule == "mean", "rule is another than mean"
            )
            yield from without_effect(
                self,
                "neighbor_mixing",
                self.rule != "mean" and not self.max_malicious,
                "max_malicious is 1 or more",
            )

    def conflicts_beside(self, enabled: Mapping[str, Block]) -> Iterator[Conflict]:
        reasons = {
            "hierarchical": "robust_reduction has to see every worker, not the sum of a host",
            "error_feedback": "robust_reduction judges gradients, not gradients plus what was left of others",
        }
        for key, reason in reasons.items():
            if getattr(enabled.get("gradient_compression"), key, False):
                yield Conflict(("gradient_compression", key), True, f"false, because {reason}")

    def describe(self, plan: Any = None) -> str:
        what = f"momenta ({self.worker_momentum:g})" if self.worker_momentum else "gradients"
        mixed = ", mixed with their nearest," if self.neighbor_mixing and self.rule != "mean" else ""
        return (
            f"{self.rule} of the {what} of all workers{mixed} up to {self.max_malicious} of them bad; outliers "
            f"({self.outlier_ratio:g} times the median norm): {self.on_outlier}"
        )
