"""What every technique is: one block of the JSON, attached to a model and stepped beside its optimizer.

A technique never asks where a tensor lives. It changes modules in `prepare`, before any optimizer exists, and it reads
and writes *fragments* of the fp32 master weights afterwards. Everything that crosses processes goes through the
`Shards` it was given, so the same code runs on every ZeRO stage. Nothing asks which technique one is: what differs
between them stands here, as a method or an attribute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ds_compress.errors import Problem, dotted

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ds_compress.config.report.plan import Plan
    from ds_compress.config.schema.compression_training import CompressionConfig
    from ds_compress.distill.teacher import Teacher
    from ds_compress.sharding.fragment import Fragment
    from ds_compress.sharding.shards import Shards
    from ds_compress.structure.prunable_group import PrunableGroup
    from ds_compress.techniques.training_engine import TrainingEngine


@dataclass(frozen=True)
class TechniqueContext:
    """What techniques are made from: the config, what it means for the model, and who teaches.

    all_gather_rows: [rows, ...] of this process -> those of all processes, and where its own begin.
    """

    config: CompressionConfig
    plan: Plan
    model: nn.Module
    teacher: Teacher | None = None
    all_gather_rows: Callable[[torch.Tensor], tuple[torch.Tensor, int]] | None = None


def engine_only(block: str, key: str, got: str, allowed: str) -> Problem:
    """The problem of a key that only a DeepSpeed engine can serve, in a training loop without one."""
    hint = "deepspeed.initialize takes a prepared model over, also on ZeRO-0 with one process"
    return Problem(dotted(block, *key.split(".")), got, f"{allowed} without a DeepSpeed engine", hint)


class Technique:
    """Base class with empty hooks; a technique overrides the ones that it needs.

    `step` is always the number of optimizer steps *applied* so far: 0 before the first one, and it does
    not move on a skipped step or a micro-step.
    """

    name: ClassVar[str]
    is_in_forward: ClassVar[bool] = False
    """Whether it changes what layers compute in forward (fake quantization), and nothing at an optimizer's step.

    Plain copies of the weights lack its result, and it stays on the modules when training is over.
    """
    survives_shrink: ClassVar[bool] = False
    """Whether this very object goes on beside the smaller model; others are made anew, with its state."""
    prunable_groups: Mapping[str, PrunableGroup] = {}
    """What it will remove from the model, by name."""
    shrinks = False
    """Whether that is to happen in mid-training, as soon as its masks are final."""
    masks_are_final = True
    """No mask will be made any more, and the last ones are applied."""

    @classmethod
    def of(cls, context: TechniqueContext) -> Self | None:
        """The technique of a run; None where its block is absent or not enabled.

        By default one whose block claims weights or prunable groups, made from that part of the plan.

        Raises:
            ValueError: settings that do not fit this model.
        """
        plan = {**context.plan.structures, **context.plan.techniques}.get(cls.name)
        return None if plan is None else cls(plan, context.config.seed)  # type: ignore[call-arg]

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        """Swaps module classes in place; returns new trainable parameters by qualified name.

        Runs at the start of the engine's constructor: the optimizer does not exist yet. Inside
        `full_parameters([p, ...])` the data of the parameters is whole (each process must enter alike).
        """
        return {}

    def follow(self, predecessor: Technique) -> None:
        """Before it is attached: it takes the place of `predecessor`, whose model was rebuilt in mid-training.

        For what `attach_engine` would otherwise decide anew; state follows by `load_state_dict`.
        """

    def attach(self, shards: Shards) -> None:
        """The optimizer exists; `shards` gives this process its fragments of the master weights."""

    def attach_engine(self, engine: TrainingEngine) -> None:
        """The DeepSpeed engine exists, and `attach` was called; a collective. Not called in a loop without one."""

    def before_step(self, step: int) -> None:
        """Before the optimizer step, same order in every process: reductions over `shards` are allowed.

        The step may still be skipped: `on_skipped_step` then puts back all that was changed here.
        """

    def on_gradients(self, fragments: Iterable[Fragment], settings: Mapping[str, Any]) -> None:
        """The gradients of these fragments are final (unscaled, clipped), their weights not yet updated.

        `settings` is the optimizer's parameter group that they belong to: lr, betas, weight_decay, ...
        """

    def on_update(self, fragments: Iterable[Fragment]) -> None:
        """The fp32 masters of these fragments were updated; the 16-bit copies are not yet made."""

    def after_step(self, step: int) -> None:
        """`step` optimizer steps are now applied."""

    def on_skipped_step(self) -> None:
        """The step that `before_step` announced was not applied: nothing that it computed remains. No collectives."""

    @property
    def clears_gradients(self) -> bool:
        """Whether `gradient_mask` may give something in the step now running; the same in every process."""
        return False

    def gradient_mask(self, name: str) -> torch.Tensor | None:
        """Packed mask of what will be applied of the gradient of a fragment, in the step now running; None: all."""
        return None

    def masked_weights(self) -> Collection[str]:
        """Names of all parameters that `on_update` may clear elements of; the same in every process."""
        return ()

    def learning_weights(self) -> Collection[str]:
        """Those whose masks follow their gradients, or come and go while they train."""
        return ()

    @property
    def has_new_masks(self) -> bool:
        """Whether `before_step` of the step now running made masks; the same in every process."""
        return False

    def refresh(self) -> None:
        """Copies of weights become exact for those who are about to read them; a collective."""

    def detach(self) -> None:
        """Gives the model its own classes back; parameters, hooks and flags stay as they are."""

    def forget(self) -> None:
        """Training is over: the model loses what was learned beside it."""

    def state_dict(self) -> dict[str, Any]:
        """Small replicated state: equal in every process, JSON-like values and small tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """{kind: {parameter name: flat tensor aligned with this process' fragment}}; bool or fp32."""
        return {}

    def load_fragment_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restores what `fragment_state` returned, for the fragments that this process owns now."""

    def process_state(self) -> dict[str, Any]:
        """State of this process alone, whatever it owns; tensors and plain values. Empty: nothing is stored."""
        return {}

    def load_process_state(self, state: Mapping[str, Any] | None) -> None:
        """Restores what `process_state` returned here; None: nothing that fits was stored, begin anew."""

    def merge_process_states(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What each process goes on with, of what `process_state` returned in another number of processes.

        states: of each of them; tensors are functions that read them. Empty: begin anew.
        """
        return {}

    def kept_units(self) -> Mapping[str, torch.Tensor]:
        """Sorted int64 indices of the units that masks keep now, by name of the prunable group; those with a mask."""
        return {}

    def keep_units(self, name: str, units: torch.Tensor) -> None:
        """The prunable group `name` keeps these from now on, whatever the schedule says; for a shrink that follows."""
        raise KeyError(name)

    @property
    def has_results(self) -> bool:
        """Whether masks were made or loaded, so that weights differ from what they were without this technique."""
        return False

    def drop_layers(self, names: Collection[str]) -> None:
        """The model is about to lose these layers; for techniques that survive it."""

    def keep_experts(self, kept: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Stacks of experts have lost some: what stays on the modules, or is carried over a shrink, loses them, too.

        kept: (name of the stack before, [experts, ...]) -> those that stay.
        """

    def after_shrink(self) -> None:
        """The model was cut, and this technique (of the smaller model) has all state of its predecessor."""

    def renamed_state(self, renamed: Callable[[str], str | None]) -> dict[str, Any]:
        """`state_dict` for a model whose names change by `renamed`; None: the module is gone."""
        return self.state_dict()

    def untouched(self) -> list[str]:
        """Names of targets that stay whole although the JSON asks for less of them, because counts are rounded."""
        return []

    @property
    def is_lost_in_plain_weights(self) -> bool:
        """Whether a plain copy of the weights lacks its result."""
        return self.is_in_forward

    def without_engine(self) -> Iterator[Problem]:
        """What it cannot do in a training loop without a DeepSpeed engine."""
        yield from ()

    def with_tensor_parallelism(self) -> Iterator[tuple[str, str, str, str]]:
        """(key path, got, allowed, why) of what it cannot do where processes hold shards of a layer; all of it."""
        reason = "it was not made for layers of which each process holds a shard"
        if self.is_in_forward:
            reason = "AutoTP replaces layers that fake quantization has changed by its own, which drops it silently"
        yield "", "enabled", "sparse_pruning alone", reason

    @property
    def secret_seed(self) -> str | None:
        """Of a random choice, 64 hexadecimal digits, never to be logged; None where there is none."""
        return None

    def metrics(self) -> dict[str, float]:
        """Numbers for the log and the monitor, at any time. No collectives: process 0 may be the only one to ask."""
        return {}

    def history(self, step: int) -> Mapping[str, float | torch.Tensor]:
        """As `metrics`, after `step` applied steps, to be kept for a report: nothing here waits for a device.

        Numbers that lie on one stay tensors of one number. `planned_<name>`: what the schedule asks of <name> then.
        """
        return self.metrics()

    def report_details(self) -> dict[str, Any]:
        """What a report shows beside numbers, as JSON values; asked for when a checkpoint or an export is written."""
        return {}
