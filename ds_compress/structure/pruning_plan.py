"""Cuts: which entries of which tensors go when only some units of each structure are kept.

Everything works tensor by tensor and by name, so that a model can be cut whole (`rewrite`), while it streams from a
sharded engine to disk, or together with the moments of its optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ds_compress.structure.inventory import second_names
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup


class PruningPlan:
    """What is left of each structure, and what that means for every tensor, layer and config.

    structures: those given; kept: sorted int64 indices of the units that stay, by structure name.
    """

    def __init__(
        self, structures: tuple[PrunableGroup, ...], kept: dict[str, torch.Tensor], aliases: Mapping[str, str]
    ) -> None:
        self.structures = structures
        self.kept = kept
        self.aliases = dict(aliases)
        """Second name -> first-listed name of tied tensors, as far as known."""
        self._removed: dict[str, dict[int, torch.Tensor]] = {}
        self._scales: dict[str, float] = {}
        self._layers: dict[str, int | None] = {}
        for structure in self.active():
            self._add(structure)

    @classmethod
    def of(
        cls,
        structures: Iterable[PrunableGroup],
        kept: Mapping[str, torch.Tensor],
        model: nn.Module | None = None,
    ) -> PruningPlan:
        """Cuts `structures` down to the units `kept`, by structure name; one that is not named keeps all.

        model: gives the second names of tied tensors, so that `apply` and `shape_of` know them, too.

        Raises:
            ValueError: `kept` names no structure, or keeps none, unknown or unsorted units.
        """
        whole = tuple(structures)
        known = {structure.name: structure for structure in whole}
        if len(known) != len(whole):
            raise ValueError("two structures have the same name")
        indices: dict[str, torch.Tensor] = {}
        for name, units in kept.items():
            if name not in known:
                raise ValueError(f"there is no structure {name!r}")
            indices[name] = _checked(known[name], units)
        for name, structure in known.items():
            indices.setdefault(name, torch.arange(structure.units))
        return cls(whole, indices, {} if model is None else second_names(model))

    def active(self) -> tuple[PrunableGroup, ...]:
        """Structures that lose something: removable, and not all of their units kept."""
        return tuple(s for s in self.structures if s.removable and self.kept[s.name].numel() < s.units)

    def count(self, structure: PrunableGroup) -> int:
        """How many units it has in the end."""
        return self.kept[structure.name].numel() if structure.removable else structure.units

    # -- tensors ---------------------------------------------------------------------------------------

    def touches(self, name: str) -> bool:
        """Whether the tensor loses entries or is rescaled."""
        name = self.aliases.get(name, name)
        return name in self._removed or name in self._scales

    def shape_of(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the tensor `name` after the cut, `shape` before it."""
        removed = self._removed.get(self.aliases.get(name, name), {})
        return tuple(
            size - removed[dim].numel() if dim in removed else size for dim, size in enumerate(shape)
        )

    def apply(self, name: str, tensor: torch.Tensor, is_weight: bool = True) -> torch.Tensor:
        """The part of the full tensor `name` (its name before the cut) that stays; itself when untouched.

        is_weight: False for what belongs to the parameter entry by entry but is no weight (optimizer moments).
        """
        name = self.aliases.get(name, name)
        if tensor.is_meta:
            shape = self.shape_of(name, tensor.shape)
            return tensor if shape == tuple(tensor.shape) else tensor.new_empty(shape)
        for dim, gone in self._removed.get(name, {}).items():
            stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
            stays[gone] = False
            tensor = tensor.index_select(dim, stays.nonzero().flatten().to(tensor.device))
        scale = self._scales.get(name)
        return tensor if scale is None or not is_weight else tensor * scale

    # -- layers ----------------------------------------------------------------------------------------

    def renamed(self, name: str) -> str | None:
        """The name after deleted layers shift the numbers of those behind; None when its layer is deleted."""
        for prefix, index in self._layers.items():
            if name == prefix or name.startswith(prefix + "."):
                return None if index is None else f"{prefix.rpartition('.')[0]}.{index}{name[len(prefix) :]}"
        return name

    def deleted_layers(self) -> dict[str, tuple[int, ...]]:
        """Name of each ModuleList that loses items -> their indices, increasing."""
        deleted: dict[str, list[int]] = {}
        for prefix, index in self._layers.items():
            stack, _, number = prefix.rpartition(".")
            if index is None:
                deleted.setdefault(stack, []).append(int(number))
        return {stack: tuple(sorted(numbers)) for stack, numbers in deleted.items()}

    # -- models ----------------------------------------------------------------------------------------

    def rewrite(self, model: nn.Module, skeleton: bool = False) -> None:
        """Cuts `model` in place: tensors, layers, the attributes that say how wide it is, and its configs.

        skeleton: tensors of `model` may be on the meta device: they get shapes, and no values.

        Raises:
            ValueError: a tensor of the cut is missing, or is not whole in this process.
        """
        from ds_compress.structure.apply_pruning import rewrite

        rewrite(model, self, skeleton)

    # --------------------------------------------------------------------------------------------------

    def _add(self, structure: PrunableGroup) -> None:
        kept = self.kept[structure.name]
        goes = torch.ones(structure.units, dtype=torch.bool)
        goes[kept] = False
        if structure.kind is GroupKind.LAYER:
            self._add_layers(structure, goes)
        for member in structure.members:
            gone = member.index[goes].flatten()
            by_dim = self._removed.setdefault(member.tensor, {})
            before = by_dim.get(member.dim, gone.new_empty(0))
            by_dim[member.dim] = torch.cat([before, gone]).unique()
            if member.rescale:
                scale = float(kept.numel() / structure.units) ** member.rescale
                self._scales[member.tensor] = self._scales.get(member.tensor, 1.0) * scale

    def _add_layers(self, structure: PrunableGroup, goes: torch.Tensor) -> None:
        gone = sorted(
            int(name.rpartition(".")[2]) for name, out in zip(structure.layers, goes, strict=True) if out
        )
        stack = structure.layers[0].rpartition(".")[0]
        last = max(int(name.rpartition(".")[2]) for name in structure.layers)
        for index in range(last + 1):
            new = None if index in gone else index - sum(other < index for other in gone)
            self._layers[f"{stack}.{index}"] = new


def _checked(structure: PrunableGroup, units: torch.Tensor) -> torch.Tensor:
    units = units.to("cpu", torch.int64)
    ordered = units.dim() == 1 and bool((units[1:] > units[:-1]).all())
    if not ordered or not units.numel() or int(units[0]) < 0 or int(units[-1]) >= structure.units:
        raise ValueError(
            f"{structure.name}: the kept units must be increasing numbers from 0 to {structure.units - 1}, at least one"
        )
    return units
