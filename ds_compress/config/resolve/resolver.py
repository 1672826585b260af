"""From regexes to weights: which block claims which, and everything that is wrong with the claims."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ds_compress.config.recipes.expand import telling
from ds_compress.config.report.plan import Plan
from ds_compress.config.resolve.pruned import with_pruned_marked
from ds_compress.config.resolve.slow_regexes import slow_regexes
from ds_compress.config.resolve.structures import resolve_structures
from ds_compress.config.schema.block import WeightBlock
from ds_compress.config.schema.compression_training import CompressionConfig, parse_config
from ds_compress.config.structure_targets import ShapesLeft, StructurePlan
from ds_compress.config.targets import Target, TechniquePlan, Weight
from ds_compress.errors import ConfigError, Problem, dotted, listed, shown
from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.experts import experts_per_token, moe_blocks, router_modules
from ds_compress.modelinfo.head import output_head
from ds_compress.modelinfo.inventory import (
    EVERY_LAYER,
    Entry,
    covering_patterns,
    entries_of,
    exact_pattern,
    few,
    nearest_names,
)
from ds_compress.modelinfo.kinds import MIXTURES, ModuleKind, is_layer, shape_of
from ds_compress.modelinfo.layers import find_layers

logger = logging.getLogger("ds_compress")
_LARGEST_SMALL_PART = 0.02
"""Of the weights that a regex reaches; in released models, what state-space mixers hold outside layers is far below."""


def resolve(model: nn.Module, config: CompressionConfig | Mapping[str, Any]) -> Plan:
    """What `config` (the block, parsed or not) means for `model`.

    A model that layer_reduction will still cut is planned as it will be afterwards.

    Raises:
        ConfigError: everything that is wrong with the block, or with what it asks of this model.
    """
    parsed = config if isinstance(config, CompressionConfig) else parse_config(config)
    with telling(parsed.applied_recipe):
        return _resolved(model, parsed)


def _resolved(model: nn.Module, parsed: CompressionConfig) -> Plan:
    problems: list[Problem] = []
    removed = _removed_layers(parsed, model, problems)
    entries = tuple(entry for entry in entries_of(model) if not f"{entry.name}.".startswith(removed))
    if slow := slow_regexes(parsed, entries):
        raise ConfigError(problems + slow)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    problems += _layer_reduction_problems(parsed, entries)
    techniques, blocks = {}, weight_blocks(parsed)
    for key, block in blocks.items():
        claims = TargetSelection(key, block, block.layer_kinds, entries)
        claims.make()
        if parsed.scheme is not None:
            claims.spare(output_head(model))
        groups = block.groups
        targets = tuple(
            _target(entry, group, groups[group].params, names) for entry, group in claims.in_order()
        )
        problems += [*claims.problems, *block.limits(targets)]
        techniques[key] = TechniquePlan(key, block.shared_parameters, targets)
    structures, structure_problems = resolve_structures(model, parsed, entries, removed)
    removing = [key for key, block in blocks.items() if block.removes_weights]
    techniques = with_pruned_marked(techniques, structures, removing)
    problems += structure_problems
    shapes = _shapes_after(techniques, structures)
    for block in blocks.values():
        problems += block.limits_beside(techniques, shapes)
    if problems:
        raise ConfigError(problems)
    weights = tuple(weight for weight in _weights_of(model) if not weight.name.startswith(removed))
    return Plan(parsed, techniques, weights, structures)


def weight_blocks(config: CompressionConfig) -> dict[str, WeightBlock]:
    """The enabled blocks that claim weights or inputs of layers, by key."""
    return {key: block for key, block in config.enabled_blocks().items() if isinstance(block, WeightBlock)}


def _shapes_after(
    techniques: Mapping[str, TechniquePlan], structures: Mapping[str, StructurePlan]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the claimed weights that structured pruning will make smaller, by name."""
    targets = (target for technique in techniques.values() for target in technique.targets)
    left = ShapesLeft(structures)
    after = {t.param_name: (t.shape, left.shape(t.param_name, t.shape)) for t in targets}
    return {name: shape for name, (before, shape) in after.items() if shape != before}


