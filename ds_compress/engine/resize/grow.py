"""The way back from a shrink: a checkpoint that was saved before it has the full shapes.

`load_best_model_at_end` of a Trainer is the usual case: the best checkpoint may be older than the cut. The model
becomes whole again, its engine is built anew around it, and the checkpoint then fills in every value; if training goes
on, the schedule shrinks the model once more. What is kept for this is the model's structure, with empty parameters.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.engine.resize.carried import Carried
from ds_compress.engine.zero import internals
from ds_compress.structure.pruning_plan import PruningPlan

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

logger = logging.getLogger("ds_compress")


class Uncut:
    """A model before its cut: structure and names, no weights."""

    def __init__(self, engine: Any, pruning_plan: PruningPlan) -> None:
        run: CompressionRun = engine.compression
        self.pruning_plan = pruning_plan
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        self._added = {id(p) for p in run.added}
        listed = run.construction["arguments"]["model_parameters"]
        self._listed = [self._group(g) if isinstance(g, dict) else self._named([g]) for g in listed or ()]
        groups = getattr(run.construction["arguments"]["optimizer"], "param_groups", ())
        clients = run.construction["client_groups"]
        self._clients = [self._group({**g, "params": c}) for g, c in zip(groups, clients, strict=False)]
        self._skeleton: dict[str, Any] | None = None
        self._names = {}

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "params": self._named(group["params"])}

    def _named(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        """Without learned scales, which come anew."""
        return [self._names[id(p)] for p in parameters if id(p) in self._names and id(p) not in self._added]

    def take(self, model: nn.Module) -> None:
        """Keeps the structure of `model`, whose parameters are on the meta device now."""
        self._skeleton = vars(copy.deepcopy(model))

    def restore(self, model: nn.Module, device: torch.device | str) -> None:
        """`model` (the same object) has its full structure again, with parameters of zeros."""
        assert self._skeleton is not None
        training = model.training
        state = copy.deepcopy(self._skeleton)
        model.__dict__.clear()
        model.__dict__.update(state)
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, shell in module._parameters.items():
                if shell is not None:
                    if id(shell) not in made:
                        values = torch.zeros(shell.shape, dtype=shell.dtype, device=device)
                        made[id(shell)] = nn.Parameter(values, requires_grad=shell.requires_grad)
                    module._parameters[name] = made[id(shell)]
        model.train(training)

    def into(self, arguments: dict[str, Any], model: nn.Module) -> None:
        """Edits the constructor's arguments for `model`, whose parameters are new."""
        named = dict(model.named_parameters())

        def group(kept: dict[str, Any]) -> dict[str, Any]:
            return {**kept, "params": [named[name] for name in kept["params"]]}

        if self._listed and isinstance(self._listed[0], dict):
            arguments["model_parameters"] = [
                group(g) for g in self._listed if isinstance(g, dict) and g["params"]
            ]
        elif arguments["model_parameters"] is not None:
            arguments["model_parameters"] = [named[name] for names in self._listed for name in names]
        optimizer = arguments["optimizer"]
        if hasattr(optimizer, "param_groups"):
            optimizer.state.clear()
            optimizer.param_groups[:] = [group(g) for g in self._clients if g["params"]]

    def origin(self, model: nn.Module) -> dict[str, str]:
        """{name of a parameter of the whole model: its name after the cut}, of those that the cut left."""
        names = [name for name, _ in model.named_parameters()]
        return {name: left for name in names if (left := self.pruning_plan.renamed(name)) is not None}


def grow(engine: Any) -> None:
    """Rebuilds `engine` in place on the model that it had before the shrink, with weights of zeros; a collective.

    Raises ValueError for a run that was never shrunk.
    """
    run: CompressionRun = engine.compression
    uncut = run.uncut
    if uncut is None:
        raise ValueError("this run was never shrunk: there are no other shapes to go back to")
    carried = Carried(engine)
    run.detach()
    internals.take_down(engine)
    uncut.restore(engine.module, engine.device)
    fresh = object.__new__(type(engine))
    successor = run.rebuild_whole(fresh, uncut)
    carried.into(fresh, uncut.origin(engine.module))
    gc.collect()
    logger.info("ds_compress: the model has its full shapes again, at step %d", successor.applied_steps)
