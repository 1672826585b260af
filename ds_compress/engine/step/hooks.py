"""Where in a DeepSpeed step the techniques run.

    engine.step() -> _take_model_step ->            before_step   (every process, collectives allowed)
        wrapper.step() -> base optimizer: pre-hook   on_gradients  (unscaled, clipped gradients of the masters)
                          the update itself
                          post-hook                  on_update     (fp32 masters changed, 16-bit copies not yet)
    -> back in _take_model_step                      after_step    (only if the step was applied)

Weights that no optimizer steps get new masks there too (see `frozen`).

The base optimizer is called once per parameter group or ZeRO-3 sub-group, with only those tensors in its
`param_groups`, so hooks act on the fragments of the tensors that they find there. A step counts as applied when
the base optimizer really ran: overflow checks and gradient scalers that skip it skip us too, and what was computed
for a skipped step is put back. A step that DeepSpeed applied past our hooks is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ds_compress.engine.patches import Patches
from ds_compress.engine.step import monitoring
from ds_compress.engine.step.clipping import AppliedNorm
from ds_compress.engine.zero import internals
from ds_compress.engine.zero.frozen import FrozenWeights
from ds_compress.engine.zero.tensor_parallel import any_in_group
from ds_compress.modelinfo.inventory import few
from ds_compress.sharding.fragment import Fragment
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.base import Technique

logger = logging.getLogger("ds_compress")


class StepHooks:
    """Runs `techniques` around the optimizer steps of `engine` and counts the applied ones."""

    def __init__(self, engine: Any, techniques: Sequence[Technique]) -> None:
        self.engine = engine
        self.techniques = techniques
        self.applied_steps = 0
        self._updated: set[int] = set()
        """Ids of the tensors that were stepped in the step now running."""
        self._frozen_due = False
        self._by_master: dict[int, list[Fragment]] = {}
        self._handles: list[Any] = []
        for optimizer in internals.torch_optimizers(engine):
            self._handles.append(optimizer.register_step_pre_hook(self._on_gradients))
            self._handles.append(optimizer.register_step_post_hook(self._on_update))
        self._patches = Patches()
        self._original_step = self._patches.install(engine, "_take_model_step", self._take_model_step)
        self._guard = _overflow_guard(engine)
        self._norm = AppliedNorm(engine, techniques)

    def use(self, shards: Shards) -> None:
        """Takes the current map of fragments (it changes when a checkpoint is loaded)."""
        self._by_master = {}
        self._frozen = FrozenWeights(self.techniques, shards.frozen)
        self._norm.use(shards)
        for fragment in shards.fragments.values():
            self._by_master.setdefault(id(fragment.master), []).append(fragment)

    def mask_frozen_weights(self) -> None:
        """A collective, for masks that are new, or newly loaded beside weights that may not have been stored."""
        self._frozen.apply()
        self._frozen_due = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._norm.remove()
        self._patches.close()

    def _take_model_step(self, *args: Any, **kwargs: Any) -> Any:
        self._updated = set()
        skipped = self.engine.skipped_steps
        if self.applied_steps == 0 and not self.engine.module.training:
            logger.warning(
                "ds_compress: the model trains in eval() mode; call engine.train() before the loop"
            )
        for technique in self.techniques:
            technique.before_step(self.applied_steps)
            self._frozen_due = self._frozen_due or technique.has_new_masks
        with self._guard(self.engine), self._norm.in_step():
            result = self._original_step(*args, **kwargs)
        self._require_seen(was_skipped=self.engine.skipped_steps > skipped)
        if self._updated:
            self.applied_steps += 1
            if self._frozen_due:
                self.mask_frozen_weights()
            for technique in self.techniques:
                technique.after_step(self.applied_steps)
            if self.engine.global_rank == 0:
                self.engine.compression.note_step()
            monitoring.tell(self.engine, self.applied_steps)
        else:
            self._frozen_due = False
            for technique in self.techniques:
                technique.on_skipped_step()
        return result

    def _require_seen(self, was_skipped: bool) -> None:
        """Raises RuntimeError when DeepSpeed counts a step in which masters changed without our hooks."""
        if was_skipped or internals.gradient_scaler(self.engine) is not None:
            return
        unseen = [
            fragments[0].name
            for key, fragments in self._by_master.items()
            if key not in self._updated and fragments[0].has_optimizer
        ]
        if unseen or not self._updated:
            optimizer = type(self.engine.basic_optimizer).__name__
            raise RuntimeError(
                f"ds_compress: a step was applied that compression did not see, of {few(unseen) or 'all weights'}: "
                f"what stands behind {optimizer} in this DeepSpeed config steps by other ways than we hook. Nothing "
                "would be compressed; use AdamW, or train without the compression_training block, and please report it"
            )

    @torch.no_grad()
    def _on_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            fragments = self._fragments_of(group["params"])
            if fragments:
                for technique in self.techniques:
                    technique.on_gradients(fragments, group)

    @torch.no_grad()
    def _on_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self._updated.update(id(tensor) for tensor in group["params"])
            fragments = self._fragments_of(group["params"])
            if fragments:
                for technique in self.techniques:
                    technique.on_update(fragments)

    def _fragments_of(self, master: Sequence[torch.Tensor]) -> list[Fragment]:
        return [fragment for tensor in master for fragment in self._by_master.get(id(tensor), ())]


class _NoGuard:
    """DeepSpeed's own overflow check covers this engine."""

    def __call__(self, engine: Any) -> _NoGuard:
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _SkipNonFiniteStep:
    """Stage 0 in fp32: DeepSpeed would apply NaN gradients. Makes the step look like an overflow instead.

    Gradients are already averaged over processes, so all of them decide alike without talking, unless they hold
    different shards of the layers.
    """

    def __call__(self, engine: Any) -> _SkipNonFiniteStep:
        self.optimizer, self.device = engine.optimizer, engine.device
        self.group = internals.tensor_parallel_group(engine)
        return self

    def __enter__(self) -> None:
        found = (p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None)
        # A sparse gradient (of nn.Embedding(sparse=True)) is what its rows are.
        gradients = [gradient._values() if gradient.is_sparse else gradient for gradient in found]
        # The 2-norm is NaN or Inf when an element is (and when squares overflow, which no optimizer survives
        # either); it takes a twentieth of the time of the maximum norm.
        norms = list(torch._foreach_norm(gradients, 2)) if gradients else []
        broken = bool(norms) and not bool(torch.isfinite(torch.stack(norms)).all())
        self.optimizer.overflow = (
            broken if self.group is None else any_in_group(broken, self.group, self.device)
        )
        if self.optimizer.overflow:
            logger.warning("ds_compress: gradients are NaN or Inf; this step is skipped")
            self.own_step = vars(self.optimizer).get("step")
            self.optimizer.step = lambda *args, **kwargs: None

    def __exit__(self, *_: object) -> None:
        if self.optimizer.overflow:
            del self.optimizer.step
            if self.own_step is not None:
                self.optimizer.step = self.own_step
        del self.optimizer.overflow


def _overflow_guard(engine: Any) -> _NoGuard | _SkipNonFiniteStep:
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return _SkipNonFiniteStep()
    if getattr(wrapper, "check_grad_overflow", None) is False:
        # ZeRO 1 and 2 have the check and leave it off in fp32.
        wrapper.check_grad_overflow = True
    return _NoGuard()