def _target(entry: Entry, group: str, params: Any, names: Mapping[int, str]) -> Target:
    assert entry.kind is not None
    weight = entry.weight
    return Target(
        entry.name,
        entry.module,
        entry.kind,
        names[id(weight)],
        weight,
        entry.shape,
        group,
        params,
        parameter=entry.parameter,
    )


def _are_small_parts(unsupported: list[Entry], layers: list[Entry]) -> bool:
    """Whether a regex that reaches `layers` means only these: beside them the others are small, and no layers.

    Such are the short convolutions and the states of state-space mixers.
    """
    if not unsupported or any(is_layer(entry.module) or entry.kind is not None for entry in unsupported):
        return False
    return _share(unsupported, layers) <= _LARGEST_SMALL_PART


def _share(parts: list[Entry], layers: list[Entry]) -> float:
    """Of `parts` in the weights of both."""
    small = sum(entry.own_weights for entry in parts)
    return small / max(1, small + sum(math.prod(entry.shape) for entry in layers))


def _weights_of(model: nn.Module) -> tuple[Weight, ...]:
    def owner(name: str) -> str:
        module = model.get_submodule(name.rpartition(".")[0])
        return getattr(type(module), "_ds_compress_base_class", type(module)).__name__

    users: dict[int, list[str]] = {}
    routing = {id(parameter) for router in router_modules(model) for parameter in router.parameters()}
    mixtures = {
        f"{block.experts_name}.{name}": (block.experts, experts_per_token(block) or block.experts)
        for block in moe_blocks(model)
        for name, _ in block.submodule(block.experts_name).named_parameters()
    }
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)

    return tuple(
        Weight(
            name,
            shape_of(parameter),
            parameter.element_size(),
            parameter.requires_grad,
            owner(name),
            tuple(users[id(parameter)]),
            id(parameter) in routing,
            *mixtures.get(name, (1, 1)),
        )
        for name, parameter in model.named_parameters()
        if not is_auxiliary(name)
    )


