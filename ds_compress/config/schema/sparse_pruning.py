"""`sparse_pruning`: which single weights become zero, by which score, when, and in which pattern."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from ds_compress.config.schema.block import LAYERS, TrainingState, WeightBlock, WeightSize, plural, steps
from ds_compress.config.schema.fields import (
    Conflict,
    ExcludedModules,
    Group,
    Groups,
    Ratio,
    Seed,
    Step,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictModel,
    without_effect,
)
from ds_compress.config.schema.patterns import UNSTRUCTURED, PatternText, density_conflict, parse_pattern
from ds_compress.config.schema.randomize import Randomize, randomize_conflicts
from ds_compress.config.targets import Target, TechniquePlan, exact_ceil, inputs_of
from ds_compress.errors import Problem, dotted, listed, shown
from ds_compress.modelinfo.inventory import exact_pattern, few
from ds_compress.modelinfo.kinds import MIXTURES, ModuleKind

_LEGACY_SNIP_PATTERN = "4x1"
_LEGACY_SNIP_DENSE_RATIO = 0.1
METHODS_WITHOUT_TRAINING = ("l1", "random")
_FREE_TO_REGROW = ("topk", "movement")
_METHODS_WITH_SEED = ("topk", "random")

_LATENT_BYTES = 4
_SCORE_BYTES = {"topk": 12, "taylor": 4, "movement": 4, "snip_momentum": 4, "l1": 0, "random": 0}
"""Per weight; topk learns its scores: the score and the two moments of its own Adam."""

Method = Literal["l1", "topk", "taylor", "movement", "snip_momentum", "random"]
Scope = Literal["layer", "group", "global"]
Schedule = Literal["constant", "linear", "cubic"]


class SparsePruningParams(StrictModel):
    """`params` of one group."""

    dense_ratio: Ratio | None = Field(
        default=None, description="Fraction of the weights that is kept, 0 < r <= 1."
    )


class CompleteSparsePruningParams(SparsePruningParams):
    """`params` of one group with the value that holds, whoever gave it."""

    dense_ratio: Ratio


class SparsePruningGroup(Group):
    """Weights that are pruned to the same density."""

    params: SparsePruningParams = Field(
        default_factory=SparsePruningParams, description="What differs between groups."
    )


class SparsePruningShared(StrictModel):
    """What holds for all groups of `sparse_pruning`."""

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    method: Method = Field(
        default="l1",
        description=(
            "Score of a weight: l1 |w|; topk learned scores; taylor accumulated |w*g|; movement accumulated "
            "-w*g; snip_momentum |w| and a running |w*g|; random (seeded)."
        ),
    )
    scope: Scope = Field(
        default="layer",
        description="Where the ratio holds: in every weight, over a group, or over all groups together.",
    )
    pattern: PatternText | None = Field(
        default=None,
        description='"unstructured", "NxM" blocks or "N:M"; absent: "4x1" for snip_momentum, else the first.',
    )
    block_pattern: PatternText | None = Field(default=None, description="Legacy name of `pattern`.")
    dense_ratio: Ratio | None = Field(
        default=None,
        description="Fraction kept by groups that do not say; absent: N/M for N:M, 0.1 for snip_momentum.",
    )
    schedule: Schedule | None = Field(
        default=None,
        description="How the density falls; absent: cubic when schedule_offset_end is given, else constant.",
    )
    schedule_offset: Step = Field(default=0, description="Applied optimizer steps before the first mask.")
    schedule_offset_end: Step | None = Field(
        default=None, description="Applied optimizer step at which the final density is reached."
    )
    schedule_offset_stride: Annotated[StrictInt, Field(ge=1)] = Field(
        default=1, description="Applied optimizer steps between two new masks."
    )
    regrowth: StrictBool | None = Field(
        default=None,
        description="Whether a masked weight may come back; absent: true for topk and movement, else false.",
    )
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Share of the old score that snip_momentum keeps at each step."
    )
    excluded_modules: ExcludedModules = ()
    seed: Seed | None = Field(
        default=None, description="Seed of methods topk and random; absent: the seed of the whole block."
    )
    randomize: Randomize | None = Field(
        default=None, description="Keeps a random choice by scores; absent: the largest."
    )

    @property
    def effective_pattern(self) -> str:
        """`pattern`, its legacy name, or the default of the method."""
        default = _LEGACY_SNIP_PATTERN if self.method == "snip_momentum" else UNSTRUCTURED
        return self.pattern or self.block_pattern or default

    @property
    def effective_schedule(self) -> Schedule:
        """`schedule`, or what the presence of `schedule_offset_end` implies."""
        return self.schedule or ("constant" if self.schedule_offset_end is None else "cubic")

    @property
    def effective_regrowth(self) -> bool:
        """`regrowth`, or what the method implies."""
        return self.method in _FREE_TO_REGROW if self.regrowth is None else self.regrowth

    @property
    def effective_dense_ratio(self) -> float | None:
        """The ratio of a group that gives none; None when every group has to give one."""
        by_pattern = parse_pattern(self.effective_pattern).density
        if by_pattern is not None:
            return by_pattern
        if self.dense_ratio is None and self.method == "snip_momentum":
            return _LEGACY_SNIP_DENSE_RATIO
        return self.dense_ratio

    def conflicts(self) -> Iterator[Conflict]:
        if self.pattern and self.block_pattern and self.pattern != self.block_pattern:
            yield Conflict(
                ("block_pattern",),
                self.block_pattern,
                f'the same as pattern, "{self.pattern}"',
                'block_pattern is the legacy name of "pattern": remove it',
            )
        if self.schedule in ("linear", "cubic") and self.schedule_offset_end is None:
            yield Conflict(
                ("schedule_offset_end",),
                None,
                f"a whole number, because schedule is {self.schedule}",
                'say when the final density is reached, or set schedule to "constant"',
            )
        if self.schedule_offset_end is not None and self.schedule_offset_end < self.schedule_offset:
            yield Conflict(
                ("schedule_offset_end",),
                self.schedule_offset_end,
                f"at least schedule_offset ({self.schedule_offset})",
            )
        if self.regrowth is False and self.method in _FREE_TO_REGROW:
            yield Conflict(
                ("regrowth",),
                False,
                f"true, because {self.method} changes its mind about masked weights",
                'remove "regrowth", or choose another method',
            )
        yield from without_effect(
            self, "momentum", self.method != "snip_momentum", 'method is "snip_momentum"'
        )
        yield from without_effect(
            self, "seed", self.method not in _METHODS_WITH_SEED, f"method is {listed(_METHODS_WITH_SEED)}"
        )
        yield from randomize_conflicts(self.randomize, self.method, get_args(Method))
        # Configs that spell out every default of the removed library say 1.
        once = (
            self.schedule_offset_end is None
            and not self.effective_regrowth
            and self.schedule_offset_stride > 1
        )
        yield from without_effect(
            self, "schedule_offset_stride", once, "schedule_offset_end is given: one mask is made, and stays"
        )
        yield from self._n_of_m_conflicts()

    def _n_of_m_conflicts(self) -> Iterator[Conflict]:
        pattern = self.effective_pattern
        if parse_pattern(pattern).kind != "n_of_m":
            return
        if self.scope != "layer":
            yield Conflict(
                ("scope",), self.scope, f'"layer", because pattern {pattern} fixes the density everywhere'
            )
        yield from density_conflict(("dense_ratio",), self.dense_ratio, pattern)


class SparsePruningConfig(WeightBlock):
    """Sets single weights to zero while training; the mask is applied to the fp32 weights after each step."""

    key = "sparse_pruning"
    uses_kernels = True
    layer_kinds = LAYERS | MIXTURES | {ModuleKind.EMBEDDING}
    removes_weights = True

    shared_parameters: SparsePruningShared = Field(
        default_factory=SparsePruningShared, description="What holds for all groups."
    )
    different_groups: Groups[SparsePruningGroup] = Field(default_factory=dict)

    @property
    def groups(self) -> dict[str, SparsePruningGroup]:
        """The groups with their density filled in; without any, one called "all" over every layer."""
        groups = dict(self.different_groups) or {"all": SparsePruningGroup()}
        return {
            name: group.model_copy(update={"params": self._complete(group)}) for name, group in groups.items()
        }

    def _complete(self, group: SparsePruningGroup) -> CompleteSparsePruningParams:
        ratio = group.params.dense_ratio or self.shared_parameters.effective_dense_ratio
        return CompleteSparsePruningParams.model_validate({"dense_ratio": ratio})

    def conflicts(self) -> Iterator[Conflict]:
        shared = self.shared_parameters
        for name, group in self.different_groups.items():
            where = ("different_groups", name, "params", "dense_ratio")
            yield from density_conflict(where, group.params.dense_ratio, shared.effective_pattern)
            if shared.enabled and group.params.dense_ratio is None and shared.effective_dense_ratio is None:
                yield Conflict(
                    where, None, "a number > 0 and <= 1", "give it here or in shared_parameters.dense_ratio"
                )
        if shared.enabled and not self.different_groups and shared.effective_dense_ratio is None:
            yield Conflict(
                ("shared_parameters", "dense_ratio"),
                None,
                "a number > 0 and <= 1",
                "without different_groups all layers are pruned: say to which density",
            )

    def meaning(self) -> dict[str, Any]:
        shared = self.shared_parameters
        effective = {"pattern": shared.effective_pattern, "dense_ratio": shared.effective_dense_ratio}
        meant = self.model_dump()
        meant["shared_parameters"] |= {**effective, "block_pattern": None}
        return meant

    def describe_settings(self) -> str:
        shared = self.shared_parameters
        scope = {
            "layer": "each weight keeps its ratio",
            "group": "one threshold per group",
            "global": "one threshold over all groups",
        }[shared.scope]
        facts = [f"method {shared.method}", f"pattern {shared.effective_pattern}", scope]
        if shared.effective_schedule != "constant":
            facts.append(f"{shared.effective_schedule} schedule")
        if shared.schedule_offset_end is not None or shared.effective_regrowth:
            facts.append(f"a new mask every {plural(shared.schedule_offset_stride, 'step')}")
        if shared.effective_regrowth:
            facts.append("masked weights may come back")
        if shared.randomize is not None and shared.randomize.temperature:
            facts.append(shared.randomize.describe())
        return ", ".join(facts)

    def planned(self, plan: TechniquePlan) -> dict[str, float]:
        sizes = [(math.prod(t.shape), t.params.dense_ratio) for t in plan.targets]
        kept = sum(exact_ceil(ratio, numel) for numel, ratio in sizes)
        return {"sparsity": 1 - kept / max(1, sum(numel for numel, _ in sizes))}

    def describe_target(self, target: Target) -> str:
        shared = self.shared_parameters
        when = steps(shared.schedule_offset, shared.schedule_offset_end)
        return f"{target.params.dense_ratio:.4g} kept, {when}"

    def estimate(self, size: WeightSize, target: Target, format: str, packs: bool) -> WeightSize:
        return size.with_(nonzeros=exact_ceil(target.params.dense_ratio, size.numel), is_sparse=True)

    def training_state(self, targets: Sequence[Target], processes: int) -> TrainingState:
        shared = self.shared_parameters
        share = -(-sum(math.prod(target.shape) for target in targets) // processes)
        return TrainingState(
            mask=-(-share // 8),
            latent=_LATENT_BYTES * share if shared.effective_regrowth else 0,
            scores=_SCORE_BYTES[shared.method] * share,
        )

    # -- limits ----------------------------------------------------------------------------------------

    def limits(self, targets: Sequence[Target]) -> Iterator[Problem]:
        yield from self._frozen(targets)
        yield from self._uneven_n_of_m(targets)
        yield from self._blocks_across_experts(targets)

    def _frozen(self, targets: Sequence[Target]) -> Iterator[Problem]:
        shared = self.shared_parameters
        if shared.method in METHODS_WITHOUT_TRAINING and not shared.effective_regrowth:
            return
        frozen = [target.module_name for target in targets if not target.param.requires_grad]
        if frozen:
            yield Problem(
                dotted(self.key, "shared_parameters", "method"),
                f"{shown(shared.method)}{' with regrowth' if shared.regrowth else ''} on {few(frozen)}, whose weight "
                "is frozen (requires_grad is False)",
                f"{listed(METHODS_WITHOUT_TRAINING)} without regrowth: a weight that does not train has no gradient to "
                "score by",
                "choose such a method, unfreeze these weights, or add them to shared_parameters.excluded_modules, "
                f"e.g. {shown(exact_pattern(frozen[0]))}",
            )

    def _uneven_n_of_m(self, targets: Sequence[Target]) -> Iterator[Problem]:
        text = self.shared_parameters.effective_pattern
        pattern = parse_pattern(text)
        if pattern.kind != "n_of_m":
            return
        uneven = [target for target in targets if inputs_of(target) % pattern.columns]
        if uneven:
            given = "pattern" if self.shared_parameters.pattern else "block_pattern"
            names = few([f"{target.module_name} ({inputs_of(target)} inputs)" for target in uneven])
            yield Problem(
                dotted(self.key, "shared_parameters", given),
                f'"{text}" with {names}',
                f"layers whose number of inputs is a multiple of {pattern.columns}",
                "exclude these layers in excluded_modules, or choose another pattern",
            )

    def _blocks_across_experts(self, targets: Sequence[Target]) -> Iterator[Problem]:
        """The rows of all experts of a stack follow each other in memory, so that a block would cover two experts."""
        text = self.shared_parameters.effective_pattern
        pattern = parse_pattern(text)
        if pattern.kind != "blocks":
            return
        across = [
            target
            for target in targets
            if target.kind.is_experts
            and target.shape[1] % (pattern.columns if target.kind.is_transposed else pattern.rows)
        ]
        if across:
            names = few([f"{target.module_name} {list(target.shape)}" for target in across])
            yield Problem(
                dotted(self.key, "shared_parameters", "pattern"),
                f'"{text}" with {names}',
                "blocks that divide the matrix of each expert",
                "exclude these experts in excluded_modules, or choose another pattern",
            )

    def limits_beside(
        self, techniques: Mapping[str, TechniquePlan], shapes_after: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Problem]:
        pattern = self.shared_parameters.effective_pattern
        cut = [t.module_name for t in techniques[self.key].targets if t.param_name in shapes_after]
        if pattern != UNSTRUCTURED and cut:
            yield Problem(
                dotted(self.key, "shared_parameters", "pattern"),
                f'"{pattern}" with {few(cut)}, which lose rows or columns',
                f'"{UNSTRUCTURED}": what is left of a weight would be out of step with the pattern',
                "exclude these layers in excluded_modules of one of the blocks",
            )
