"""`expert_pruning`: experts of a mixture go, with all that routes tokens to them, or are merged into others.

    "expert_pruning": {"dense_ratio": 0.5}                                    the short form, or
    "expert_pruning": {
      "shared_parameters": {"enabled": true, "method": "reap", "schedule_offset": 100, "merge": true,
                            "shrink_at_end_of_schedule": true},
      "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": ["layers"]}}}

| `method` | an expert's score, since the last mask |
|---|---|
| `reap` | mean over its tokens of gate weight times norm of its output (arXiv 2510.13999) |
| `frequency` | tokens that were routed to it |
| `l1`, `l2`, `taylor`, `random` | as in the other blocks, over all weights of the expert |

Until they are removed, experts are excluded from the routing (`techniques.expert_routing`): the logits are those of
the model without them. Their weights become zero in the fp32 masters; with `merge` they are first averaged into a kept
expert (`structure.expert_merging`). See `techniques.structured_pruning` for the other keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ds_compress.config.structure_targets import units_left
from ds_compress.modelinfo.experts import moe_blocks
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.ops import bitmask
from ds_compress.select.unit_scores import Reap, RoutedExperts
from ds_compress.structure.expert_merging import (
    clusters,
    merge_weights,
    merged,
    router_of,
    tensors_of_experts,
)
from ds_compress.structure.experts import group_name
from ds_compress.structure.prunable_group import CoupledSlice, PrunableGroup
from ds_compress.techniques.expert_routing import ExpertRouting, Narrowing
from ds_compress.techniques.routing_check import check_exclusion
from ds_compress.techniques.structured_pruning import StructuredPruning

if TYPE_CHECKING:
    from collections.abc import Callable

    from ds_compress.config.structure_targets import StructurePlan
    from ds_compress.sharding.fragment import Fragment
    from ds_compress.sharding.shards import Shards

_STRIDE = 16
"""Applied steps between two reductions of the load when no score needs it any more."""


class ExpertPruning(StructuredPruning):
    """Attributes: `load`, fp64 [2, experts] by group, norms and tokens of all processes since the last mask."""

    name: ClassVar[str] = "expert_pruning"
    survives_shrink = True
    """To go on measuring the load of the experts that are left."""

    def __init__(self, plan: StructurePlan, seed: int = 0) -> None:
        super().__init__(plan, seed)
        self.merges: bool = plan.shared.merge
        self.load: dict[str, torch.Tensor] = {}
        self.load_before: dict[str, torch.Tensor] = {}
        """Tokens of each expert when the first experts went."""
        self.lost: dict[str, float] = {}
        """Share of the tokens that went to experts that are gone, by group."""
        self._routings: dict[str, ExpertRouting] = {}
        self._around: list[tuple[Narrowing, tuple[str, ...]]] = []
        self._changes: dict[str, torch.Tensor] = {}
        """What merging adds to this process' fragments after the next update."""
        self._load_undo: tuple[Any, ...] = ()
        self._density_of_cut: float | None = None
        """Fraction of the experts that a shrink has left; None before."""

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        self._model = model
        blocks = {group_name(block): block for block in moe_blocks(model)}
        for name, structure in self.structures.items():
            routing = self._routings[name] = ExpertRouting(model, blocks[name])
            routing.measures_norms = isinstance(self.score, Reap)
            left = units_left(structure, self.targets[name].dense_ratio, self._shared)
            if left < structure.units:
                check_exclusion(routing, left, structure.parts, full_parameters)
            for unit, expert in enumerate(structure.layers):
                for inner, _ in model.get_submodule(expert).named_parameters():
                    whole = CoupledSlice(
                        f"{expert}.{inner}", 0, torch.tensor([[unit]]), scored=True, masked=False
                    )
                    self._places.setdefault(whole.tensor, []).append((structure, whole))
        self._around = list(self._modules_around(model))
        return {}

    def attach(self, shards: Shards) -> None:
        super().attach(shards)
        if self._is_cut and not self._routings:
            blocks = [block for block in moe_blocks(self._model) if block.fused is not None]
            self._routings = {group_name(block): ExpertRouting(self._model, block) for block in blocks}
        if not self._handles:
            for routing in self._routings.values():
                self._handles += routing.hooks()
            for narrowing, _ in self._around:
                self._handles += narrowing.hooks()
        self._units_changed()

    def _modules_around(self, model: nn.Module) -> Iterator[tuple[Narrowing, tuple[str, ...]]]:
        """Modules outside of the blocks that know how many experts there are, for a loss that balances their load."""
        for name, module in model.named_modules():
            inside = [
                group
                for group, routing in self._routings.items()
                if not name
                or (routing.block.name != name and f"{routing.block.name}.".startswith(f"{name}."))
            ]
            for units in {self.structures[group].units for group in inside}:
                narrowing = Narrowing(module, {}, units)
                if narrowing.is_needed:
                    yield narrowing, tuple(inside)

    # -- at each optimizer step ------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        if self._is_cut:
            return
        self._load_undo = dict(self.load), dict(self.load_before), dict(self.lost)
        if not self.score.observes and not self._done:
            self._fold_load()
        super().before_step(step)

    def on_skipped_step(self) -> None:
        if self._is_cut:
            return
        self.load, self.load_before, self.lost = self._load_undo
        self._changes = {}
        super().on_skipped_step()

    def after_step(self, step: int) -> None:
        if not self._is_cut:
            super().after_step(step)
        self._changes = {}
        if (self._is_cut or self.is_over) and step % _STRIDE == 0:
            self.load = {}
            self._fold_load()

    def _fold(self) -> None:
        super()._fold()
        if self.score.observes:
            self._fold_load()

    def _fold_load(self) -> None:
        """One reduction over all processes for all mixtures."""
        taken = {name: routing.take() for name, routing in self._routings.items()}
        device = next((part.device for part in taken.values() if part is not None), torch.device("cpu"))
        units = [2 * routing.block.experts for routing in self._routings.values()]
        flat = torch.zeros(sum(units), dtype=torch.float64, device=device)
        for part, own in zip(flat.split(units), taken.values(), strict=True):
            if own is not None:
                part.copy_(own.flatten())
        parts = self._shards.sum_over_data(flat).cpu().split(units)
        for part, name in zip(parts, taken, strict=True):
            observed = part.view(2, -1)
            self.load[name] = self.load[name] + observed if name in self.load else observed
            if isinstance(self.score, RoutedExperts) and not self._is_cut:
                self.score.add(name, observed)

    @torch.no_grad()
    def select_units(self, step: int) -> None:
        before = dict(self.kept)
        super().select_units(step)
        for name, structure in self.structures.items():
            everything = torch.arange(structure.units)
            had, has = before.get(name, everything), self.kept.get(name, everything)
            gone = had[~torch.isin(had, has)]
            if gone.numel():
                self._experts_go(structure, had, gone)
        self.load = {}

    def _experts_go(self, structure: PrunableGroup, had: torch.Tensor, gone: torch.Tensor) -> None:
        tokens = self.load.get(structure.name, torch.zeros(2, structure.units, dtype=torch.float64))[1]
        total = float(tokens.sum())
        if total:
            stay = 1 - float(tokens[gone].sum()) / total
            self.lost[structure.name] = 1 - (1 - self.lost.get(structure.name, 0.0)) * stay
        if total and had.numel() == structure.units:
            self.load_before[structure.name] = tokens
        if self.merges:
            self._merge(structure, had, tokens)

    # -- merging ---------------------------------------------------------------------------------------

    def _merge(self, structure: PrunableGroup, had: torch.Tensor, tokens: torch.Tensor) -> None:
        """Works out how the weights of kept experts change; a collective for each tensor of the experts."""
        router = self._full(router_of(self._model, structure))
        heads = torch.arange(structure.units)
        stay = torch.isin(had, self.kept[structure.name]).nonzero().flatten()
        heads[had] = had[clusters(router[had], stay)]
        # Of experts in a list nobody knows how many tokens they saw: all count alike.
        shares = merge_weights(heads, tokens if tokens.any() else torch.ones(structure.units))
        for names in tensors_of_experts(self._model, structure):
            stacked = len(names) == 1
            whole = self._full(names[0]) if stacked else torch.stack([self._full(name) for name in names])
            change = merged(whole, heads, shares) - whole
            for name, own in zip(names, [change] if stacked else change, strict=True):
                fragment = self._fragments.get(name)
                if fragment is not None:
                    part = own.flatten()[fragment.start : fragment.start + fragment.numel]
                    self._changes[name] = part.to(fragment.values.device)

    def _full(self, name: str) -> torch.Tensor:
        """The whole fp32 master on the CPU, of latest values; a collective."""
        shape = shape_of(self._model.get_parameter(name))
        flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.float32)
        fragment = self._shards.fragments.get(name)
        if fragment is not None:
            flat[fragment.start : fragment.start + fragment.numel] = fragment.values.to("cpu", torch.float32)
        return self._shards.sum(flat).view(shape)

    def on_update(self, fragments: Iterable[Fragment]) -> None:
        fragments = list(fragments)
        for fragment in self._own(fragments):
            if fragment.name in self._changes:
                fragment.values.add_(self._changes.pop(fragment.name).to(fragment.values.dtype))
        super().on_update(fragments)

    def masked_weights(self) -> Collection[str]:
        # Of what belongs to an expert, a frozen correction bias stays as it is until it is cut.
        return [
            name
            for name, places in self._places.items()
            if any(member.masked or structure.layers for structure, member in places)
        ]

    # -- masks -----------------------------------------------------------------------------------------

    def _unit_sums(
        self, structure: PrunableGroup, member: CoupledSlice, fragment: Fragment, values: torch.Tensor
    ) -> torch.Tensor:
        if not structure.layers:
            return super()._unit_sums(structure, member, fragment, values)
        sums = torch.zeros(structure.units, dtype=torch.float64, device=values.device)
        sums[int(member.index)] = values.sum(dtype=torch.float64)
        return sums

    def _make_masks(self) -> None:
        super()._make_masks()
        for name, fragment in self._fragments.items():
            for structure, member in self._places[name]:
                kept = self.kept.get(structure.name)
                if structure.layers and member.scored and kept is not None:
                    keep = torch.full((fragment.numel,), bool((kept == member.index).any()))
                    self.masks[name] = bitmask.pack(keep.to(fragment.values.device))

    def _units_changed(self) -> None:
        for name, routing in self._routings.items():
            routing.exclude_all_but(self.kept.get(name))
        for narrowing, groups in self._around:
            of_size = [g for g in groups if self.structures[g].units == narrowing.experts]
            counts = {self.kept[g].numel() if g in self.kept else narrowing.experts for g in of_size}
            count = counts.pop() if len(counts) == 1 else narrowing.experts
            narrowing.keep(None if count == narrowing.experts else torch.arange(count))

    def _observe(self, model: nn.Module, structure: PrunableGroup) -> Iterator[Any]:
        yield from ()

    def detach(self) -> None:
        super().detach()
        for routing in self._routings.values():
            routing.exclude_all_but(None)
        self._routings, self._around = {}, []

    # -- after a shrink --------------------------------------------------------------------------------

    @property
    def _is_cut(self) -> bool:
        return self._density_of_cut is not None

    def drop_layers(self, names: Collection[str]) -> None:
        """The model is being cut: nothing is masked or chosen any more, and the load is that of what is left."""
        self._density_of_cut = super().metrics()["density"]
        self.shrinks, self.kept, self.load, self.masks = False, {}, {}, {}
        self._places, self._masked_names = {}, ()
        self.score.totals = {}

    @property
    def prunable_groups(self) -> Mapping[str, PrunableGroup]:  # type: ignore[override]
        return {} if self._is_cut else self.structures

    @property
    def is_lost_in_plain_weights(self) -> bool:
        return not self._is_cut and super().is_lost_in_plain_weights

    # -- state -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        load = {name: values.clone() for name, values in self.load.items()}
        before = {name: values.clone() for name, values in self.load_before.items()}
        return {**super().state_dict(), "load": load, "load_before": before, "lost": dict(self.lost)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.load = {name: values.clone() for name, values in state["load"].items()}
        self.load_before = {name: values.clone() for name, values in state["load_before"].items()}
        self.lost = dict(state["lost"])
        self._changes = {}
        super().load_state_dict(state)

    def metrics(self) -> dict[str, float]:
        """Beside `density`: `load_min`, `load_max`, tokens of the expert that saw fewest and most, of all mixtures, in
        multiples of an even share; `load_entropy`, mean over the mixtures, 1: even. The same with `_before`, as it was
        when the first experts went, and `tokens_of_removed`, the share of the tokens that went to those.
        """
        numbers = super().metrics() if self._density_of_cut is None else {"density": self._density_of_cut}
        now = [load[1] if self._is_cut else load[1][self._kept(name)] for name, load in self.load.items()]
        numbers |= _balance(now)
        numbers |= {f"{key}_before": value for key, value in _balance(self.load_before.values()).items()}
        if self.lost:
            numbers["tokens_of_removed"] = sum(self.lost.values()) / len(self.lost)
        return numbers

    def history(self, step: int) -> Mapping[str, float | torch.Tensor]:
        # After the cut the units that the plan counts from are gone.
        return self.metrics() if self._is_cut else super().history(step)

    def report_details(self) -> dict[str, Any]:
        """`token_shares`: by mixture, the share of the tokens of each expert that is left, since the last mask."""
        shares = {}
        for name, load in self.load.items():
            tokens = load[1] if self._is_cut else load[1][self._kept(name)]
            if float(tokens.sum()) > 0:
                shares[name] = [round(share, 6) for share in (tokens / tokens.sum()).tolist()]
        return {"token_shares": shares} if shares else {}

    def _kept(self, name: str) -> torch.Tensor:
        return self.kept.get(name, torch.arange(self.structures[name].units))


def _balance(loads: Iterable[torch.Tensor]) -> dict[str, float]:
    shares = [load / load.sum() for load in loads if load.numel() > 1 and float(load.sum()) > 0]
    if not shares:
        return {}
    entropies = [float(torch.special.entr(s).sum() / torch.tensor(float(s.numel())).log()) for s in shares]
    return {
        "load_min": min(float(s.min()) * s.numel() for s in shares),
        "load_max": max(float(s.max()) * s.numel() for s in shares),
        "load_entropy": sum(entropies) / len(entropies),
    }