@dataclass
class TargetSelection:
    """The claims of one block's groups on the modules of a model, and what is wrong with them."""

    key: str
    block: Any
    kinds: frozenset[ModuleKind]
    entries: tuple[Entry, ...]
    problems: list[Problem] = field(default_factory=list)
    _groups_of: dict[Entry, list[str]] = field(default_factory=dict)
    _excluded: set[Entry] = field(default_factory=set)
    _small_parts: set[Entry] = field(default_factory=set)

    def make(self) -> None:
        self._exclude()
        for group, settings in self.block.groups.items():
            self._claim_group(group, settings.modules)
        self.problems += [*self._contested(), *self._tied()]
        self._say_what_is_left_out()

    def spare(self, head: nn.Module | None) -> None:
        """The output head is not claimed by a group for every layer, only by a regex that names it."""
        for entry, groups in list(self._groups_of.items()):
            patterns = [p for group in groups for p in self.block.groups[group].modules]
            if entry.module is head and EVERY_LAYER in patterns:
                del self._groups_of[entry]
                logger.info("%s: the output head %s stays as it is", self.key, entry.name)

    def in_order(self) -> Iterator[tuple[Entry, str]]:
        """(module, group that claims it), in model order."""
        return ((entry, self._groups_of[entry][0]) for entry in self.entries if entry in self._groups_of)

    def _exclude(self) -> None:
        for position, pattern in enumerate(self.block.shared_parameters.excluded_modules):
            reached = self._reached(pattern)
            self._excluded.update(reached)
            if not reached:
                path = dotted(self.key, "shared_parameters", "excluded_modules", position)
                self._nothing_reached(path, pattern, lambda entry: True, "a regex that reaches a module")

    def _claim_group(self, group: str, patterns: tuple[str, ...]) -> None:
        supported = set[Entry]()
        for position, pattern in enumerate(patterns):
            path = self._modules_path(group, position)
            reached = self._reached(pattern)
            layers = [entry for entry in reached if entry.kind in self.kinds]
            supported.update(layers)
            unsupported = self._unsupported(reached, pattern)
            if _are_small_parts(unsupported, layers):
                self._small_parts.update(unsupported)
            elif unsupported:
                self.problems.append(self._refused(path, pattern, unsupported, bool(layers)))
            elif not layers:
                allowed = f"a regex that reaches a {_kinds_in_words(self.kinds)}"
                self._nothing_reached(path, pattern, lambda entry: entry.kind in self.kinds, allowed)
        claimed = supported - self._excluded
        if supported and not claimed:
            self.problems.append(
                Problem(
                    dotted(self.key, "different_groups", group),
                    shown(list(patterns)),
                    "a group with at least one layer",
                    "all that it reaches is in excluded_modules: remove the group, or exclude less",
                )
            )
        for entry in claimed:
            self._groups_of.setdefault(entry, []).append(group)

    def _say_what_is_left_out(self) -> None:
        patterns = [pattern for settings in self.block.groups.values() for pattern in settings.modules]
        adapters = [
            entry
            for entry in self.entries
            if entry.kind in self.kinds
            and entry not in self._groups_of
            and any(entry.is_left_out_by(pattern) for pattern in patterns)
        ]
        routers = [
            entry
            for entry in self.entries
            if entry.is_router
            and entry not in self._groups_of
            and any(entry.is_reached_by(p) or p == EVERY_LAYER for p in patterns)
        ]
        if routers:
            logger.info(
                "%s: %d routers of experts stay as they are, such as %s; a regex that names only them reaches them",
                self.key,
                len(routers),
                routers[0].name,
            )
        if self._small_parts:
            parts = [entry for entry in self.entries if entry in self._small_parts]
            logger.info(
                "%s: %d small parts that are no layers stay as they are, such as %s (%s); of all that the regexes "
                "reach, they have %.1f %% of the weights",
                self.key,
                len(parts),
                parts[0].name or "the model itself",
                type(parts[0].module).__name__,
                100 * _share(parts, [*self._groups_of]),
            )
        if adapters:
            logger.info(
                "%s: %d layers of adapters stay as they are, such as %s; a regex that names only them reaches them",
                self.key,
                len(adapters),
                adapters[0].name,
            )

    def _reached(self, pattern: str) -> list[Entry]:
        """What the pattern reaches; routers only where it names nothing else that has a matrix."""
        reached = [entry for entry in self.entries if entry.is_reached_by(pattern)]
        if any(entry.kind is not None and not entry.is_router for entry in reached):
            return [entry for entry in reached if not entry.is_router]
        return reached

    def _modules_path(self, group: str, position: int) -> str:
        if not self.block.different_groups:
            return dotted(self.key)
        if not self.block.different_groups[group].given("modules"):
            return dotted(self.key, "different_groups", group)
        return dotted(self.key, "different_groups", group, "modules", position)

    def _unsupported(self, reached: list[Entry], pattern: str) -> list[Entry]:
        if pattern == EVERY_LAYER:
            unsupported = [entry for entry in reached if entry.kind is None]
        else:
            unsupported = [entry for entry in reached if entry.is_unsupported]
        foreign = MIXTURES - self.kinds
        unsupported += [entry for entry in reached if entry.kind in foreign]
        return [entry for entry in unsupported if entry not in self._excluded]

    def _refused(self, path: str, pattern: str, unsupported: list[Entry], reaches_others: bool) -> Problem:
        what = [
            f"{entry.name or 'the model itself'} ({type(entry.module).__name__})" for entry in unsupported
        ]
        excludes = [shown(regex) for regex in covering_patterns(entry.name for entry in unsupported)]
        hint = f"add {', '.join(excludes)} to shared_parameters.excluded_modules, or narrow the regex"
        if not reaches_others:
            # Without them the regex would reach nothing.
            names = (name for entry in self.entries if entry.kind in self.kinds for name in entry.names)
            near = nearest_names(pattern, names)
            hint = f"{self.key} cannot treat these: remove the regex" + (
                f"; the nearest layers that it can are {listed(near, 'and')}" if near else ""
            )
        return Problem(
            path,
            f"{shown(pattern)}, which reaches {few(what)}",
            f"layers of a supported kind: {_kinds_in_words(self.kinds)}",
            hint,
        )

    def _nothing_reached(
        self, path: str, pattern: str, counts: Callable[[Entry], bool], allowed: str
    ) -> None:
        names = (name for entry in self.entries if counts(entry) for name in entry.names)
        near = nearest_names(pattern, names)
        hint = f"the nearest names are {listed(near, 'and')}" if near else "this model has no such layer"
        self.problems.append(Problem(path, f"{shown(pattern)}, which reaches none", allowed, hint))

    def _contested(self) -> Iterator[Problem]:
        contested: dict[tuple[str, ...], list[Entry]] = {}
        for entry, groups in self._groups_of.items():
            if len(groups) > 1:
                contested.setdefault(tuple(groups), []).append(entry)
        for rivals, entries in contested.items():
            yield Problem(
                dotted(self.key, "different_groups", rivals[1], "modules"),
                f"{few(self._names(entries))}, also claimed by group {listed(rivals[:1])}",
                f"each layer in one group of {self.key}",
                f"narrow the regexes of {listed(rivals, 'or')}",
            )

    def _tied(self) -> Iterator[Problem]:
        if self.block.claims_inputs:
            return
        users: dict[int, list[Entry]] = {}
        for entry, _ in self.in_order():
            users.setdefault(id(entry.weight), []).append(entry)
        for entries in users.values():
            if len(entries) > 1:
                names = self._names(entries)
                yield Problem(
                    dotted(self.key, "different_groups", self._groups_of[entries[-1]][0], "modules"),
                    f"the modules {listed(names, 'and')}, which share one weight",
                    "one claim on each weight",
                    f"add {shown(exact_pattern(names[-1]))} (or all but one of the others) to "
                    "shared_parameters.excluded_modules",
                )

    def _names(self, entries: list[Entry]) -> list[str]:
        position = {entry: index for index, entry in enumerate(self.entries)}
        return [entry.name for entry in sorted(entries, key=position.__getitem__)]


