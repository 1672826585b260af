"""What belongs to a run rather than to a weight, and goes on when the engine around a model is built anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_compress.engine.zero import internals
from ds_compress.engine.zero.groups import GroupSettings, Schedulers

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps", "training", "losses")
_LAST_STEP = ("_global_grad_norm", "_step_applied")
"""What a Trainer logs right after the step that shrinks."""
_SHARING = "_ds_compress_sharing"
_KEPT_OBJECTS = ("training_dataloader", "monitor")


class Carried:
    """Counters, settings of parameter groups, schedules and loss scale of an engine."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer, self.basic, self.scheduler = (
            engine.optimizer,
            engine.basic_optimizer,
            engine.lr_scheduler,
        )
        self.values = {
            name: getattr(engine, name)
            for name in (*_COUNTERS, *_LAST_STEP, *_KEPT_OBJECTS)
            if hasattr(engine, name)
        }
        scaler = internals.gradient_scaler(engine)
        self.gradient_scaler = None if scaler is None else scaler.state_dict()
        self.settings = GroupSettings(engine)
        self.schedulers = Schedulers([self.basic, self.optimizer], self.scheduler)
        self.scheduler_state = self.scheduler.state_dict() if hasattr(self.scheduler, "state_dict") else None

    def into(self, fresh: Any, origin: Mapping[str, str]) -> None:
        """Into the engine `fresh`; `origin`: {name of a parameter now: before}.

        The old engine, optimizer and scheduler objects share the state of the new ones from now on.
        """
        for name, value in self.values.items():
            setattr(fresh, name, value)
        if hasattr(self.optimizer, "_global_grad_norm"):
            fresh.optimizer._global_grad_norm = self.optimizer._global_grad_norm
        before = self.settings.into(fresh, origin)
        if fresh.lr_scheduler is not self.scheduler and self.scheduler_state is not None:
            fresh.lr_scheduler.load_state_dict(self.scheduler_state)
        self.schedulers.follow(before, self.scheduler, fresh.lr_scheduler)
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if hasattr(scaler, "__dict__") and hasattr(fresh.optimizer, "loss_scaler"):
            vars(fresh.optimizer.loss_scaler).update(vars(scaler))
        if self.gradient_scaler is not None:
            internals.gradient_scaler(fresh).load_state_dict(self.gradient_scaler)
        for ours, theirs in (
            (self.optimizer, fresh.optimizer),
            (self.basic, fresh.basic_optimizer),
            (self.scheduler, fresh.lr_scheduler),
            (self.engine, fresh),
        ):
            if ours is not theirs and ours is not None:
                _share(ours, theirs)


def _share(old: Any, new: Any) -> None:
    """`old` has the state of `new` from now on, and so has whatever shared the state of `old` before.

    All of them live as long as that state: the finalizer of a DeepSpeed engine destroys what it has, here the new one.
    """
    state, made = vars(old), dict(vars(new))
    sharing = [*state.get(_SHARING, ()), old]
    state.clear()
    state.update(made)
    state[_SHARING] = sharing
    object.__setattr__(new, "__dict__", state)
