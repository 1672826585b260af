"""`shrink_at_end_of_schedule`: the masked structures leave model and optimizer while training goes on.

DeepSpeed cannot resize a parameter, so the engine is built anew around the smaller model, with the arguments that it
was first built with, and everything that training has written is carried over: fp32 masters and optimizer moments
(sliced like the weights), hyperparameters, schedules, loss scale, counters, and the state of the other techniques. The
old engine, optimizer and scheduler objects then share the state of the new ones, so that whoever holds them, a
training script or a Trainer, goes on without knowing. The next loss is that of the masked model.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.engine.resize.carried import Carried
from ds_compress.engine.resize.cut import cut_in_place
from ds_compress.engine.resize.rebuild import rebuild_smaller
from ds_compress.engine.resize.snapshot import MASTER, Snapshot, optimizer_state, write_state
from ds_compress.engine.resize.uncut import Uncut
from ds_compress.engine.run import CompressionRun
from ds_compress.engine.zero import copies
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.sharding.shards import Shards
from ds_compress.structure.pruning_plan import PruningPlan

logger = logging.getLogger("ds_compress")


def shrink(engine: Any) -> None:
    """Rebuilds `engine` in place on the model without what is masked now; a collective, between two steps."""
    run: CompressionRun = engine.compression
    pruning_plan = run.pruning_plan()
    pruning_plan.know_scales(engine.module)
    before = _total(engine.module)
    old = {name: shape_of(p) for name, p in engine.module.named_parameters()}
    snapshot = Snapshot(engine, run.shards, run.techniques.values())
    carried = Carried(engine)
    uncut = Uncut(engine, pruning_plan)
    run.make_way()
    made = cut_in_place(engine, pruning_plan, before_cut=uncut.take)
    fresh = object.__new__(type(engine))
    successor = rebuild_smaller(run, fresh, made, pruning_plan)
    successor.uncut = uncut
    restored = _Restored(old, pruning_plan, snapshot)
    restored.optimizer(fresh, successor.shards)
    copies.refresh(fresh)
    restored.techniques(successor)
    carried.into(fresh, restored.origin)
    after = _total(engine.module)
    logger.info(
        "ds_compress: shrunk from %s to %s parameters at step %d", before, after, successor.applied_steps
    )


def at_end_of_schedule(engine: Any, run: CompressionRun) -> None:
    """`engine.step` shrinks as soon as no mask will change any more."""

    def step_and_shrink(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if run.masks_are_final:
            shrink(engine)
            gc.collect()  # the old engine refers to itself: its weights and moments would stay for a while
        return result

    step = run.patches.install(engine, "step", step_and_shrink)


def shrink_to(run: CompressionRun, units: Mapping[str, torch.Tensor]) -> None:
    """Shrinks now, to these units, whatever the schedules say; for a checkpoint of a run that had shrunk.

    Raises:
        ValueError: the units are of other prunable groups than those of the JSON.
    """
    run.keep_units(units)
    shrink(run.engine)


def _total(model: nn.Module) -> str:
    return f"{sum(torch.Size(shape_of(p)).numel() for p in model.parameters()):,}"


class _Restored:
    """The state of each weight, cut, in the places that the new engine has for it."""

    def __init__(
        self,
        old: Mapping[str, tuple[int, ...]],
        pruning_plan: PruningPlan,
        snapshot: Snapshot,
    ) -> None:
        self._old, self._pruning_plan, self._snapshot = old, pruning_plan, snapshot
        renamed = {name: pruning_plan.renamed(name) for name in old}
        self.origin = {new: name for name, new in renamed.items() if new is not None}
        """{name of a parameter now: before}."""

    def optimizer(self, engine: Any, shards: Shards) -> None:
        kinds = sorted(kind for owner, kind in self._snapshot.names if owner == "optimizer")
        for new, _ in engine.module.named_parameters():
            fragment = shards.fragments.get(new)
            for kind in kinds:
                values = self._part("optimizer", kind, new, fragment)
                if values is None or fragment is None:
                    continue
                if kind == MASTER:
                    fragment.values.copy_(values)
                else:
                    write_state(engine, fragment, kind, values)
            if fragment is not None and fragment.has_optimizer:
                scalars = self._snapshot.scalars.get(self.origin[new], {})
                made = {key: scalar.beside(fragment.master) for key, scalar in scalars.items()}
                optimizer_state(engine, fragment).update(made)

    def techniques(self, run: CompressionRun) -> None:
        for name, technique in run.techniques.items():
            kinds = sorted(kind for owner, kind in self._snapshot.names if owner == name)
            state: dict[str, dict[str, torch.Tensor]] = {}
            for kind in kinds:
                for new in sorted(self.origin):
                    fragment = run.shards.fragments.get(new)
                    values = self._part(name, kind, new, fragment)
                    if values is not None and fragment is not None:
                        made = values > 0.5 if kind == "mask" else values
                        state.setdefault(kind, {})[new] = made.to(fragment.values.device)
            technique.load_fragment_state(state)
            technique.after_shrink()

    def _part(self, owner: str, kind: str, new: str, fragment: Any) -> torch.Tensor | None:
        """The values of this process' fragment; None where there is no such state. A collective all the same."""
        name = self.origin.get(new)
        if name is None or name not in self._snapshot.names.get((owner, kind), ()):
            return None
        whole = self._snapshot.whole(owner, kind, name, self._old[name])
        if fragment is None:
            return None
        cut = self._pruning_plan.prune_tensor(name, whole, is_weight=kind in (MASTER, "hidden"))
        return cut.flatten()[fragment.start : fragment.start + fragment.numel]
