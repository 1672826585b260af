"""What `row_pruning`, `head_pruning`, `channel_pruning`, `depth_pruning` and `hidden_pruning` share.

    "row_pruning": {"dense_ratio": 0.5}                                       the short form, or
    "row_pruning": {
      "shared_parameters": {"enabled": true, "method": "taylor", "schedule_offset": 50, "schedule_offset_end": 250,
                            "schedule_offset_stride": 20, "shrink_at_end_of_schedule": true},
      "different_groups": {"ffn": {"params": {"dense_ratio": 0.5}, "modules": ["encoder"]}}}

| key | values |
|---|---|
| `method` | `l1`, `l2`, `topk`, `taylor`, `activation`, `random` (see `select.unit_scores`) |
| `scope` | `uniform`: each structure keeps the same number; `global`: the units of all structures compete |
| `round_to` | kept counts are multiples of it |
| `schedule` | `constant`, `linear`, `cubic` density from `schedule_offset` to `schedule_offset_end` |
| `randomize` | units are chosen at random by their scores (`select.gumbel`) |
| `shrink_at_end_of_schedule` | cut model and optimizer as soon as the masks are final |

What belongs to a unit is found from the model (`structure.find`) or stated by `related_modules`. While the schedule
runs, units are masked: their weights are zero in the fp32 masters right after each optimizer step, one bit per weight
on the owner's fragment. `topk` may change its mind: it masks only the weights that it scores, as the removed library
did, and keeps their latent weights, until the schedule has ended. Units are removed by `ds_compress.finalize`, by an
export, or by `shrink_at_end_of_schedule`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.config.structure_targets import units_left
from ds_compress.errors import Problem
from ds_compress.ops import bitmask
from ds_compress.select.unit_scores import UNIT_SCORES, MeanActivation, UnitScore
from ds_compress.select.units import global_counts, on_device, top_units, unit_mask, unit_sums
from ds_compress.techniques.base import engine_only
from ds_compress.techniques.masked import MaskedTechnique, noise_of, schedule_of

if TYPE_CHECKING:
    from ds_compress.config.structure_targets import StructurePlan
    from ds_compress.sharding.fragment import Fragment
    from ds_compress.sharding.shards import Shards
    from ds_compress.structure.prunable_group import CoupledSlice, PrunableGroup

logger = logging.getLogger("ds_compress")


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a layer was called with first, by position or by name: its input, its hidden states."""
    found: torch.Tensor = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
    return found


Place = tuple["PrunableGroup", "CoupledSlice"]
NEVER = torch.finfo(torch.float32).min
"""The score of a unit that is gone and may not return, or of nothing else."""


