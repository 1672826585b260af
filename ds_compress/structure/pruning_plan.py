"""Which entries of which tensors are removed when only some units of each prunable group are kept.

Everything works tensor by tensor and by name, so that a model can be pruned at once (`apply_pruning`), while it streams
from a sharded engine to disk, or together with the moments of its optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ds_compress.structure.given_scales import GivenScales, given_scales
from ds_compress.structure.inventory import second_names
from ds_compress.structure.prunable_group import PrunableGroup


class PruningPlan:
    """The units that are kept of each group, and what follows for every tensor and layer.

    groups: those given. kept: sorted int64 indices of the kept units, by name of the group.
    """

    def __init__(
        self, groups: tuple[PrunableGroup, ...], kept: dict[str, torch.Tensor], aliases: Mapping[str, str]
    ) -> None:
        self.groups = groups
        self.kept = kept
        self.aliases = dict(aliases)
        """Second name -> first-listed name of tied tensors, as far as known."""
        self._removed: dict[str, dict[int, torch.Tensor]] = {}
        self._removed_of_experts: dict[str, dict[int, torch.Tensor]] = {}
        """int64 (experts, removed): entries along a dimension, counted as in `CoupledSlice.of_experts`."""
        self._scales: dict[str, float] = {}
        self.given_scales: dict[str, GivenScales] = {}
        """Parameters that are scales of others, as far as known: see `know_scales`."""
        self._layers: dict[str, int | None] = {}
        for group in self.active():
            self._add(group)

    @classmethod
    def of(
        cls,
        groups: Iterable[PrunableGroup],
        kept: Mapping[str, torch.Tensor],
        model: nn.Module | None = None,
    ) -> PruningPlan:
        """Keeps the units `kept`, by name of the group; a group that is not named keeps all.

        model: gives the second names of tied tensors, so that `prune_tensor` and `shape_of` know them, too.

        Raises:
            ValueError: `kept` names a group that is not there, or its units are none, unknown or unsorted.
        """
        all_groups = tuple(groups)
        known = {group.name: group for group in all_groups}
        if len(known) != len(all_groups):
            raise ValueError("two prunable groups have the same name")
        indices: dict[str, torch.Tensor] = {}
        for name, units in kept.items():
            if name not in known:
                raise ValueError(f"there is no prunable group {name!r}")
            indices[name] = _checked(known[name], units)
        for name, group in known.items():
            indices.setdefault(name, torch.arange(group.units))
        return cls(all_groups, indices, {} if model is None else second_names(model))

    def active(self) -> tuple[PrunableGroup, ...]:
        """Groups that lose units: removable, and not all of their units kept."""
        return tuple(s for s in self.groups if s.removable and self.kept[s.name].numel() < s.units)

    def count(self, group: PrunableGroup) -> int:
        """How many units it has in the end."""
        return self.kept[group.name].numel() if group.removable else group.units

    # -- tensors ---------------------------------------------------------------------------------------

    def know_scales(self, model: nn.Module) -> None:
        """From now on the scales that are parameters of `model` (before pruning) lose what their weights lose."""
        self.given_scales |= given_scales(model)

    def touches(self, name: str) -> bool:
        """Whether the tensor loses entries or is rescaled."""
        name = self.aliases.get(name, name)
        if name in self.given_scales:
            return self.touches(self.given_scales[name].weight)
        return name in self._removed or name in self._removed_of_experts or name in self._scales

    def shape_of(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the tensor `name` after pruning, `shape` before it."""
        name = self.aliases.get(name, name)
        left = list(shape)
        of_each, removed = self._gone(name, shape)
        for dim, gone in removed.items():
            left[dim] -= gone.numel()
        for dim, of_experts in of_each.items():
            left[dim] -= of_experts.shape[1]
        return tuple(left)

    def prune_tensor(self, name: str, tensor: torch.Tensor, is_weight: bool = True) -> torch.Tensor:
        """The kept part of the full tensor `name` (its name before pruning); the tensor itself when it loses nothing.

        is_weight: False for optimizer moments, which have the entries of a parameter but are not rescaled.
        """
        name = self.aliases.get(name, name)
        if tensor.is_meta:
            shape = self.shape_of(name, tensor.shape)
            return tensor if shape == tuple(tensor.shape) else tensor.new_empty(shape)
        of_each, removed = self._gone(name, tensor.shape)
        for dim, gone in of_each.items():
            # Before experts themselves are removed, which `gone` counts.
            tensor = _without_entries(tensor, dim, gone)
        for dim, gone in removed.items():
            stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
            stays[gone] = False
            tensor = tensor.index_select(dim, stays.nonzero().flatten().to(tensor.device))
        scale = self._scales.get(name)
        return tensor if scale is None or not is_weight else tensor * scale

    def kept_experts(self, weight: str, values: torch.Tensor) -> torch.Tensor:
        """Of [experts, ...], a row for each matrix of the stack `weight` (its name before pruning), those that stay."""
        gone = self._removed.get(self.aliases.get(weight, weight), {}).get(0)
        if gone is None or not values.dim():
            return values
        stays = torch.ones(values.shape[0], dtype=torch.bool)
        stays[gone] = False
        return values[stays.nonzero().flatten().to(values.device)]

    def _gone(
        self, name: str, shape: Sequence[int]
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """(entries that each expert loses, entries that the tensor loses) by dimension."""
        scales = self.given_scales.get(name)
        if scales is None:
            return self._removed_of_experts.get(name, {}), self._removed.get(name, {})
        weight = self.aliases.get(scales.weight, scales.weight)
        of_each = scales.gone(self._removed_of_experts.get(weight, {}), shape)
        return of_each, scales.gone(self._removed.get(weight, {}), shape)

    # -- layers ----------------------------------------------------------------------------------------

    def renamed(self, name: str) -> str | None:
        """The name once layers are deleted and those behind are renumbered; None when its layer is deleted."""
        # More than one may apply: an expert of a list is renumbered within a layer that moves up itself.
        numbers = name.split(".")
        for prefix, index in self._layers.items():
            if name == prefix or name.startswith(prefix + "."):
                if index is None:
                    return None
                numbers[prefix.count(".")] = str(index)
        return ".".join(numbers)

    def deleted_layers(self) -> dict[str, tuple[int, ...]]:
        """Name of each ModuleList that loses items -> their indices, increasing."""
        deleted: dict[str, list[int]] = {}
        for prefix, index in self._layers.items():
            stack, _, number = prefix.rpartition(".")
            if index is None:
                deleted.setdefault(stack, []).append(int(number))
        return {stack: tuple(sorted(numbers)) for stack, numbers in deleted.items()}

    # --------------------------------------------------------------------------------------------------

    def _add(self, group: PrunableGroup) -> None:
        kept = self.kept[group.name]
        goes = torch.ones(group.units, dtype=torch.bool)
        goes[kept] = False
        if group.layers:
            self._add_layers(group, goes)
        for coupled in group.slices:
            gone = coupled.index[goes].flatten()
            if coupled.of_experts:
                own = self._removed_of_experts.setdefault(coupled.tensor, {})
                own[coupled.dim] = gone.view(group.parts, -1)
                continue
            by_dim = self._removed.setdefault(coupled.tensor, {})
            before = by_dim.get(coupled.dim, gone.new_empty(0))
            by_dim[coupled.dim] = torch.cat([before, gone]).unique()
            if coupled.rescale:
                scale = float(kept.numel() / group.units) ** coupled.rescale
                self._scales[coupled.tensor] = self._scales.get(coupled.tensor, 1.0) * scale

    def _add_layers(self, group: PrunableGroup, goes: torch.Tensor) -> None:
        gone = sorted(
            int(name.rpartition(".")[2]) for name, out in zip(group.layers, goes, strict=True) if out
        )
        stack = group.layers[0].rpartition(".")[0]
        last = max(int(name.rpartition(".")[2]) for name in group.layers)
        for index in range(last + 1):
            new = None if index in gone else index - sum(other < index for other in gone)
            self._layers[f"{stack}.{index}"] = new


def _without_entries(tensor: torch.Tensor, dim: int, gone: torch.Tensor) -> torch.Tensor:
    """Each slice along dimension 0 without its own entries along `dim`; gone: int64 (experts, removed)."""
    experts, size = tensor.shape[0], tensor.shape[dim]
    stays = torch.ones(experts * size, dtype=torch.bool)
    stays[gone.flatten()] = False
    left = stays.view(experts, size).nonzero()[:, 1].view(experts, -1)
    index = left.view(experts, *[1] * (dim - 1), -1, *[1] * (tensor.dim() - dim - 1))
    shape = list(tensor.shape)
    shape[dim] = left.shape[1]
    return tensor.gather(dim, index.expand(shape).to(tensor.device))


def _checked(group: PrunableGroup, units: torch.Tensor) -> torch.Tensor:
    units = units.to("cpu", torch.int64)
    ordered = units.dim() == 1 and bool((units[1:] > units[:-1]).all())
    if not ordered or not units.numel() or int(units[0]) < 0 or int(units[-1]) >= group.units:
        raise ValueError(
            f"{group.name}: the kept units must be increasing numbers from 0 to {group.units - 1}, at least one"
        )
    of_each = torch.bincount(units // group.width, minlength=group.parts)
    if bool((of_each != of_each[0]).any()):
        raise ValueError(
            f"{group.name}: each of its {group.parts} experts must keep as many units, got {of_each.tolist()[:8]}"
        )
    return units
