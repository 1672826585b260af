"""Parameter groups of an optimizer, and the schedulers that keep numbers of their own for each of them.

We change the list of groups twice: learned scales bring a group at the start, and a group may be empty after layers
were removed. DeepSpeed drops empty groups, and a scheduler of torch has its numbers (base rates, lambdas, last rates)
in lists by position, which then belong to other groups. Here settings follow the parameters, and those lists follow
the groups.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ds_compress.engine.zero import internals

_BY_GROUP = re.compile(r"lrs?$|lr_lambdas$|moms$|momentums$")
"""Attributes of schedulers with an entry per group: base_lrs, _last_lr, lr_lambdas, min_lrs, max_momentums, ..."""


class Schedulers:
    """What the schedulers of `optimizers` keep for each group, as it is now."""

    def __init__(self, optimizers: Sequence[Any], *known: Any) -> None:
        """`known`: further schedulers, or None; those of torch are found, whoever holds them."""
        self._count = len(optimizers[0].param_groups)
        found = [s for s in gc.get_objects() if issubclass(type(s), LRScheduler)]
        own = [s for s in found if any(getattr(s, "optimizer", None) is o for o in optimizers)]
        self._kept = [(s, dict(_lists(s, self._count))) for s in _each([*own, *known])]

    def follow(self, origin: Sequence[int | None], old: Any = None, new: Any = None) -> None:
        """Group i is now what `origin[i]` was before; None: a new group, which goes as the first one does.

        new: a scheduler that was made anew in the place of the scheduler `old`.
        """
        replaced = dict(zip(map(id, _each([old])), _each([new]), strict=True)) if new is not old else {}
        for scheduler, lists in self._kept:
            target = replaced.get(id(scheduler), scheduler)
            for name, values in lists.items():
                setattr(target, name, type(values)(values[0 if i is None else i] for i in origin))


def _each(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Each scheduler once, those inside of chained and sequential ones too."""
    seen: set[int] = set()
    waiting = [s for s in schedulers if s is not None]
    while waiting:
        scheduler = waiting.pop()
        if id(scheduler) not in seen and hasattr(scheduler, "__dict__"):
            seen.add(id(scheduler))
            waiting += getattr(scheduler, "_schedulers", None) or []
            yield scheduler


def _lists(scheduler: Any, count: int) -> Iterator[tuple[str, Any]]:
    for name, values in vars(scheduler).items():
        if isinstance(values, list | tuple) and len(values) == count and _BY_GROUP.search(name):
            yield name, type(values)(values)


def drop_empty(optimizer: Any) -> list[int]:
    """Removes groups without parameters, in place; the old positions of those that stay."""
    groups = optimizer.param_groups
    stay = [i for i, group in enumerate(groups) if group["params"]]
    groups[:] = [groups[i] for i in stay]
    return stay


def add_scales(optimizer: Any, scales: Sequence[nn.Parameter]) -> None:
    """A group for learned scales, without weight decay; under schedulers, it begins where the first group does."""
    first = optimizer.param_groups[0] if optimizer.param_groups else {}
    optimizer.add_param_group({"params": list(scales), "weight_decay": 0.0})
    added = optimizer.param_groups[-1]
    if "initial_lr" in first:
        added["lr"] = first["lr"]
    added.update({key: value for key, value in first.items() if key not in added})
    if isinstance(optimizer, torch.optim.Adagrad):
        # Up to torch 2.11 it makes its state when it is made itself, and none for a group that comes later.
        missing = [scale for scale in scales if not optimizer.state.get(scale)]
        if missing:
            optimizer.state.update(torch.optim.Adagrad(missing, **optimizer.defaults).state)


class GroupSettings:
    """The settings of each parameter's group, by the parameter's name."""

    def __init__(self, engine: Any) -> None:
        self.groups = internals.torch_optimizers(engine)[0].param_groups
        self._settings = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in self.groups]
        self._group_of = _groups_by_name(engine)

    def into(self, engine: Any, origin: Mapping[str, str]) -> list[int | None]:
        """Sets those of the groups of `engine`, whose parameters have other names: `origin` has the old ones.

        Returns for each group the position that its parameters' group had before; None where they are new.
        """
        groups = internals.torch_optimizers(engine)[0].param_groups
        before: list[int | None] = [None] * len(groups)
        for name, now in _groups_by_name(engine).items():
            if before[now] is None:
                before[now] = self._group_of.get(origin.get(name, ""))
        for group, was in zip(groups, before, strict=True):
            if was is not None:
                group.update(self._settings[was])
        return before


def _groups_by_name(engine: Any) -> dict[str, int]:
    named = ((name, internals.group_of(engine, p)) for name, p in engine.module.named_parameters())
    return {name: position for name, position in named if position is not None}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
