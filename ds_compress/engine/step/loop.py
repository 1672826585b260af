"""Where in a training loop *without* a DeepSpeed engine the techniques run.

    loss.backward()
    optimizer.step()      -> before_step, on_gradients | the update | on_update
    scheduler.step()      -> after_step: one more step is applied

torch calls hooks around the step of every optimizer of the process; those of an optimizer that holds none of this
model's weights do nothing. Several optimizers may share a step. A `scheduler.step()` without an optimizer's step
before it, after a micro-step or a step that a gradient scaler skipped, counts nothing.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ds_compress.engine.zero.frozen import FrozenWeights
from ds_compress.sharding.fragment import Fragment
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.base import Technique

logger = logging.getLogger("ds_compress")


_live: weakref.WeakSet[LoopHooks] = weakref.WeakSet()
"""Those in use. torch's hooks are global to the process, so they must not keep a model alive; and they stay for good,
because the collector would take them away while torch walks through them."""


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before_any_step)
    register_optimizer_step_post_hook(_after_any_step)


def _before_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for hooks in list(_live):
        hooks.on_gradients(optimizer, args, kwargs)


def _after_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for hooks in list(_live):
        hooks.on_update(optimizer)


class LoopHooks:
    """Runs `techniques` around the steps of whatever optimizers hold the weights of `use`; `end_step` counts them."""

    def __init__(self, techniques: Sequence[Technique], needs_gradients: bool) -> None:
        """`needs_gradients`: some technique looks at, or changes, what a step starts from."""
        self.techniques = techniques
        self.applied_steps = 0
        self._needs_gradients = needs_gradients
        self._begun = self._ran = self._warned = False
        self._frozen_due = False
        self._by_master: dict[int, Fragment] = {}
        _install()
        _live.add(self)

    def use(self, shards: Shards) -> None:
        self._frozen = FrozenWeights(self.techniques, shards.frozen)
        self._by_master = {id(fragment.master): fragment for fragment in shards.fragments.values()}

    def remove(self) -> None:
        _live.discard(self)

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
        for technique in self.techniques:
            technique.after_step(self.applied_steps)

    def mask_frozen_weights(self) -> None:
        """For masks that are new, or newly loaded."""
        self._frozen.apply()
        self._frozen_due = False

    @torch.no_grad()
    def on_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Right before the optimizer steps, with `args` (itself first) and `kwargs`."""
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
            for technique in self.techniques:
                technique.before_step(self.applied_steps)
                self._frozen_due = self._frozen_due or technique.has_new_masks
        for fragments, group in groups:
            for technique in self.techniques if fragments else ():
                technique.on_gradients(fragments, group)

    @torch.no_grad()
    def on_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Right after the optimizer has stepped."""
        for group in optimizer.param_groups:
            fragments = self._fragments_of(group["params"])
            self._ran = self._ran or bool(fragments)
            for technique in self.techniques if fragments else ():
                technique.on_update(fragments)

    def _fragments_of(self, master: Sequence[torch.Tensor]) -> list[Fragment]:
        return [self._by_master[id(tensor)] for tensor in master if id(tensor) in self._by_master]
