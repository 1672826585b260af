"""What every block of the JSON is. A block owns what is said of it: description, limits, layer kinds, bytes.

Whoever prints, checks or estimates a config asks its blocks, and knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from ds_compress.config.schema.fields import Conflict, StrictModel
from ds_compress.config.targets import Target, TechniquePlan
from ds_compress.errors import Problem
from ds_compress.modelinfo.kinds import ModuleKind

LAYERS = frozenset(
    {
        ModuleKind.LINEAR,
        ModuleKind.CONV1D,
        ModuleKind.CONV2D,
        ModuleKind.LINEAR_ACTIVATION,
        ModuleKind.EXPERTS,
        ModuleKind.TRANSPOSED_EXPERTS,
    }
)


class ScheduleEnd(NamedTuple):
    """When one schedule of a block has ended.

    keys: of the JSON value that decides it, below the block. value: what stands there. step: applied optimizer steps
    after which the block is what it will be in the end.
    """

    keys: tuple[str, ...]
    value: object
    step: int


@dataclass(frozen=True)
class WeightSize:
    """What one weight takes on disk, as the blocks that claim it make it.

    shape: full shape after all removals. numel: of that. nonzeros: of that. bits: of one value. scale_bytes: beside the
    values. bytes: of all, in the format of the export. is_sparse: whether single weights of it are zero. users: modules
    that share it.
    """

    shape: tuple[int, ...]
    numel: int
    nonzeros: int
    bits: int
    bytes: int
    scale_bytes: int = 0
    is_sparse: bool = False
    users: int = 1

    def with_(self, **changes: Any) -> WeightSize:
        return replace(self, **changes)


@dataclass(frozen=True)
class TrainingState:
    """Bytes that one process holds of a technique's own state, when all processes share it evenly."""

    mask: int = 0
    latent: int = 0
    scores: int = 0

    @property
    def total(self) -> int:
        return self.mask + self.latent + self.scores

    def __add__(self, other: TrainingState) -> TrainingState:
        return TrainingState(self.mask + other.mask, self.latent + other.latent, self.scores + other.scores)


class Block(StrictModel):
    """One block of `compression_training`; the values of its keys, and what follows from them."""

    key: ClassVar[str]
    """Its name in the JSON."""
    uses_kernels: ClassVar[bool] = False
    """Whether it calls ops that have native kernels."""
    done_after_shrink: ClassVar[bool] = False
    """Whether nothing is left to do for it once a shrink has removed what is masked."""
    is_in_forward: ClassVar[bool] = False
    """Whether it is fake quantization, which layers compute in forward."""

    @property
    def settings(self) -> Any:
        """The object that has the key `enabled`."""
        return self

    @property
    def where_enabled(self) -> tuple[str, ...]:
        """The keys of that object, below the block."""
        return ()

    @property
    def is_enabled(self) -> bool:
        return bool(self.settings.enabled)

    @property
    def says_enabled(self) -> bool:
        """Whether the JSON has `enabled` in it, true or false, in one place or the other."""
        return "enabled" in self.settings.model_fields_set

    @property
    def keeps_everything(self) -> bool:
        """Whether it is a pruning block that removes nothing."""
        return False

    @property
    def shrinks(self) -> bool:
        """Whether it removes parts of the model in mid-training."""
        return False

    @property
    def insists_on_native(self) -> str | None:
        """The keys, dotted, that insist on native kernels; None when none does."""
        return None

    def meaning(self) -> dict[str, Any]:
        """All values, given or not, in one form: equal for two blocks that mean the same."""
        return self.model_dump()

    def describe(self, plan: Any = None) -> str:
        """One line for the log and the plan: what it does, and when. plan: what it claims, if it claims anything."""
        raise NotImplementedError

    def schedule_ends(self) -> Iterator[ScheduleEnd]:
        """The ends of all schedules that change what is left of the model, or what is sent."""
        yield from ()

    @property
    def first_step(self) -> int:
        """Optimizer steps that are applied before it changes anything."""
        return int(getattr(self.settings, "schedule_offset", 0))

    @property
    def when(self) -> str:
        """From which step, and until which where it goes on to change; in the words of `steps`."""
        last = max((end.step for end in self.schedule_ends()), default=self.first_step)
        return steps(self.first_step, last)

    def planned(self, plan: Any) -> dict[str, float]:
        """Those of the technique's `metrics` whose value at the end of all schedules is known, and that value.

        plan: what it claims, as in `describe`.
        """
        return {}

    def conflicts_beside(self, enabled: Mapping[str, Block]) -> Iterator[Conflict]:
        """What is wrong with it beside the other enabled blocks; `where` begins with the name of a block."""
        yield from ()


