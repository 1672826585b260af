"""All that training has written for each weight, kept while the engine around it is taken down and built anew.

Masters, the optimizer's moments and the techniques' own tensors live on fragments. A snapshot keeps this process' parts
and, by a collective for each tensor, makes one of them whole at a time: no process ever holds the state of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ds_compress.engine.zero import internals
from ds_compress.sharding.fragment import Fragment
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.base import Technique

MASTER = "master"


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of one kind of state of one parameter."""

    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Scalar:
    """What an optimizer keeps once per tensor. Tensors are told to other processes, whose device is another one."""

    value: Any
    is_beside_weight: bool

    @classmethod
    def of(cls, value: Any) -> Scalar:
        if not isinstance(value, torch.Tensor):
            return cls(value, False)
        return cls(value.detach().to("cpu", copy=True), value.device.type != "cpu")

    def beside(self, weight: torch.Tensor) -> Any:
        """A copy for the state of `weight`: on its device where it was on a weight's."""
        if not isinstance(self.value, torch.Tensor):
            return self.value
        return self.value.to(weight.device if self.is_beside_weight else "cpu", copy=True)


class Snapshot:
    """Parts of this process by (owner, kind) and parameter name; owner is a technique's name or "optimizer"."""

    def __init__(self, engine: Any, shards: Shards, techniques: Iterable[Technique]) -> None:
        self._shards = shards
        self.parts: dict[tuple[str, str], dict[str, Part]] = {}
        self.scalars: dict[str, dict[str, Scalar]] = {}
        """What the optimizer keeps once per tensor, such as `step`, by parameter name."""
        optimizers = internals.torch_optimizers(engine)
        for fragment in shards.fragments.values():
            if not fragment.has_optimizer:
                continue
            # In host memory: on a device that training has filled there is no room for everything twice. What lies
            # there already is not copied either: the engine that is taken down writes nothing any more.
            self._keep("optimizer", MASTER, fragment, fragment.values.to("cpu"))
            for key, value in _state_of(optimizers, fragment.master).items():
                if is_per_element(value, fragment.master):
                    flat = value.view(-1).narrow(0, fragment.offset, fragment.numel)
                    self._keep("optimizer", key, fragment, flat.to("cpu"))
                else:
                    self.scalars.setdefault(fragment.name, {})[key] = Scalar.of(value)
        for technique in techniques:
            for kind, by_name in technique.fragment_state().items():
                for name, values in by_name.items():
                    self._keep(technique.name, kind, shards.fragments[name], values.to("cpu", copy=True))
        # Every process asks for the same tensors in the same order, also for those that it has no part of.
        named = {key: sorted(by_name) for key, by_name in self.parts.items()}
        self.names: dict[tuple[str, str], set[str]] = {}
        for theirs, scalars in shards.all_gather_object((named, self.scalars)):
            for key, names in theirs.items():
                self.names.setdefault(key, set()).update(names)
            self.scalars |= scalars

    def _keep(self, owner: str, kind: str, fragment: Fragment, values: torch.Tensor) -> None:
        self.parts.setdefault((owner, kind), {})[fragment.name] = Part(fragment.start, values.detach())

    def whole(self, owner: str, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor of `shape`, the same in every process: a collective."""
        part = self.parts.get((owner, kind), {}).get(name)
        numel = torch.Size(shape).numel()
        flat = torch.zeros(numel, dtype=torch.float32)
        if part is not None:
            flat[part.start : part.start + part.values.numel()] = part.values.to("cpu", torch.float32)
        return self._shards.sum(flat).view(shape)


def is_per_element(value: Any, master: torch.Tensor) -> bool:
    """Whether a value of an optimizer's state belongs to each element of the tensor that it steps."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() == master.numel()


def write_state(engine: Any, fragment: Fragment, key: str, values: torch.Tensor) -> None:
    """Sets the part of one kind of the optimizer's state that belongs to `fragment`."""
    state = optimizer_state(engine, fragment)
    if not is_per_element(state.get(key), fragment.master):
        state[key] = torch.zeros_like(fragment.master.data, dtype=torch.float32)
    state[key].view(-1).narrow(0, fragment.offset, fragment.numel).copy_(values)


def optimizer_state(engine: Any, fragment: Fragment) -> dict[str, Any]:
    """The (changeable) state of the tensor that the optimizer steps for `fragment`."""
    for optimizer in internals.torch_optimizers(engine):
        if any(fragment.master is p for group in optimizer.param_groups for p in group["params"]):
            return optimizer.state[fragment.master]
        if fragment.master in optimizer.state:
            return optimizer.state[fragment.master]
    return internals.torch_optimizers(engine)[0].state[fragment.master]


def _state_of(optimizers: list[torch.optim.Optimizer], master: torch.Tensor) -> dict[str, Any]:
    return next((dict(o.state[master]) for o in optimizers if master in o.state), {})
