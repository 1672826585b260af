"""Where in a training loop *without* a DeepSpeed engine the stages run.

    loss.backward()
    optimizer.step()      -> before_step, on_gradients | the update | on_update
    scheduler.step()      -> after_step: one more step is applied

torch calls hooks around the step of every optimizer of the process; those of an optimizer that holds none of this
model's weights do nothing. Several optimizers may share a step. A `scheduler.step()` without an optimizer's step
before it, after a micro-step or a step that a gradient scaler skipped, counts nothing.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ds_compress.engine.fragments import Fragment
from ds_compress.engine.frozen import FrozenWeights
from ds_compress.engine.shards import Shards
from ds_compress.stages.base import Stage

logger = logging.getLogger("ds_compress")


class LoopHooks:
    """Runs `stages` around the steps of whatever optimizers hold the weights of `use`; `end_step` counts them."""

    def __init__(self, stages: Sequence[Stage], needs_gradients: bool) -> None:
        """`needs_gradients`: some stage looks at, or changes, what a step starts from."""
        self.stages = stages
        self.applied_steps = 0
        self._needs_gradients = needs_gradients
        self._begun = self._ran = self._warned = False
        self._frozen_due = False
        self._by_stepped: dict[int, Fragment] = {}
        # The hooks are global to the process: they must not keep this model alive, nor outlive it.
        before, after = weakref.WeakMethod(self._on_gradients), weakref.WeakMethod(self._on_update)
        handles = (
            register_optimizer_step_pre_hook(lambda *call: _called(before, *call)),
            register_optimizer_step_post_hook(lambda *call: _called(after, *call)),
        )
        self._remove = weakref.finalize(self, _remove, *handles)

    def use(self, shards: Shards) -> None:
        self._frozen = FrozenWeights(self.stages, shards.unstepped)
        self._by_stepped = {id(fragment.stepped): fragment for fragment in shards.fragments.values()}

    def remove(self) -> None:
        self._remove()

    def end_step(self) -> None:
        """The optimizers have stepped; counts it."""
        if not self._ran:
            if self.applied_steps == 0 and not self._warned:
                self._warned = True
                logger.warning(
                    "ds_compress: no torch optimizer with weights of this model has stepped before "
                    "compression_scheduler.step(); such calls count nothing"
                )
            return
        self._begun = self._ran = False
        self.applied_steps += 1
        if self._frozen_due:
            self.mask_frozen_weights()
        for stage in self.stages:
            stage.after_step(self.applied_steps)

    def mask_frozen_weights(self) -> None:
        """For masks that are new, or newly loaded."""
        self._frozen.apply()
        self._frozen_due = False

    @torch.no_grad()
    def _on_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
        groups = [(self._fragments_of(group["params"]), group) for group in optimizer.param_groups]
        if not any(fragments for fragments, _ in groups):
            return
        if self._needs_gradients and (len(args) > 1 or kwargs.get("closure") is not None):
            raise RuntimeError(
                "ds_compress: optimizer.step(closure) makes gradients where no mask can be in force; "
                "call loss.backward() before optimizer.step()"
            )
        if not self._begun:
            self._begun = True
            for stage in self.stages:
                stage.before_step(self.applied_steps)
                self._frozen_due = self._frozen_due or stage.has_new_masks
        for fragments, group in groups:
            for stage in self.stages if fragments else ():
                stage.on_gradients(fragments, group)

    @torch.no_grad()
    def _on_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
        for group in optimizer.param_groups:
            fragments = self._fragments_of(group["params"])
            self._ran = self._ran or bool(fragments)
            for stage in self.stages if fragments else ():
                stage.on_update(fragments)

    def _fragments_of(self, stepped: Sequence[torch.Tensor]) -> list[Fragment]:
        return [self._by_stepped[id(tensor)] for tensor in stepped if id(tensor) in self._by_stepped]


def _remove(*handles: RemovableHandle) -> None:
    for handle in handles:
        handle.remove()


def _called(method: weakref.WeakMethod[Callable[..., None]], *call: Any) -> None:
    bound = method()
    if bound is not None:
        bound(*call)
