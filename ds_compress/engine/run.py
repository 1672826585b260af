"""One compressed training run: the config, the plan, the techniques, and what they are attached to."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.config.report.plan import Plan
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.distill.teacher import Teacher
from ds_compress.engine.admission import refuse_learning_of_frozen
from ds_compress.engine.checkpoint import origin
from ds_compress.engine.history import History, LastLoss
from ds_compress.engine.outcome import Outcome
from ds_compress.engine.patches import Patches
from ds_compress.engine.step.hooks import StepHooks
from ds_compress.engine.step.loop import LoopHooks
from ds_compress.engine.zero import copies
from ds_compress.select.gumbel import commitments
from ds_compress.sharding.shards import Shards
from ds_compress.structure.prunable_group import PrunableGroup
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.techniques.base import Technique


class CompressionRun:
    """What `engine.compression` is; without an engine, what drives the techniques in a plain training loop.

    Attributes:
        given: the whole config, as the JSON has it.
        plan: which weight gets what; of the model as it is now, so without what a shrink has done already.
        techniques: the attached ones, by name.
        model, teacher: what trains, and whom it learns from.
        engine: the DeepSpeed engine; None before it exists, and in a loop without one.
        shards: this process' fragments of the masters, once attached.
        removed, added, frozen: parameters that preparing the model took away, new ones that an optimizer has to train,
            and those that it has to train no longer, or that are gone.
        ended_metrics, ended_seeds: last numbers and secret seeds of techniques that a shrink has ended.
        shrunk_units: what is left of the prunable groups that a shrink removed, by name; empty before.
        patches: what is replaced on the engine while the run is attached.
        at_release: what is called once when the run is over, or goes on in another one.
        kernels: a block of code in which ops run as the JSON's `kernels` says; entered around the engine's steps.
        construction: how the engine was constructed, for those who do it again (`engine.construction`).
        outcome: what it was started for, and where its results lie.
        uncut: the model before a shrink, for the way back (`engine.resize.grow`).
        history, loss: the numbers of the steps so far, in process 0, and the last loss of this process.
    """

    def __init__(
        self,
        given: CompressionConfig,
        plan: Plan,
        techniques: dict[str, Technique],
        model: nn.Module,
        teacher: Teacher | None = None,
    ) -> None:
        self.given = given
        self.plan = plan
        self.techniques = techniques
        self.model = model
        self.teacher = teacher
        self.engine: Any = None
        self.shards: Shards
        self.removed: list[nn.Parameter] = []
        self.added: list[nn.Parameter] = []
        self.frozen: list[nn.Parameter] = []
        self.shrunk_units: dict[str, torch.Tensor] = {}
        self.ended_metrics: dict[str, float] = {}
        self.ended_seeds: dict[str, str] = {}
        self.patches = Patches()
        self.kernels: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self.construction: Any = None
        self.uncut: Any = None
        self.at_release: list[Callable[[], None]] = []
        self.history, self.loss = History(), LastLoss()
        self.warned_unfinished_at = -1
        self.outcome = Outcome()
        self._hooks: StepHooks | LoopHooks | None = None
        self._is_released = False
        self._at_start: dict[str, Any] = {}

    @property
    def config(self) -> CompressionConfig:
        """What is still to be done: `given`, without what a shrink has done."""
        return self.plan.config

    @property
    def block(self) -> dict[str, Any]:
        """`given` as JSON values, with the keys that were written and no others."""
        return self.given.model_dump(mode="json", exclude_unset=True)

    @property
    def stages(self) -> dict[str, Technique]:
        """The old name of `techniques`."""
        return self.techniques

    # -- life ------------------------------------------------------------------------------------------

    def connect(self, engine: Any, hooks: StepHooks | LoopHooks, find_shards: Callable[[], Shards]) -> None:
        """Techniques are driven by `hooks` from now on, on the fragments that `find_shards` finds.

        engine: None in a loop without one. find_shards: a collective; asked again when a checkpoint was loaded.
        """
        if self._hooks is not None:
            self._hooks.remove()
        self._is_released = False
        self._at_start = copy.deepcopy({name: t.state_dict() for name, t in self.techniques.items()})
        self.engine, self._hooks, self._find_shards = engine, hooks, find_shards
        self.find_fragments()

    def find_fragments(self) -> None:
        """Gives every technique the fragments of the masters as they are now; a collective."""
        assert self._hooks is not None
        self.shards = self._find_shards()
        refuse_learning_of_frozen(
            self.techniques.values(), [fragment.name for fragment in self.shards.frozen]
        )
        self._hooks.use(self.shards)
        for technique in self.techniques.values():
            technique.attach(self.shards)

    @property
    def is_attached(self) -> bool:
        """Whether an engine or a loop drives the techniques; before, the model is only prepared."""
        return self._hooks is not None

    @property
    def is_running(self) -> bool:
        """Whether it is attached, and neither detached nor ended."""
        return self._hooks is not None and not self._is_released

    def end_step(self) -> None:
        """In a loop without an engine: the optimizer has stepped. With one, which counts by itself, nothing."""
        if isinstance(self._hooks, LoopHooks) and self.engine is None:
            before = self.applied_steps
            self._hooks.end_step()
            if self.applied_steps > before:
                self.note_step()

    def detach(self) -> None:
        """Takes every hook and class swap away, once; masked weights stay zero, parameters stay the same objects."""
        self.make_way()
        self._forget()

    def make_way(self) -> None:
        """As `detach`, for a rebuild to go on: what was learned beside the model stays with it."""
        self._release()
        for technique in self.techniques.values():
            technique.detach()
        in_forward = {name for name, technique in self.techniques.items() if technique.is_in_forward}
        origin.mark(self.model, [name for name in self.unfinished if name not in in_forward])

    def end(self) -> None:
        """Training is over: as `detach`, but quantizers stay on the modules, for those who store what they compute."""
        self._release()
        for technique in self.techniques.values():
            if not technique.is_in_forward:
                technique.detach()
        self._forget()

    def _release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
        if self._hooks is not None:
            self._hooks.remove()
        self.patches.close()
        while self.at_release:
            self.at_release.pop()()
        if self.engine is not None and vars(self.engine).get("compression") is self:
            del self.engine.compression

    def _forget(self) -> None:
        for technique in self.techniques.values():
            technique.forget()

    # -- what it is about ------------------------------------------------------------------------------

    @property
    def applied_steps(self) -> int:
        """Optimizer steps applied so far; what every schedule counts."""
        return 0 if self._hooks is None else self._hooks.applied_steps

    @property
    def unfinished(self) -> list[str]:
        """Blocks whose result a plain copy of the weights would lack: quantizers, and units that are only masked."""
        return [name for name, technique in self.techniques.items() if technique.is_lost_in_plain_weights]

    @property
    def prunable_groups(self) -> dict[str, PrunableGroup]:
        """What techniques will remove from the model, by name."""
        return {n: g for technique in self.techniques.values() for n, g in technique.prunable_groups.items()}

    @property
    def masks_are_final(self) -> bool:
        """No mask of a prunable group will be made any more, and the last ones are applied."""
        return all(t.masks_are_final for t in self.techniques.values() if t.prunable_groups)

    @property
    def kept_units(self) -> dict[str, torch.Tensor]:
        """Sorted int64 indices of the units that masks keep now, by name of the prunable group; those with a mask."""
        return {name: u for t in self.techniques.values() for name, u in t.kept_units().items()}

    def pruning_plan(self) -> PruningPlan:
        """What the active masks will remove from the model."""
        return PruningPlan.of(list(self.prunable_groups.values()), self.kept_units)

    def keep_units(self, units: Mapping[str, torch.Tensor]) -> None:
        """Masks keep these units from now on, whatever the schedules say; for a run that had shrunk to them.

        Raises:
            ValueError: they are of other prunable groups than those of the JSON.
        """
        if set(self.prunable_groups) != set(units):
            unknown = sorted(set(self.prunable_groups) ^ set(units))
            raise ValueError(
                f"the checkpoint was shrunk in other structures than the JSON has: {unknown[:3]}"
            )
        for technique in self.techniques.values():
            for name in technique.prunable_groups:
                technique.keep_units(name, units[name])

    def refresh_weights(self) -> None:
        """Every weight becomes its rounded fp32 master, for those who are about to read it; a collective."""
        for technique in self.techniques.values():
            technique.refresh()
        if self.engine is not None:
            copies.refresh(self.engine)

    def mask_frozen_weights(self) -> None:
        """Puts the masks into weights that no optimizer steps, which a checkpoint may have brought back dense."""
        assert self._hooks is not None
        self._hooks.mask_frozen_weights()

    def metrics(self) -> dict[str, float]:
        """{"<technique>/<number>": value} of all techniques; of those that a shrink has ended, the last values."""
        numbers = {
            f"{name}/{key}": value
            for name, technique in self.techniques.items()
            for key, value in technique.metrics().items()
        }
        return {**self.ended_metrics, **numbers}

    def note_step(self) -> None:
        """Keeps the numbers of the step that was just applied, where its turn has come; waits for nothing."""
        step = self.applied_steps
        if self.history.is_due(step):
            self.history.add(step, self._numbers(step))

    def recorded_history(self) -> dict[str, Any]:
        """The history up to now, as `History.as_data` gives it; waits for the device."""
        step = self.applied_steps
        return self.history.as_data(step, self._numbers(step)) if step else self.history.as_data()

    def _numbers(self, step: int) -> dict[str, float | torch.Tensor]:
        numbers: dict[str, float | torch.Tensor] = dict(self.ended_metrics)
        for name, technique in self.techniques.items():
            numbers |= {f"{name}/{key}": value for key, value in technique.history(step).items()}
        return numbers if self.loss.value is None else {**numbers, "training/loss": self.loss.value}

    @property
    def secret_seeds(self) -> dict[str, str]:
        """{technique: secret seed of its random choice}, for checkpoints only."""
        own = {
            n: seed for n, technique in self.techniques.items() if (seed := technique.secret_seed) is not None
        }
        return {**self.ended_seeds, **own}

    @property
    def commitments(self) -> dict[str, str]:
        """{"<technique>.randomize.seed": hash of the secret seed}, which everybody may know."""
        return commitments(self.secret_seeds)

    # -- state, for checkpoints ------------------------------------------------------------------------
    # Techniques stand under "stages" in checkpoints since the first of them.

    def state_dict(self) -> dict[str, Any]:
        """Counters and replicated state: plain values and small tensors."""
        return {
            "applied_steps": self.applied_steps,
            "shrunk_units": self.shrunk_units,
            "secret_seeds": self.secret_seeds,
            "stages": {name: technique.state_dict() for name, technique in self.techniques.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores counters and replicated state after the masters were loaded; fragments are found anew."""
        self.find_fragments()
        self.start_at(int(state["applied_steps"]))
        self.ended_seeds = dict(state.get("secret_seeds", {}))
        for name, technique in self.techniques.items():
            if name in state["stages"]:
                technique.load_state_dict(state["stages"][name])

    def start_at(self, step: int) -> None:
        """So many steps count as applied."""
        assert self._hooks is not None
        self._hooks.applied_steps = step

    def begin_anew(self) -> None:
        """As when it was connected: nothing is masked, scored or counted. For weights that come without our state."""
        self.history.clear()
        self.load_state_dict({"applied_steps": 0, "stages": copy.deepcopy(self._at_start)})
        for technique in self.techniques.values():
            technique.load_fragment_state({})
            technique.load_process_state(None)