class GroupedBlock(Block):
    """A block with `shared_parameters` and `different_groups`, each group some modules and their `params`."""

    shared_parameters: Any
    different_groups: Any

    @property
    def settings(self) -> Any:
        return self.shared_parameters

    @property
    def where_enabled(self) -> tuple[str, ...]:
        return ("shared_parameters",)

    @property
    def groups(self) -> dict[str, Any]:
        """The groups with everything filled in that they leave to others."""
        return dict(self.different_groups)

    @property
    def keeps_everything(self) -> bool:
        ratios = [getattr(group.params, "dense_ratio", None) for group in self.groups.values()]
        return bool(ratios) and all(ratio == 1 for ratio in ratios)

    def schedule_ends(self) -> Iterator[ScheduleEnd]:
        key = (
            "schedule_offset"
            if getattr(self.settings, "schedule_offset_end", None) is None
            else "schedule_offset_end"
        )
        step = getattr(self.settings, key)
        yield ScheduleEnd(("shared_parameters", key), step, step)


class WeightBlock(GroupedBlock):
    """A block that claims single weights (or inputs) of layers by regexes on their names."""

    layer_kinds: ClassVar[frozenset[ModuleKind]] = LAYERS
    """What it can treat."""
    claims_inputs: ClassVar[bool] = False
    """Whether it treats the inputs of layers, so that two layers may share a weight and have a claim each."""
    column: ClassVar[str] = "pruning"
    """The column of a plan's table that it writes to."""
    removes_weights: ClassVar[bool] = False
    """Whether single weights become zero."""

    def describe(self, plan: TechniquePlan | None = None) -> str:
        noun = "input" if self.claims_inputs else "weight"
        count = 0 if plan is None else len(plan.targets)
        return f"{plural(count, noun)}: {self.describe_settings()}"

    def describe_settings(self) -> str:
        """What holds for all its groups, in words."""
        raise NotImplementedError

    def describe_target(self, target: Target) -> str:
        """The cell of a plan's table."""
        raise NotImplementedError

    def limits(self, targets: Sequence[Target]) -> Iterator[Problem]:
        """What is wrong with its settings on these weights."""
        yield from ()

    def limits_beside(
        self, techniques: Mapping[str, TechniquePlan], shapes_after: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Problem]:
        """What is wrong with its targets beside the other blocks' claims.

        techniques: of all enabled blocks of this kind, itself included. shapes_after: of the weights that structured
        pruning will make smaller, by name.
        """
        yield from ()

    def estimate(self, size: WeightSize, target: Target, format: str, packs: bool) -> WeightSize:
        """What it makes of the weight's size. format: of the export. packs: whether stock code loads packed weights."""
        return size

    def training_state(self, targets: Sequence[Target], processes: int) -> TrainingState:
        """What each of so many processes holds beside the weights."""
        return TrainingState()


def plural(count: int, noun: str) -> str:
    """E.g. "1 weight", "1,024 weights"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def steps(begin: int, end: int | None = None) -> str:
    """E.g. "steps 100-900", or "from step 100" for what never ends, or at once."""
    return f"from step {begin}" if end is None or end <= begin else f"steps {begin}-{end}"