def _kinds_in_words(kinds: frozenset[ModuleKind]) -> str:
    *names, last = (kind for kind in ModuleKind if kind in kinds - {ModuleKind.LINEAR_ACTIVATION} - MIXTURES)
    return f"{', '.join(names)} or {last}"


def _layer_reduction_problems(config: CompressionConfig, entries: tuple[Entry, ...]) -> Iterator[Problem]:
    reduction = config.layer_reduction
    if reduction is None or not reduction.enabled:
        return
    known = {name for entry in entries for name in entry.names}
    for index, name in enumerate(reduction.other_module_name or ()):
        if name not in known:
            near = nearest_names(name, known)
            yield Problem(
                dotted("layer_reduction", "other_module_name", index),
                shown(name),
                "the qualified name of a module of the model",
                f"the nearest names are {listed(near, 'and')}" if near else "",
            )


def _removed_layers(config: CompressionConfig, model: nn.Module, problems: list[Problem]) -> tuple[str, ...]:
    """Prefixes of the names that go when layer_reduction cuts a model that still has all its layers."""
    reduction = config.layer_reduction
    if reduction is None or not reduction.enabled:
        return ()
    try:
        name, layers = find_layers(model, reduction.module_name_prefix)
    except ConfigError as error:
        problems += error.problems
        return ()
    return tuple(f"{name}.{index}." for index in range(reduction.kept, len(layers)))
