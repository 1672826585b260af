"""A model before its cut: its structure with empty parameters, for the way back from a shrink."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ds_compress.engine.run import CompressionRun
from ds_compress.structure.pruning_plan import PruningPlan


class Uncut:
    """A model before its cut: structure and names, no weights."""

    def __init__(self, engine: Any, pruning_plan: PruningPlan) -> None:
        run: CompressionRun = engine.compression
        self.pruning_plan = pruning_plan
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        self._added = {id(p) for p in run.added}
        listed = run.construction.arguments["model_parameters"]
        self._listed = [self._group(g) if isinstance(g, dict) else self._named([g]) for g in listed or ()]
        groups = getattr(run.construction.arguments["optimizer"], "param_groups", ())
        clients = run.construction.client_groups
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
