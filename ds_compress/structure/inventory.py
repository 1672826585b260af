"""A model as the finders use it: its modules by name, and which dimensions of their tensors are outputs and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ds_compress.modelinfo.kinds import ModuleKind, kind_of, shape_of
from ds_compress.structure.prunable_group import CoupledSlice, PrunableGroup, Unsupported


def rows(units: int, width: int = 1, start: int = 0) -> torch.Tensor:
    """int64 (units, width): unit u has the `width` entries from start + u * width on."""
    return start + torch.arange(units * width).view(units, width)


@dataclass(frozen=True, eq=False)
class Projection:
    """A Linear, Conv1D or Conv2d: the names of its tensors, and its numbers of outputs and inputs."""

    name: str
    kind: ModuleKind
    outputs: int
    inputs: int
    """Of a grouped Conv2d those of one group."""
    weight: str
    bias: str | None

    def writers(self, index: torch.Tensor, scored: bool = False) -> list[CoupledSlice]:
        """The slices that compute units: their rows of the weight, and their entries of the bias."""
        dim = 1 if self.kind is ModuleKind.CONV1D else 0
        slices = [CoupledSlice(self.weight, dim, index, scored)]
        return slices + ([CoupledSlice(self.bias, 0, index)] if self.bias is not None else [])

    def reader(self, index: torch.Tensor, scored: bool = False) -> CoupledSlice:
        """The slice that reads units: their columns of the weight."""
        return CoupledSlice(self.weight, 0 if self.kind is ModuleKind.CONV1D else 1, index, scored)


class Inventory:
    """Lookups in one model; nothing here reads a weight's value, and shapes are those of `shape_of`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._names: dict[int, list[str]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(tensor), []).append(name)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            self._names.setdefault(id(buffer), []).append(name)

    def projection(self, name: str) -> Projection | None:
        """The plain Linear, Conv1D or Conv2d of this name, if it is one."""
        module = self.modules.get(name)
        kind = kind_of(module) if module is not None else None
        if module is None or kind is None or kind is ModuleKind.EMBEDDING:
            return None
        outputs, inputs = shape_of(module.get_parameter("weight"))[:2]
        if kind is ModuleKind.CONV1D:
            outputs, inputs = inputs, outputs
        weight = self.tensor(name, "weight")
        assert weight is not None
        return Projection(name, kind, outputs, inputs, weight, self.tensor(name, "bias"))

    def tensor(self, module: str, name: str) -> str | None:
        """First-listed name of a module's own parameter or buffer; None when it has none."""
        own = self.modules[module]
        tensor: torch.Tensor | None = own._parameters.get(name)
        if tensor is None:
            tensor = own._buffers.get(name)
        return None if tensor is None else self._names[id(tensor)][0]

    def child(self, parent: str, path: str) -> str:
        """Qualified name of `path` below the module `parent`."""
        return f"{parent}.{path}" if parent else path

    def parent(self, name: str) -> str:
        return name.rpartition(".")[0]

    def own_projections(self, parent: str) -> list[Projection]:
        """Those of the direct children, in the order of definition."""
        names = (self.child(parent, name) for name, _ in self.modules[parent].named_children())
        return [projection for name in names if (projection := self.projection(name)) is not None]

    def tied_elsewhere(self, group: PrunableGroup) -> Unsupported | None:
        """Why the group cannot be pruned, if a module outside it uses one of its tensors, too."""
        inside = set(group.modules)
        for names in self._names.values():
            if len(names) > 1 and any(coupled.tensor == names[0] for coupled in group.slices):
                outside = [name for name in names if self.parent(name) not in inside]
                if outside:
                    reason = f"its {names[0]} is tied to {outside[0]}, which would lose the same entries; untie them"
                    return Unsupported(group.name, reason)
        return None


def exclude_tied(
    inventory: Inventory, groups: Iterable[PrunableGroup], unsupported: Iterable[Unsupported]
) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """Groups that share no tensor with a module outside them, and all that is unsupported."""
    free: list[PrunableGroup] = []
    unsupported = list(unsupported)
    for group in groups:
        refusal = inventory.tied_elsewhere(group)
        if refusal is None:
            free.append(group)
        else:
            unsupported.append(refusal)
    return free, unsupported


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Without repetitions, in order."""
    return tuple(dict.fromkeys(names))


def second_names(model: nn.Module) -> dict[str, str]:
    """Second name -> first-listed name of every tied parameter and shared buffer."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases
