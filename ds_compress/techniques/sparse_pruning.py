"""`sparse_pruning`: zero the least useful weights while the model trains.

    "sparse_pruning": {
      "shared_parameters": {"enabled": true, "method": "l1", "schedule_offset": 100, "schedule_offset_end": 900,
                            "schedule_offset_stride": 100},
      "different_groups": {"encoder": {"params": {"dense_ratio": 0.2}, "modules": ["encoder"]}}}

| key | values |
|---|---|
| `method` | `l1`, `topk`, `taylor`, `movement`, `snip_momentum`, `random` (see `select.scores`) |
| `scope` | `layer`: each matrix keeps `dense_ratio`; `group`, `global`: one exact threshold over many weights |
| `pattern` | unstructured, `NxM` blocks, `N:M` groups along the inputs |
| `schedule` | `constant`, `linear`, `cubic` density from `schedule_offset` to `schedule_offset_end` |
| `regrowth` | a masked weight keeps its hidden value, goes on training and may return |
| `randomize` | a random choice by scores (`select.gumbel`), of weights, blocks, or within N:M groups |

A stack of experts is one weight, and as many matrices as it has experts.

The mask costs one bit per weight, on the owner's fragment only. It is applied to the fp32 master between the
optimizer's update and the making of the 16-bit copy, so forward and backward see exact zeros at no cost.
A mask that is due at step s is computed just before step s is applied and is in force from then on: the
forward of step s (counting from 0) is the first that sees it. Step 0 itself is always dense, and methods that
score by gradient first need to have seen one. `gradient_clipping` counts the gradients that are applied: not those of
weights that stay masked (those of latent weights under `regrowth` are).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.config.schema.patterns import UNSTRUCTURED
from ds_compress.config.targets import exact_ceil
from ds_compress.errors import listed, shown
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.ops import bitmask
from ds_compress.select import radix
from ds_compress.select.gumbel import PRUNED
from ds_compress.select.moving import Candidates, MovingThresholds
from ds_compress.select.patterns import BlockGrid
from ds_compress.select.scores import SCORES
from ds_compress.techniques.masked import MaskedTechnique, noise_of, schedule_of

if TYPE_CHECKING:
    from ds_compress.config.targets import Target, TechniquePlan
    from ds_compress.sharding.fragment import Fragment

logger = logging.getLogger("ds_compress")


_MATRIX = "#"
"""Between the name of a stack and the number of a matrix in it."""
_METHODS_ON_SHARDS = ("l1", "taylor", "movement", "snip_momentum")
"""Those that work where each process holds a shard of a layer."""


class SparsePruning(MaskedTechnique):
    name = "sparse_pruning"

    def __init__(self, technique: TechniquePlan, seed: int = 0) -> None:
        shared = technique.shared
        self.scope = shared.scope
        self.targets: dict[str, Target] = {target.param_name: target for target in technique.targets}
        super().__init__(self.targets, noise_of(self.name, shared, seed))
        self._method, self._pattern = shared.method, shared.effective_pattern
        self.score = SCORES[shared.method](seed if shared.seed is None else shared.seed, shared.momentum)
        self.regrowth = shared.effective_regrowth or self.score.mask_may_change
        self.schedule = schedule_of(shared, self.score.needs_gradient)
        self.grids = {
            name: BlockGrid.of(
                shared.effective_pattern, target.shape, target.kind.is_transposed, target.kind.is_experts
            )
            for name, target in self.targets.items()
        }
        self._active_masks = self.masks
        self._thresholds = MovingThresholds()
        self.kept, self.total = 0, 0
        self._model_numel = 0

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        self._model_numel = sum(math.prod(shape_of(parameter)) for parameter in model.parameters())
        return {}

    @property
    def masks_may_change(self) -> bool:
        return self.regrowth

    @property
    def has_results(self) -> bool:
        return bool(self.masks)

    # -- at each optimizer step ------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        self._step = step
        self._undo = self.masks, self.kept, self.total, dict(self.score.tensors)
        # The gradients of this step come from a forward under these masks, not under those made now.
        self._active_masks = self.masks
        if self.schedule.is_due(step + 1, self.regrowth):
            self.update_masks(step + 1)

    def on_skipped_step(self) -> None:
        self.masks, self.kept, self.total, self.score.tensors = self._undo
        self._active_masks = self.masks

    def on_gradients(self, fragments: Iterable[Fragment], settings: Mapping[str, Any]) -> None:
        scoring = not self.is_over
        learning = self.score.needs_gradient or bool(self._active_masks)
        for fragment in self._own(fragments):
            self._restore_latent(fragment)
            if scoring and learning:
                self.score.observe(fragment, settings)
            if self.score.masks_gradient and fragment.name in self._active_masks:
                fragment.mask_gradient(self._active_masks[fragment.name])
        if scoring and learning:
            self.score.learn(settings)

    @property
    def clears_gradients(self) -> bool:
        return self.total > 0

    def gradient_mask(self, name: str) -> torch.Tensor | None:
        if not self.regrowth or self.is_over:
            return self.masks.get(name)
        # The gradient goes to the hidden value of a masked weight, unless its score has it instead.
        return self._active_masks.get(name) if self.score.masks_gradient else None

    def after_step(self, step: int) -> None:
        if self.is_over and (self.latent or self.score.tensors):
            # The mask is final: whatever could have changed its mind is memory for nothing.
            self.latent.clear()
            self.score.clear()

    def learning_weights(self) -> Collection[str]:
        return self.targets if self.regrowth or self.score.needs_gradient else ()

    @property
    def has_new_masks(self) -> bool:
        return self.masks is not self._active_masks

    # -- making a mask ---------------------------------------------------------------------------------

    @torch.no_grad()
    def update_masks(self, step: int) -> None:
        """Computes the masks in force from `step` on; the same call in every process.

        On NaN or Inf scores the masks stay as they are and the log says which weights are broken.
        """
        before = self.kept, self.total
        try:
            self.masks = dict(self._select(step))
        except radix.NonFiniteScoresError as error:
            self.kept, self.total = before
            groups = self._selection_groups(step)
            members = (member for index in error.groups for member in groups[index].members)
            broken = sorted({self._weight_of(member) for member in members})
            logger.warning(
                "sparse_pruning: weights or gradients of %s are NaN or Inf at step %d; the mask stays as it was",
                ", ".join(broken[:3]) + (" and others" if len(broken) > 3 else ""),
                step,
            )
            return
        self.score.after_selection()

    def _select(self, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, packed mask of the fragment), one weight at a time."""
        if not any(grid.is_elementwise for grid in self.grids.values()):
            for name, keep in self._select_blocks(step):
                yield name, bitmask.pack(self._cut(keep, self._fragments[name]))
        elif any(self._matrices(name) > 1 for name in self.targets):
            keys = {name: partial(self._element_keys, fragment) for name, fragment in self._fragments.items()}
            for name, keep in self._by_threshold(keys, step):
                yield name, bitmask.pack(keep)
        else:
            groups = self._counted(self._selection_groups(step))
            candidates = {name: self._candidates(fragment) for name, fragment in self._fragments.items()}
            yield from self._thresholds.select(candidates, groups, self._shards)

    def _select_blocks(self, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, element mask over the whole bands that the fragment touches), one weight at a time."""
        block_rows = {name: grid.block_row_numel for name, grid in self.grids.items()}
        numels = {name: math.prod(target.shape) for name, target in self.targets.items()}
        own = {name: self._element_scores(fragment) for name, fragment in self._fragments.items()}
        scores = self._shards.exchange_halos(own, block_rows, numels)
        if any(grid.kept_per_group is not None for grid in self.grids.values()):
            self.kept, self.total = (
                sum(grid.num_kept for grid in self.grids.values()),
                sum(numels.values()),
            )
            for name, values in scores.items():
                start = self._fragments[name].start
                whole_rows = start - start % block_rows[name]
                yield name, self.grids[name].n_of_m_mask(self._randomized(values, name, whole_rows))
            return
        blocks = {}
        for name, values in scores.items():
            first, of_blocks = (
                self.grids[name].first_unit(self._fragments[name].start),
                self.grids[name].block_scores(values),
            )
            blocks[name] = radix.sort_keys_(self._randomized(of_blocks, name, first))
        keys = {name: partial(_given, values) for name, values in blocks.items()}
        for name, keep in self._by_threshold(keys, step):
            yield name, self.grids[name].expand_block_mask(keep, scores[name].numel())

    def _by_threshold(
        self, keys: Mapping[str, Callable[[], torch.Tensor]], step: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        scores_of, last = dict[str, radix.ParameterScores](), _LastKeys()
        for name, make_keys in keys.items():
            grid, start = self.grids[name], self._fragments[name].start
            # A band that began on an earlier fragment is that fragment's to count.
            num_halo = 0 if start % grid.block_row_numel == 0 else grid.blocks_per_row
            if self._matrices(name) == 1:
                scores_of[name] = radix.ParameterScores(make_keys, num_halo)
            else:
                scores_of |= self._matrix_scores(name, partial(last.part, name, make_keys), num_halo)
        groups = self._counted(self._selection_groups(step))
        return self._joined(radix.select(scores_of, groups, self._shards))

    def _counted(self, groups: list[radix.SelectionGroup]) -> list[radix.SelectionGroup]:
        self.kept = sum(group.num_kept for group in groups)
        self.total = sum(grid.units for grid in self.grids.values())
        return groups

    def _candidates(self, fragment: Fragment) -> Candidates:
        if self.noise is not None:
            return Candidates(lambda: (self._randomized_scores(fragment), False), None)
        competing = None if self.regrowth else self.masks.get(fragment.name)
        return Candidates(lambda: self.score.in_place(fragment, self._weights(fragment)), competing)

    def _matrices(self, name: str) -> int:
        """How many matrices of the weight have a threshold of their own."""
        return self.targets[name].matrices if self.scope == "layer" else 1

    def _matrix_scores(
        self, name: str, part_of_keys: Callable[[slice], torch.Tensor], num_halo: int
    ) -> dict[str, radix.ParameterScores]:
        """Of each matrix of which this process holds a part, by `_member`."""
        grid, fragment = self.grids[name], self._fragments[name]
        size = grid.units // self._matrices(name)
        first, end = grid.first_unit(fragment.start), grid.first_unit(fragment.start + fragment.numel - 1)
        end += 1 if grid.is_elementwise else grid.blocks_per_row
        found = {}
        for matrix in range(first // size, -(-end // size)):
            inside = slice(max(matrix * size - first, 0), min((matrix + 1) * size, end) - first)
            found[_member(name, matrix)] = radix.ParameterScores(partial(part_of_keys, inside), num_halo)
            num_halo = 0
        return found

    def _joined(self, masks: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The masks of the matrices of a weight, which come one after the other, as one."""
        for name, parts in itertools.groupby(masks, lambda item: self._weight_of(item[0])):
            found = [mask for _, mask in parts]
            yield name, found[0] if len(found) == 1 else torch.cat(found)

    def _weight_of(self, member: str) -> str:
        return member if member in self.targets else member.rpartition(_MATRIX)[0]

    def _element_keys(self, fragment: Fragment) -> torch.Tensor:
        is_pruned = not self.regrowth and fragment.name in self.masks
        signed = self.score.is_signed or is_pruned or self.noise is not None
        return radix.sort_keys_(self._randomized_scores(fragment), non_negative=not signed)

    def _randomized_scores(self, fragment: Fragment) -> torch.Tensor:
        return self._randomized(self._element_scores(fragment), fragment.name, fragment.start)

    def _randomized(self, scores: torch.Tensor, name: str, first: int) -> torch.Tensor:
        """What to select by: `scores` of the units of a weight from the `first` on, as they are or with noise."""
        return scores if self.noise is None else self.noise.perturbed(scores, name, first)

    def _weights(self, fragment: Fragment) -> torch.Tensor:
        return self.latent.get(fragment.name, fragment.values)

    def _element_scores(self, fragment: Fragment) -> torch.Tensor:
        scores = self.score.scores_of(fragment, self._weights(fragment))
        if not self.regrowth and fragment.name in self.masks:
            # Every score without regrowth is >= 0, so a pruned weight ranks below all others and stays pruned.
            bitmask.apply_(scores, self.masks[fragment.name], fill=PRUNED)
        return scores

    def _selection_groups(self, step: int) -> list[radix.SelectionGroup]:
        """Who competes with whom: one pool per weight, per JSON group, or one in all."""

        if self.scope == "layer":
            return [group for name in self.targets for group in self._groups_of(name, step)]
        groups: dict[str, list[str]] = {}
        for name, target in self.targets.items():
            groups.setdefault(target.group if self.scope == "group" else "", []).append(name)
        return [
            radix.SelectionGroup(tuple(names), self._kept_together(names, step)) for names in groups.values()
        ]

    def _groups_of(self, name: str, step: int) -> list[radix.SelectionGroup]:
        """Of the matrices of one weight, each of which keeps ceil(density * n) of its n units."""
        matrices = self._matrices(name)
        kept = exact_ceil(self._density(name, step), self.grids[name].units // matrices)
        members = [name] if matrices == 1 else [_member(name, matrix) for matrix in range(matrices)]
        return [radix.SelectionGroup((member,), kept) for member in members]

    def _kept_together(self, names: list[str], step: int) -> int:
        by_density: dict[float, int] = {}
        for name in names:
            density = self._density(name, step)
            by_density[density] = by_density.get(density, 0) + self.grids[name].units
        return sum(exact_ceil(density, units) for density, units in by_density.items())

    def _density(self, name: str, step: int) -> float:
        return self.schedule.density(step, self.targets[name].params.dense_ratio)

    def _cut(self, keep: torch.Tensor, fragment: Fragment) -> torch.Tensor:
        """The part of a mask over whole bands that covers the fragment."""
        begin = fragment.start % self.grids[fragment.name].block_row_numel
        return keep[begin : begin + fragment.numel]

    # -- state -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "total": self.total, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept, self.total = int(state["kept"]), int(state["total"])

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        masks = {name: bitmask.unpack(mask, self._fragments[name].numel) for name, mask in self.masks.items()}
        state = self.score.fragment_state()
        return {**state, **({"mask": masks} if masks else {}), **super().fragment_state()}

    def load_fragment_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.masks = {name: bitmask.pack(mask) for name, mask in state.get("mask", {}).items()}
        super().load_fragment_state(state)
        self.score.load_fragment_state(state)

    def after_shrink(self) -> None:
        """Counts anew: some of the masked weights are gone for good."""
        if not self.total:
            return
        own = sum(int(bitmask.unpack(m, self._fragments[n].numel).sum()) for n, m in self.masks.items())
        weights = sum(math.prod(target.shape) for target in self.targets.values())
        self.total = sum(grid.units for grid in self.grids.values())
        self.kept = round(self.total * int(self._shards.sum(torch.tensor(own)).item()) / weights)

    def metrics(self) -> dict[str, float]:
        """`sparsity`: fraction of pruned units among all that the block claims, 0 before the first mask.

        `model_sparsity`: of all parameters of the model, those that the block does not claim included.
        """
        sparsity = 1.0 - self.kept / self.total if self.total else 0.0
        if not self._model_numel:
            return {"sparsity": sparsity}
        claimed = sum(math.prod(target.shape) for target in self.targets.values())
        return {"sparsity": sparsity, "model_sparsity": sparsity * claimed / self._model_numel}

    def history(self, step: int) -> Mapping[str, float | torch.Tensor]:
        if any(grid.kept_per_group is not None for grid in self.grids.values()):
            # N of M at once, whatever dense_ratio says.
            total = sum(math.prod(target.shape) for target in self.targets.values())
            is_on = step >= self.schedule.begin
            kept: float = sum(grid.num_kept for grid in self.grids.values()) if is_on else total
        else:
            total = sum(grid.units for grid in self.grids.values())
            kept = sum(self._density(name, step) * grid.units for name, grid in self.grids.items())
        return {**self.metrics(), "planned_sparsity": 1.0 - kept / max(1, total)}

    def with_tensor_parallelism(self) -> Iterator[tuple[str, str, str, str]]:
        if self._method not in _METHODS_ON_SHARDS:
            reason = "its numbers are drawn by the position in the whole weight"
            yield "shared_parameters.method", shown(self._method), listed(_METHODS_ON_SHARDS), reason
        if self.noise is not None:
            reason = "its noise is drawn by the position in the whole weight"
            yield "shared_parameters.randomize", "a temperature above 0", "nothing", reason
        if any(not grid.is_elementwise for grid in self.grids.values()):
            reason = "a block may lie across two processes"
            yield "shared_parameters.pattern", shown(self._pattern), shown(UNSTRUCTURED), reason

    def untouched(self) -> list[str]:
        if self.scope != "layer":
            return []
        ratios = {name: target.params.dense_ratio for name, target in self.targets.items()}
        return [
            name
            for name, grid in self.grids.items()
            if ratios[name] < 1
            and grid.kept_per_group is None
            and exact_ceil(ratios[name], units := grid.units // self._matrices(name)) == units
        ]


class _LastKeys:
    """The keys of the weight that was asked for last: those of one weight are held at a time."""

    def __init__(self) -> None:
        self._name, self._keys = "", torch.empty(0)

    def part(self, name: str, make: Callable[[], torch.Tensor], inside: slice) -> torch.Tensor:
        if self._name != name:
            self._name, self._keys = name, make()
        return self._keys[inside]


def _member(name: str, matrix: int) -> str:
    """The name of one matrix of a stack among those of weights."""
    return f"{name}{_MATRIX}{matrix}"


def _given(values: torch.Tensor) -> torch.Tensor:
    return values
