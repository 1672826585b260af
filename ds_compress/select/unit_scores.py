"""Scores of units: one small class per method of the structured-pruning blocks.

Each process accumulates one number per unit from its own fragments and data between two optimizer steps; `reduce`
sums these over all processes in one small reduction. Scores are therefore equal in every process.
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
    """Base: scores of the units of `groups`, fp64, larger is kept."""

    needs_gradient: ClassVar[bool] = False
    """The first mask waits for a gradient."""
    may_change: ClassVar[bool] = False
    """A masked unit keeps its latent weights and may be unmasked again."""
    sums_weights: ClassVar[bool] = False
    """`scores_of` needs the sum of `weight_terms` over each unit, which takes a reduction."""
    observes: ClassVar[bool] = False
    """Uses activations: `observe` is called with the input of each group's `observed` module."""

    def __init__(self, groups: Iterable[PrunableGroup], seed: int) -> None:
        self.groups = {group.name: group for group in groups}
        self.seed = seed
        self.totals: dict[str, torch.Tensor] = {}
        """The sums over all processes, from `reduce`: fp64 (units,) by name of the group."""
        self._parts: dict[str, torch.Tensor] = {}

    def gradient_terms(self, weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
        """Elementwise fp32, what `accumulate` gets the sum of over each unit before an optimizer step; or None."""
        return None

    def accumulate(self, group: str, sums: torch.Tensor, settings: Mapping[str, Any]) -> None:
        """fp64 (units,) sums of `gradient_terms` over a fragment; `settings`: its optimizer's parameter group."""
        self._add(group, sums)

    def reduce(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        """Once a step, in every process: sums over all processes what was accumulated."""

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        """fp64 (units,) scores; `weights`: sum over the unit's scored weights of `weight_terms`."""
        raise NotImplementedError

    def weight_terms(self, values: torch.Tensor) -> torch.Tensor:
        """What is summed over a unit's weights, elementwise fp32; of methods with `sums_weights`."""
        raise NotImplementedError

    def after_selection(self) -> None:
        """A mask was just made from these scores."""

    def state_dict(self) -> dict[str, Any]:
        return {"totals": {name: total.clone() for name, total in self.totals.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.totals = {name: total.clone() for name, total in state["totals"].items()}
        self._parts = {}

    def _add(self, group: str, part: torch.Tensor) -> None:
        if group in self._parts:  # of a partly offloaded optimizer, parts are in different places
            part = self._parts[group] + part.to(self._parts[group].device)
        self._parts[group] = part

    def _reduced(self, total: Sum) -> dict[str, torch.Tensor]:
        """The parts of all processes, in one reduction for all groups."""
        sizes = {name: group.units for name, group in self.groups.items()}
        if not sizes:
            return {}
        device = next((part.device for part in self._parts.values()), torch.device("cpu"))
        flat = torch.zeros(sum(sizes.values()), dtype=torch.float64, device=device)
        for name, part in zip(sizes, flat.split(list(sizes.values())), strict=True):
            if name in self._parts:
                part.copy_(self._parts[name])
        self._parts = {}
        return dict(zip(sizes, total(flat).cpu().split(list(sizes.values())), strict=True))


class L1Norm(UnitScore):
    """Sum of |w| (Li et al. 2017)."""

    sums_weights = True

    def weight_terms(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().abs()

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        return weights


class L2Norm(UnitScore):
    """Square root of the sum of w^2."""

    sums_weights = True

    def weight_terms(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().square()

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        return weights.sqrt()


class RandomUnits(UnitScore):
    """A number in [0, 1) that depends only on (seed, group, unit): the control of every pruning paper."""

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        return random_units(self.seed, group, self.groups[group].units)


class TaylorUnits(UnitScore):
    """Sum of |w * g| over the unit's weights, since the last mask (Molchanov et al. 2019, equation 8, with the
    absolute value inside the sum, so that no reduction has to come before it)."""

    needs_gradient = True

    def gradient_terms(self, weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return (weights.float() * gradient.float()).abs_()

    def reduce(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        for name, part in self._reduced(sum_of_shards).items():
            self.totals[name] = self.totals[name] + part if name in self.totals else part

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        return self.totals.get(group, torch.zeros_like(weights))

    def after_selection(self) -> None:
        self.totals = {}


class MeanActivation(UnitScore):
    """Mean |x| of the unit's activation, since the last mask (Hu et al. 2016 count its zeros).

    For layers: 1 - cosine of input and output (Men et al. 2024, block influence).
    """

    observes = True

    def observe(self, group: str, sums: torch.Tensor, count: int) -> None:
        """fp64 (units,) sums over `count` samples of a forward of this process."""
        self._add(group, sums.double() / max(1, count))

    def reduce(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        for name, part in self._reduced(sum_of_data).items():
            self.totals[name] = self.totals[name] + part if name in self.totals else part

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        return self.totals.get(group, torch.zeros_like(weights))

    def after_selection(self) -> None:
        self.totals = {}


class RoutedExperts(UnitScore):
    """Scores of experts from what they were called with: `totals` are [2, experts], norms of outputs and tokens.

    The technique adds what a step has observed, already summed over all processes, by `add`.
    """

    observes = True

    def add(self, group: str, observed: torch.Tensor) -> None:
        """fp64 [2, experts]: of each expert the sum of gate weight * output norm, and the number of tokens."""
        self.totals[group] = self.totals[group] + observed if group in self.totals else observed

    def after_selection(self) -> None:
        self.totals = {}

    def _observed(self, group: str, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norms, tokens = self.totals.get(group, weights.new_zeros((2, weights.numel()))).unbind()
        return norms, tokens


class Reap(RoutedExperts):
    """Mean over its tokens of gate weight * L2 norm of the expert's output (Lasby et al. 2025, arXiv 2510.13999).

    0 for an expert that saw no token.
    """

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        norms, tokens = self._observed(group, weights)
        return norms / tokens.clamp_min(1)


class Frequency(RoutedExperts):
    """Tokens that were routed to the expert."""

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        return self._observed(group, weights)[1]


class LearnedUnits(UnitScore):
    """`topk`: one score per unit, trained by gradient descent through a straight-through top-k.

    The gradient of a unit's score is the sum of g * w over its weights; scores start uniform in +-1 / sqrt(units)
    and are trained by AdamW with the learning rate (weight decay, and an Adam's betas and eps) of the weights' own
    parameter group, one step behind the weights, without a parameter in the model.
    """

    may_change = True

    def __init__(self, groups: Iterable[PrunableGroup], seed: int) -> None:
        super().__init__(groups, seed)
        for name, group in self.groups.items():
            bound = group.units**-0.5
            self.totals[name] = random_units(seed, name, group.units).mul_(2 * bound).sub_(bound)
        self._settings: dict[str, Any] = {}
        self._optimizer = torch.optim.AdamW(list(self.totals.values()) or [torch.zeros(0)])

    def gradient_terms(self, weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return weights.float() * gradient.float()

    def accumulate(self, group: str, sums: torch.Tensor, settings: Mapping[str, Any]) -> None:
        super().accumulate(group, sums, settings)
        self._settings = adamw_settings(settings)

    def reduce(self, sum_of_shards: Sum, sum_of_data: Sum) -> None:
        self._optimizer.param_groups[0].update(self._settings)
        for name, gradient in self._reduced(sum_of_shards).items():
            self.totals[name].grad = gradient
        self._optimizer.step()

    def scores_of(self, group: str, weights: torch.Tensor) -> torch.Tensor:
        return self.totals[group]

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


def random_units(seed: int, group: str, units: int) -> torch.Tensor:
    """fp64 (units,) in [0, 1)."""
    return counter_rng.uniform(units, counter_rng.stream_key(seed, group)).double()


UNIT_SCORES: dict[str, type[UnitScore]] = {
    "l1": L1Norm,
    "l2": L2Norm,
    "topk": LearnedUnits,
    "taylor": TaylorUnits,
    "activation": MeanActivation,
    "random": RandomUnits,
    "reap": Reap,
    "frequency": Frequency,
}
