"""What makes a unit worth keeping: one small class per method of the structured-pruning blocks.

Each process sees the fragments and the data that it has; what it gathers of them between two optimizer steps is one
number per unit, and `fold` makes it everybody's by one small reduction. Scores are therefore equal in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch

from ds_compress.ops import counter_rng
from ds_compress.select.score_training import adamw_settings
from ds_compress.structure.prunable_group import PrunableGroup

Sum = Callable[[torch.Tensor], torch.Tensor]


class UnitScore:
    """Base: scores of the units of `structures`, fp64, larger is kept."""

    needs_gradient: ClassVar[bool] = False
    """The first mask waits for a gradient."""
    may_change: ClassVar[bool] = False
    """A masked unit keeps its hidden weights and may return."""
    sums_weights: ClassVar[bool] = False
    """`of` needs the sum of `of_weights` over each unit, for which all processes talk."""
    observes: ClassVar[bool] = False
    """Looks at activations: `see` is called with the input of each structure's `observed` module."""

    def __init__(self, structures: Iterable[PrunableGroup], seed: int) -> None:
        self.structures = {structure.name: structure for structure in structures}
        self.seed = seed
        self.totals: dict[str, torch.Tensor] = {}
        """What `fold` has made of all processes' parts: fp64 (units,) by structure name."""
        self._parts: dict[str, torch.Tensor] = {}

    def of_gradient(self, weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
        """What `gather` wants summed over a unit's weights before each optimizer step, elementwise fp32; or None."""
        return None

    def gather(self, structure: str, sums: torch.Tensor, settings: Mapping[str, Any]) -> None:
        """fp64 (units,) sums of `of_gradient` over a fragment; `settings`: its optimizer's parameter group."""
        self._add(structure, sums)

    def fold(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        """Once a step, in every process: makes what was gathered everybody's."""

    def of(self, structure: str, weights: torch.Tensor) -> torch.Tensor:
        """fp64 (units,) scores; `weights`: sum over the unit's scored weights of `of_weights`."""
        raise NotImplementedError

    def of_weights(self, values: torch.Tensor) -> torch.Tensor:
        """What is summed over a unit's weights, elementwise fp32; of methods with `sums_weights`."""
        raise NotImplementedError

    def after_selection(self) -> None:
        """A mask was just made from these scores."""

    def state_dict(self) -> dict[str, Any]:
        return {"totals": {name: total.clone() for name, total in self.totals.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.totals = {name: total.clone() for name, total in state["totals"].items()}
        self._parts = {}

    def keep_units(self, kept: Mapping[str, torch.Tensor]) -> None:
        """The structures were cut to these units."""
        self.totals = {n: t[kept[n]] if n in kept else t for n, t in self.totals.items()}

    def _add(self, structure: str, part: torch.Tensor) -> None:
        if structure in self._parts:  # of a partly offloaded optimizer, parts are in different places
            part = self._parts[structure] + part.to(self._parts[structure].device)
        self._parts[structure] = part

    def _reduced(self, total: Sum) -> dict[str, torch.Tensor]:
        """The parts of all processes, one reduction for all structures."""
        sizes = {name: structure.units for name, structure in self.structures.items()}
        if not sizes:
            return {}
        device = next((part.device for part in self._parts.values()), torch.device("cpu"))
        flat = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device)
        for name, place in zip(sizes, flat.split(list(sizes.values())), strict=True):
            if name in self._parts:
                place.copy_(self._parts[name])
        self._parts = {}
        return dict(zip(sizes, total(flat).cpu().split(list(sizes.values())), strict=True))


class L1Norm(UnitScore):
    """Sum of |w| (Li et al. 2017)."""

    sums_weights = True

    def of_weights(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().abs()

    def of(self, structure: str, weights: torch.Tensor) -> torch.Tensor:
        return weights


class L2Norm(UnitScore):
    """Square root of the sum of w^2."""

    sums_weights = True

    def of_weights(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().square()

    def of(self, structure: str, weights: torch.Tensor) -> torch.Tensor:
        return weights.sqrt()


class RandomUnits(UnitScore):
    """A number in [0, 1) that depends only on (seed, structure, unit): the control of every pruning paper."""

    def of(self, structure: str, weights: torch.Tensor) -> torch.Tensor:
        return random_units(self.seed, structure, self.structures[structure].units)


class TaylorUnits(UnitScore):
    """Sum of |w * g| over the unit's weights, since the last mask (Molchanov et al. 2019, equation 8, with the
    absolute value inside the sum, which needs no agreement between processes before it)."""

    needs_gradient = True

    def of_gradient(self, weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return (weights.float() * gradient.float()).abs_()

    def fold(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        for name, part in self._reduced(sum_of_shards).items():
            self.totals[name] = self.totals[name] + part if name in self.totals else part

    def of(self, structure: str, weights: torch.Tensor) -> torch.Tensor:
        return self.totals.get(structure, torch.zeros_like(weights))

    def after_selection(self) -> None:
        self.totals = {}


class MeanActivation(UnitScore):
    """Mean |x| of what the unit computes, since the last mask (Hu et al. 2016 count zeros; this is its mean).

    For layers: 1 - cosine of what goes in and what comes out (Men et al. 2024, block influence).
    """

    observes = True

    def see(self, structure: str, sums: torch.Tensor, count: int) -> None:
        """fp64 (units,) sums over `count` samples of a forward of this process."""
        self._add(structure, sums.double() / max(1, count))

    def fold(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        for name, part in self._reduced(sum_of_data).items():
            self.totals[name] = self.totals[name] + part if name in self.totals else part

    def of(self, structure: str, weights: torch.Tensor) -> torch.Tensor:
        return self.totals.get(structure, torch.zeros_like(weights))

    def after_selection(self) -> None:
        self.totals = {}


class LearnedUnits(UnitScore):
    """`topk`: one score per unit, trained by gradient descent through a straight-through top-k.

    The gradient of a unit's score is the sum of g * w over its weights; scores start uniform in +-1 / sqrt(units)
    and are trained by AdamW with the learning rate (weight decay, and an Adam's betas and eps) of the weights' own
    parameter group, one step behind the weights, without a parameter in the model.
    """

    may_change = True

    def __init__(self, structures: Iterable[PrunableGroup], seed: int) -> None:
        super().__init__(structures, seed)
        for name, structure in self.structures.items():
            bound = structure.units**-0.5
            self.totals[name] = random_units(seed, name, structure.units).mul_(2 * bound).sub_(bound)
        self._settings: dict[str, Any] = {}
        self._optimizer = torch.optim.AdamW(list(self.totals.values()) or [torch.zeros(0)])

    def of_gradient(self, weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return weights.float() * gradient.float()

    def gather(self, structure: str, sums: torch.Tensor, settings: Mapping[str, Any]) -> None:
        super().gather(structure, sums, settings)
        self._settings = adamw_settings(settings)

    def fold(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        self._optimizer.param_groups[0].update(self._settings)
        for name, gradient in self._reduced(sum_of_shards).items():
            self.totals[name].grad = gradient
        self._optimizer.step()

    def of(self, structure: str, weights: torch.Tensor) -> torch.Tensor:
        return self.totals[structure]

    def state_dict(self) -> dict[str, Any]:
        moments = {
            name: dict(self._optimizer.state[total])
            for name, total in self.totals.items()
            if total in self._optimizer.state
        }
        return {**super().state_dict(), "moments": moments, "settings": dict(self._settings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Not into the tensors that are here: a schedule that is over has none.
        super().load_state_dict(state)
        self._optimizer = torch.optim.AdamW(list(self.totals.values()) or [torch.zeros(0)])
        for name, moments in state["moments"].items():
            self._optimizer.state[self.totals[name]] = {key: value.clone() for key, value in moments.items()}
        self._settings = dict(state["settings"])


def random_units(seed: int, structure: str, units: int) -> torch.Tensor:
    """fp64 (units,) in [0, 1)."""
    return counter_rng.uniform(units, counter_rng.stream_key(seed, structure)).double()


UNIT_SCORES: dict[str, type[UnitScore]] = {
    "l1": L1Norm,
    "l2": L2Norm,
    "topk": LearnedUnits,
    "taylor": TaylorUnits,
    "activation": MeanActivation,
    "random": RandomUnits,
}
