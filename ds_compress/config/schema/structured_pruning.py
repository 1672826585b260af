"""What the blocks that remove whole structures share: row, head, channel, depth and hidden pruning.

The short form of a block is one number, `"head_pruning": {"dense_ratio": 0.5}`: all structures of the model, from
the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from ds_compress.config.schema.block import GroupedBlock, plural, steps
from ds_compress.config.schema.fields import (
    Conflict,
    ExcludedModules,
    Group,
    Groups,
    Ratio,
    Seed,
    Step,
    StrictBool,
    StrictInt,
    StrictModel,
    without_effect,
)
from ds_compress.config.schema.randomize import Randomize, randomize_conflicts
from ds_compress.config.schema.sparse_pruning import Schedule
from ds_compress.config.structure_targets import StructurePlan, StructureTarget, units_left
from ds_compress.errors import listed
from ds_compress.structure.prunable_group import GroupKind

Rounding = Annotated[StrictInt, Field(ge=1)]


_METHODS_WITH_SEED = ("topk", "random")


class StructuredPruningParams(StrictModel):
    """`params` of one group."""

    dense_ratio: Ratio | None = Field(
        default=None,
        description="Fraction of the units (rows, heads, channels, ...) that is kept, 0 < r <= 1.",
    )


class StructuredPruningGroup(Group):
    """Structures that lose the same share of their units."""

    params: StructuredPruningParams = Field(
        default_factory=StructuredPruningParams, description="What differs between groups."
    )


class StructuredShared(StrictModel):
    """What holds for all groups of a block that removes structures."""

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    method: Literal["l1", "l2", "topk", "taylor", "activation", "random"] = Field(
        default="l1",
        description=(
            "Score of a unit: l1, l2 norm of its weights; topk learned; taylor accumulated |w*g|; activation mean "
            "|x| of what it computes; random (seeded)."
        ),
    )
    scope: Literal["uniform", "global"] = Field(
        default="uniform",
        description=(
            "uniform: every structure of a group keeps the same number, which stock configs can express; "
            "global: units of all structures compete, each structure's scores divided by their norm."
        ),
    )
    round_to: Rounding = Field(
        default=8,
        description="Kept counts are multiples of this (the nearest one, at least one); 1: ceil(dense_ratio * units).",
    )
    dense_ratio: Ratio | None = Field(default=None, description="Fraction kept by groups that do not say.")
    schedule: Schedule | None = Field(
        default=None,
        description="How the density falls; absent: cubic when schedule_offset_end is given, else constant.",
    )
    schedule_offset: Step = Field(default=1000, description="Applied optimizer steps before the first mask.")
    schedule_offset_end: Step | None = Field(
        default=None, description="Applied optimizer step at which the final density is reached."
    )
    schedule_offset_stride: Annotated[StrictInt, Field(ge=1)] = Field(
        default=1, description="Applied optimizer steps between two new masks."
    )
    shrink_at_end_of_schedule: StrictBool = Field(
        default=False,
        description=(
            "Whether the masked units are removed from model and optimizer as soon as the masks of all blocks with "
            "this key are final, so that the rest of the training is faster and takes less memory."
        ),
    )
    excluded_modules: ExcludedModules = ()
    seed: Seed | None = Field(
        default=None, description="Seed of methods topk and random; absent: the seed of the whole block."
    )
    randomize: Randomize | None = Field(
        default=None, description="Keeps a random choice by scores; absent: the largest."
    )

    @property
    def rounds_up(self) -> bool:
        """Whether the count is ceil(dense_ratio * units): where the removed library had the block, so did it."""
        return self.round_to == 1

    @property
    def effective_schedule(self) -> Schedule:
        """`schedule`, or what the presence of `schedule_offset_end` implies."""
        return self.schedule or ("constant" if self.schedule_offset_end is None else "cubic")

    def conflicts(self) -> Iterator[Conflict]:
        end = self.schedule_offset_end
        if self.schedule in ("linear", "cubic") and end is None:
            yield Conflict(
                ("schedule_offset_end",),
                None,
                f"a whole number, because schedule is {self.schedule}",
                'say when the final density is reached, or set schedule to "constant"',
            )
        if end is not None and end < self.schedule_offset:
            yield Conflict(
                ("schedule_offset_end",), end, f"at least schedule_offset ({self.schedule_offset})"
            )
        known = get_args(type(self).model_fields["method"].annotation)
        with_seed = [method for method in _METHODS_WITH_SEED if method in known]
        yield from without_effect(
            self, "seed", self.method not in with_seed, f"method is {listed(with_seed, 'or')}"
        )
        yield from randomize_conflicts(self.randomize, self.method, known)
        yield from without_effect(
            self,
            "schedule_offset_stride",
            end is None and self.method != "topk" and self.schedule_offset_stride > 1,
            "schedule_offset_end is given: one mask is made, and stays",
        )
        if self.shrink_at_end_of_schedule and self.method == "topk" and end is None:
            yield Conflict(
                ("schedule_offset_end",),
                None,
                "a whole number, because topk changes its mind until then and shrinking needs the last word",
            )


class WholeModelShared(StructuredShared):
    """What `depth_pruning` and `hidden_pruning` share: one structure, and weights that cannot learn a score."""

    schedule_offset: Step = Field(default=0, description="Applied optimizer steps before the first mask.")

    @property
    def rounds_up(self) -> bool:
        return False

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.method == "topk":
            # A layer that is bypassed, or a width that nothing reads, has no gradient to learn a score from.
            allowed = '"l1", "l2", "taylor", "activation" or "random"'
            yield Conflict(("method",), "topk", allowed, "a removed unit of this block gets no gradient")


class StructuredPruningConfig(GroupedBlock):
    """Removes structures; what kind is the block's."""

    kind: ClassVar[GroupKind]
    uses_kernels = True
    done_after_shrink = True

    dense_ratio: Ratio | None = Field(
        default=None,
        description="Short form: enables the block with this fraction kept everywhere, from the first step on.",
    )
    shared_parameters: StructuredShared = Field(
        default_factory=StructuredShared, description="What holds for all groups."
    )
    different_groups: Groups[StructuredPruningGroup] = Field(default_factory=dict)

    @property
    def settings(self) -> StructuredShared:
        return self.shared

    @property
    def says_enabled(self) -> bool:
        return super().says_enabled or self.dense_ratio is not None

    @property
    def shrinks(self) -> bool:
        return self.shared.shrink_at_end_of_schedule

    @property
    def narrows_hidden_states(self) -> bool:
        """Whether layers hand on fewer features once it has shrunk the model."""
        return self.shrinks and self.kind is GroupKind.HIDDEN

    @property
    def shared(self) -> StructuredShared:
        """`shared_parameters` as they hold, the short form included."""
        given = self.shared_parameters
        if self.dense_ratio is None:
            return given
        changes: dict[str, Any] = {"dense_ratio": self.dense_ratio}
        if not given.given("enabled"):
            changes["enabled"] = True
        if not given.given("schedule_offset"):
            changes["schedule_offset"] = 0
        return given.model_copy(update=changes)

    @property
    def groups(self) -> dict[str, StructuredPruningGroup]:
        """The groups with their density filled in; without any, one called "all" over every structure."""
        groups = dict(self.different_groups) or {"all": StructuredPruningGroup()}
        return {
            name: group.model_copy(update={"params": StructuredPruningParams(dense_ratio=self._ratio(group))})
            for name, group in groups.items()
        }

    def _ratio(self, group: StructuredPruningGroup) -> float | None:
        return group.params.dense_ratio or self.shared.dense_ratio

    def conflicts(self) -> Iterator[Conflict]:
        if self.dense_ratio is not None and self.shared_parameters.dense_ratio is not None:
            yield Conflict(("dense_ratio",), self.dense_ratio, "one dense_ratio", "remove one of the two")
        if not self.shared.enabled or self.shared.dense_ratio is not None:
            return
        if not self.different_groups:
            where: tuple[str, ...] = ("shared_parameters", "dense_ratio")
            yield Conflict(where, None, "a number > 0 and <= 1", "say which fraction of the units is kept")
        for name, group in self.different_groups.items():
            if group.params.dense_ratio is None:
                where = ("different_groups", name, "params", "dense_ratio")
                hint = "give it here or in shared_parameters.dense_ratio"
                yield Conflict(where, None, "a number > 0 and <= 1", hint)

    def describe(self, plan: StructurePlan | None = None) -> str:
        shared = self.shared
        facts = [f"method {shared.method}", steps(shared.schedule_offset, shared.schedule_offset_end)]
        if shared.scope == "global":
            facts.append("units of all structures compete")
        if shared.effective_schedule != "constant":
            facts.append(f"{shared.effective_schedule} schedule")
        if shared.randomize is not None and shared.randomize.temperature:
            facts.append(shared.randomize.describe())
        if shared.shrink_at_end_of_schedule:
            facts.append("then removed from model and optimizer")
        count = 0 if plan is None else len(plan.targets)
        return f"{plural(count, 'structure')}: {', '.join(facts)}"

    def planned(self, plan: StructurePlan) -> dict[str, float]:
        kept = sum(units_left(t.structure, t.dense_ratio, plan.shared) for t in plan.targets)
        return {"density": kept / max(1, sum(t.structure.units for t in plan.targets))}

    def describe_target(self, target: StructureTarget) -> str:
        """The cell of a plan's table, e.g. "768 of 1,536 rows"."""
        experts = target.structure.parts if self.kind is GroupKind.ROW else 1
        units = target.structure.units // experts
        kept = units_left(target.structure, target.dense_ratio, self.shared) // experts
        only_zeroed = "" if target.structure.removable else ", the others zero"
        of_each = f" of each of {experts} experts" if experts > 1 else ""
        return f"{kept:,} of {plural(units, str(self.kind))}{of_each}{only_zeroed}"