class StructuredPruning(MaskedTechnique):
    """Attributes: `kept`, sorted int64 indices of the units that are in force, by structure name; empty at first."""

    def __init__(self, plan: StructurePlan, seed: int = 0) -> None:
        shared = plan.shared
        self.shrinks = shared.shrink_at_end_of_schedule
        self.targets = {target.structure.name: target for target in plan.targets}
        self.structures = {name: target.structure for name, target in self.targets.items()}
        self.score: UnitScore = UNIT_SCORES[shared.method](
            self.structures.values(), seed if shared.seed is None else shared.seed
        )
        self._shared, self._scope, self._round_to = shared, shared.scope, shared.round_to
        self.schedule = schedule_of(shared, self.score.needs_gradient)
        self.kept: dict[str, torch.Tensor] = {}
        self._places: dict[str, list[Place]] = {}
        for structure in self.structures.values():
            for member in structure.slices:
                self._places.setdefault(member.tensor, []).append((structure, member))
        super().__init__(self._places, noise_of(self.name, shared, seed))
        self._applied, self._done = True, False
        self._handles: list[Any] = []

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        self._model = model
        if self.score.observes:
            self._handles += [handle for s in self.structures.values() for handle in self._observe(model, s)]
        return {}

    def attach(self, shards: Shards) -> None:
        super().attach(shards)
        self._make_masks()

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- at each optimizer step ------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        self._step = step
        self._undo = self.kept, self._applied, dict(self.score.totals)
        if self.score.observes and not self._done:
            self._fold()  # the forwards of this step are all done
        if self.schedule.is_due(step + 1, self.score.may_change):
            self.select_units(step + 1)

    def on_skipped_step(self) -> None:
        kept, self._applied, self.score.totals = self._undo
        if kept is not self.kept:
            self.kept = kept
            self._make_masks()
            self._units_changed()

    def on_gradients(self, fragments: Iterable[Fragment], settings: Mapping[str, Any]) -> None:
        for fragment in self._own(fragments):
            self._restore_latent(fragment)
            gradient = fragment.gradient
            if gradient is None:
                continue
            if not self.is_over:
                self._gather(fragment, gradient, settings)
            if fragment.name in self.masks:
                fragment.mask_gradient(self.masks[fragment.name])

    def _gather(self, fragment: Fragment, gradient: torch.Tensor, settings: Mapping[str, Any]) -> None:
        values = self.score.gradient_terms(fragment.values, gradient)
        if values is None:
            return
        for structure, member in self._places[fragment.name]:
            if member.scored:
                self.score.accumulate(
                    structure.name, self._unit_sums(structure, member, fragment, values), settings
                )

    @property
    def clears_gradients(self) -> bool:
        return bool(self.kept)

    def gradient_mask(self, name: str) -> torch.Tensor | None:
        return self.masks.get(name)

    def after_step(self, step: int) -> None:
        self._applied, self._done = True, self.is_over
        if not self.is_over:
            if not self.score.observes:
                self._fold()
        elif self.latent or self.score.totals:
            self.latent.clear()
            self.score.totals = {}

    def _fold(self) -> None:
        self.score.reduce(self._shards.sum, self._shards.sum_over_data)

    @property
    def masks_may_change(self) -> bool:
        return self.score.may_change

    @property
    def masks_are_final(self) -> bool:  # type: ignore[override]
        return self.is_over and len(self.kept) == len(self.structures) and self._applied

    @property
    def prunable_groups(self) -> Mapping[str, PrunableGroup]:  # type: ignore[override]
        return self.structures

    def kept_units(self) -> Mapping[str, torch.Tensor]:
        return self.kept

    def keep_units(self, name: str, units: torch.Tensor) -> None:
        self.kept[name] = units.clone()

    @property
    def has_results(self) -> bool:
        return bool(self.kept)

    @property
    def is_lost_in_plain_weights(self) -> bool:
        return any(structure.removable for structure in self.structures.values())

    def without_engine(self) -> Iterator[Problem]:
        if self.shrinks:
            yield engine_only(self.name, "shared_parameters.shrink_at_end_of_schedule", "true", "false")

    def learning_weights(self) -> Collection[str]:
        if self.score.may_change:
            return self._places
        if not self.score.needs_gradient:
            return ()
        return [name for name, places in self._places.items() if any(member.scored for _, member in places)]

    @property
    def has_new_masks(self) -> bool:
        return not self._applied

    # -- choosing units --------------------------------------------------------------------------------

    @torch.no_grad()
    def select_units(self, step: int) -> None:
        """Chooses the units in force from `step` on; the same call, with the same result, in every process.

        Where scores are NaN or Inf everything stays as it is, and the log names the structure.
        """
        scores = self._scores()
        for name, values in scores.items():
            if not bool(torch.isfinite(values).all()):
                logger.warning(
                    "%s: scores of %s are NaN or Inf at step %d; no new mask", self.name, name, step
                )
                return
        pools = self._pools(scores)
        counts = self._counts(pools, step)
        self.kept = {
            name: top_units(self._randomized(values, names[0]), count, self.structures[name].parts)
            for (names, values), count in zip(pools, counts, strict=True)
            for name in names
        }
        self.score.after_selection()
        self._applied = False
        self._make_masks()
        self._units_changed()

    def _scores(self) -> dict[str, torch.Tensor]:
        """fp32-rounded scores: the last digits of their sums depend on how weights are sharded."""
        sums = self._weight_sums()
        scores = {name: self.score.scores_of(name, sums[name]).float() for name in self.structures}
        if not self.score.may_change:
            for name, kept in self.kept.items():
                gone = torch.ones_like(scores[name], dtype=torch.bool)
                gone[kept] = False
                scores[name] = scores[name].masked_fill(gone, NEVER)
        return scores

    def _weight_sums(self) -> dict[str, torch.Tensor]:
        """fp64 (units,) sums of the scored weights of each structure, over all processes."""
        units = [structure.units for structure in self.structures.values()]
        flat = torch.zeros(sum(units), dtype=torch.float64)
        sums = dict(zip(self.structures, flat.split(units), strict=True))
        if not self.score.sums_weights:
            return sums
        for name, fragment in self._fragments.items():
            weights = self.score.weight_terms(self.latent.get(name, fragment.values))
            for structure, member in self._places[name]:
                if member.scored:
                    sums[structure.name] += self._unit_sums(structure, member, fragment, weights).cpu()
        return dict(zip(self.structures, self._shards.sum(flat).split(units), strict=True))

    def _unit_sums(
        self, structure: PrunableGroup, member: CoupledSlice, fragment: Fragment, values: torch.Tensor
    ) -> torch.Tensor:
        return unit_sums(values, fragment.start, fragment.shape, member.dim, member.index, member.of_experts)

    def _pools(self, scores: Mapping[str, torch.Tensor]) -> list[tuple[list[str], torch.Tensor]]:
        """Structures that must keep the same units, with the sum of their scores."""
        together: dict[str, list[str]] = {}
        for name, structure in self.structures.items():
            together.setdefault(structure.aligned or name, []).append(name)
        return [(names, torch.stack([scores[n] for n in names]).sum(0)) for names in together.values()]

    def _counts(self, pools: list[tuple[list[str], torch.Tensor]], step: int) -> list[int]:
        own = [self.units_kept(names[0], step) for names, _ in pools]
        if self._scope == "uniform" or len(pools) < 2:
            return own
        groups = [self.structures[names[0]] for names, _ in pools]
        multiples = [math.lcm(self._round_to, group.multiple) * group.parts for group in groups]
        noise = None
        if self.noise is not None:
            noise = [self.noise.gumbel(names[0], 0, len(v)) * self.noise.temperature for names, v in pools]
        return global_counts([values for _, values in pools], sum(own), multiples, noise)

    def _randomized(self, scores: torch.Tensor, pool: str) -> torch.Tensor:
        """What to select by: `scores`, fp32 (units,), as they are or with noise."""
        return scores if self.noise is None else self.noise.perturbed(scores, pool)

    def units_kept(self, name: str, step: int) -> int:
        """How many units the structure keeps at `step`, when each keeps its own share."""
        density = self.schedule.density(step, self.targets[name].dense_ratio)
        return units_left(self.structures[name], density, self._shared)

    def untouched(self) -> list[str]:
        if self._scope != "uniform":
            return []
        return [
            name
            for name, target in self.targets.items()
            if target.dense_ratio < 1
            and units_left(target.structure, target.dense_ratio, self._shared) == target.structure.units
        ]

    # -- masks -----------------------------------------------------------------------------------------

    def _make_masks(self) -> None:
        self.masks = {}
        for name, fragment in self._fragments.items():
            keep: torch.Tensor | None = None
            for structure, member in self._places[name]:
                if structure.name in self.kept and self._is_masked(structure, member):
                    units = torch.zeros(structure.units, dtype=torch.bool)
                    units[self.kept[structure.name]] = True
                    own = unit_mask(
                        units,
                        fragment.start,
                        fragment.numel,
                        fragment.shape,
                        member.dim,
                        member.index,
                        member.of_experts,
                    )
                    keep = own if keep is None else keep & own
            if keep is not None:
                self.masks[name] = bitmask.pack(keep.to(fragment.values.device))

    def _is_masked(self, structure: PrunableGroup, member: CoupledSlice) -> bool:
        if not member.masked:
            return False
        if not self.score.may_change or self.is_over:
            return True
        scored = {_matrix_of(m) for m in structure.slices if m.scored and m.dim == member.dim}
        return member.scored or _matrix_of(member) in scored

    def _units_changed(self) -> None:
        """For blocks that do more than mask weights."""

    # -- activations -----------------------------------------------------------------------------------

    def _observe(self, model: nn.Module, structure: PrunableGroup) -> Iterator[Any]:
        assert isinstance(self.score, MeanActivation)
        score = self.score
        if structure.observed is None or structure.observed_index is None:
            raise ValueError(
                f"method activation: what {structure.name} computes is not one tensor; choose l1"
            )
        index, module = structure.observed_index, model.get_submodule(structure.observed)
        axis = 1 if isinstance(module, nn.Conv2d) else -1

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if module.training and not self._done:
                x = first_argument(args, kwargs).detach().abs().movedim(axis, -1).flatten(0, -2)
                by_entry = x.sum(0, dtype=torch.float32)
                score.observe(structure.name, by_entry[on_device(index, x.device)].sum(1), x.shape[0])

        yield module.register_forward_pre_hook(hook, with_kwargs=True)

    # -- state -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        kept = {name: units.clone() for name, units in self.kept.items()}
        own = {"step": self._step, "done": self._done, "kept": kept, "score": self.score.state_dict()}
        return {**own, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._step, self._done = int(state["step"]), bool(state["done"])
        self.kept = {name: units.clone() for name, units in state["kept"].items()}
        self.score.load_state_dict(state["score"])
        self._make_masks()
        self._units_changed()

    def metrics(self) -> dict[str, float]:
        """`density`: fraction of the units that is in force, of all structures together."""
        units = sum(structure.units for structure in self.structures.values())
        kept = sum(
            self.kept[name].numel() if name in self.kept else s.units for name, s in self.structures.items()
        )
        return {"density": kept / units if units else 1.0}

    def history(self, step: int) -> Mapping[str, float | torch.Tensor]:
        units = {name: structure.units for name, structure in self.structures.items()}
        planned = sum(
            self.schedule.density(step, self.targets[name].dense_ratio) * count
            for name, count in units.items()
        )
        return {**self.metrics(), "planned_density": planned / max(1, sum(units.values()))}


def _matrix_of(member: CoupledSlice) -> str:
    """What a weight and its bias have in common: their module, or among fused experts the weight's name."""
    return member.tensor.removesuffix("_bias") if member.of_experts else member.tensor.rpartition(".")[0]
