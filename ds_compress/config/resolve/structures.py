"""Which structures of a model each structured-pruning block claims, and how many of their units it keeps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.depth_pruning import DepthPruningShared
from ds_compress.config.schema.fields import Group
from ds_compress.config.schema.head_pruning import HeadPruningShared
from ds_compress.config.schema.structured_pruning import StructuredPruningConfig
from ds_compress.config.structure_targets import StructurePlan, StructureTarget, units_left
from ds_compress.errors import ConfigError, Problem, dotted, listed, shown
from ds_compress.modelinfo.inventory import EVERY_LAYER, Entry, exact_pattern, few, nearest_names
from ds_compress.modelinfo.kinds import is_layer
from ds_compress.regexes import occurs
from ds_compress.structure.find import FoundGroups, find_groups
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from ds_compress.structure.related import mask_only_group, stated_group

logger = logging.getLogger("ds_compress")

_OF_KIND = {
    GroupKind.ROW: "feed-forward block",
    GroupKind.HEAD: "attention layer",
    GroupKind.CHANNEL: "prunable Conv2d",
    GroupKind.LAYER: "stack of layers",
    GroupKind.HIDDEN: "hidden size that can be narrowed",
    GroupKind.EXPERT: "mixture of experts",
}
_LOOSE = (GroupKind.ROW, GroupKind.CHANNEL)
"""Kinds whose legacy blocks may zero the outputs of any layer, whoever reads them."""


def resolve_structures(
    model: nn.Module, config: CompressionConfig, entries: tuple[Entry, ...], removed: tuple[str, ...]
) -> tuple[dict[str, StructurePlan], list[Problem]]:
    """The plan of each enabled block, and everything that is wrong with what they ask of this model.

    `removed`: prefixes of the names that layer_reduction will take away before any of this happens.
    """
    plans: dict[str, StructurePlan] = {}
    problems: list[Problem] = []
    for key, block in config.enabled_blocks().items():
        if not isinstance(block, StructuredPruningConfig):
            continue
        kind = block.kind
        claims = GroupSelection(key, kind, block, model, entries, removed)
        claims.make()
        problems += claims.problems
        plans[key] = StructurePlan(key, kind, block.shared, tuple(claims.targets.values()))
    return plans, problems


class GroupSelection:
    """The claims of one block's groups on the structures of a model."""

    def __init__(
        self,
        key: str,
        kind: GroupKind,
        block: StructuredPruningConfig,
        model: nn.Module,
        entries: tuple[Entry, ...],
        removed: tuple[str, ...],
    ) -> None:
        self.key, self.kind, self.block, self.model = key, kind, block, model
        self.entries = entries
        self.problems: list[Problem] = []
        self.targets: dict[str, StructureTarget] = {}
        shared = block.shared
        self._num_heads = shared.num_heads if isinstance(shared, HeadPruningShared) else None
        try:
            stack = shared.module_name_prefix if isinstance(shared, DepthPruningShared) else None
            found = find_groups(model, kind, self._num_heads, stack=stack)
        except ConfigError as error:
            self.problems += error.problems
            found = FoundGroups((), ())
        except ImportError as error:
            self.problems.append(Problem(dotted(key), "a missing package", str(error)))
            found = FoundGroups((), ())
        here = [s for s in found.groups if not f"{s.name}.".startswith(removed)]
        self.found = FoundGroups(tuple(here), found.unsupported)
        self._excluded = {s.name for s in here if self._is_excluded(s)}

    def make(self) -> None:
        self._check_excluded()
        for group, settings in self.block.groups.items():
            ratio = settings.params.dense_ratio
            for structure in self._claimed_by(group, settings):
                rival = self.targets.get(structure.name)
                if rival is not None and rival.group != group:
                    self._contested(structure, rival.group, group)
                elif ratio is not None:
                    self.targets[structure.name] = StructureTarget(structure, group, ratio)
        self.problems += self._frozen()
        self.problems += self._other_number_of_heads()
        self.problems += self._unobserved()
        self.problems += self._too_few()

    # -- which structures ------------------------------------------------------------------------------

    def _claimed_by(self, group: str, settings: Group) -> Iterator[PrunableGroup]:
        for position, pattern in enumerate(settings.modules):
            related = () if settings.related_modules is None else settings.related_modules[position]
            if related:
                yield from self._stated(group, position, pattern, related)
                continue
            reached = [s for s in self.found.groups if _reaches(pattern, claim_names(s))]
            if reached:
                left = [s for s in reached if s.name not in self._excluded]
                yield from left
                if left:
                    self._warn_of_refusals(pattern)
                else:
                    self._all_excluded(group, pattern)
                continue
            loose = self._zero_only(group, position, pattern)
            yield from loose
            if not loose:
                self._nothing_reached(group, position, pattern)

    def _stated(
        self, group: str, position: int, pattern: str, related: Sequence[str]
    ) -> Iterator[PrunableGroup]:
        """What `modules` and `related_modules` say themselves: the j-th match of one goes with that of the other."""
        modules = self._layers_reached(pattern)
        if not modules:
            self._nothing_reached(group, position, pattern)
            return
        readers: list[list[str]] = [[] for _ in modules]
        for index, regex in enumerate(related):
            matches = self._layers_reached(regex)
            share = len(matches) // len(modules)
            if not matches or share * len(modules) != len(matches):
                self.problems.append(
                    Problem(
                        dotted(self.key, "different_groups", group, "related_modules", position, index),
                        f"{shown(regex)}, which reaches {len(matches)} layers",
                        f"a multiple of the {len(modules)} layers that {shown(pattern)} reaches",
                        "or leave related_modules out: they are found from the model",
                    )
                )
                return
            for j, names in enumerate(readers):
                names += matches[j * share : (j + 1) * share]
        for name, names in zip(modules, readers, strict=True):
            yield self._known(name, names) or self._explicit(group, position, name, names)

    def _known(self, name: str, related: Sequence[str]) -> PrunableGroup | None:
        """The structure that was found with exactly these layers: it also knows what the config must say."""
        wanted = {name, *related}
        for structure in self.found.groups:
            layers = {member.tensor.rpartition(".")[0] for member in structure.slices}
            if wanted == {layer for layer in layers if is_layer(self.model.get_submodule(layer))}:
                return structure
        return None

    def _explicit(self, group: str, position: int, name: str, related: Sequence[str]) -> PrunableGroup:
        try:
            return stated_group(self.model, self.kind, [name], related, self._num_heads)
        except ValueError as error:
            path = dotted(self.key, "different_groups", group, "related_modules", position)
            self.problems.append(
                Problem(path, listed([name, *related]), "layers that fit together", str(error))
            )
            return PrunableGroup(name, self.kind, (name,), 0, ())

    def _zero_only(self, group: str, position: int, pattern: str) -> list[PrunableGroup]:
        if pattern == EVERY_LAYER or not (self.kind in _LOOSE or self._num_heads):
            return []
        structures = []
        for name in self._layers_reached(pattern):
            try:
                structures.append(mask_only_group(self.model, self.kind, name, self._num_heads))
            except ValueError as error:
                self.problems.append(
                    Problem(
                        self._modules_path(group, position),
                        f"{shown(pattern)}, which reaches {name}",
                        f"a regex that reaches {_OF_KIND[self.kind]}s, or layers whose outputs can be zeroed",
                        f"{error}: {self._reason(name) or 'narrow the regex'}",
                    )
                )
                return [PrunableGroup(name, self.kind, (name,), 0, ())]
        return structures

    def _reason(self, module: str) -> str:
        """Why what stands around `module` was not understood, if that is known."""
        around = (
            refusal for refusal in self.found.unsupported if f"{module}.".startswith(f"{refusal.module}.")
        )
        return next((refusal.reason for refusal in around), "")

    def _warn_of_refusals(self, pattern: str) -> None:
        """What the regex reaches too and what stays whole: the rest is pruned, so this is no error."""
        refused = [
            r
            for r in self.found.unsupported
            if _reaches(pattern, [r.module]) and not self._leaves_out(r.module)
        ]
        if refused:
            logger.warning(
                "%s: not pruned: %s. %s", self.key, few([r.module for r in refused]), refused[0].reason
            )

    def _leaves_out(self, module: str) -> bool:
        return any(_reaches(regex, [module]) for regex in self.block.shared.excluded_modules)

    def _all_excluded(self, group: str, pattern: str) -> None:
        path = (
            dotted(self.key, "different_groups", group)
            if group in self.block.different_groups
            else dotted(self.key)
        )
        hint = "all that it reaches is in excluded_modules: remove the group, or exclude less"
        allowed = f"a group with at least one {_OF_KIND[self.kind]}"
        self.problems.append(Problem(path, shown(pattern), allowed, hint))

    def _check_excluded(self) -> None:
        """An excluded_modules that reaches no module is a slip, as a regex of modules that reaches none."""
        known = [name for entry in self.entries for name in entry.names]
        known += [name for structure in self.found.groups for name in structure.modules]
        for position, regex in enumerate(self.block.shared.excluded_modules):
            if not _reaches(regex, known):
                path = dotted(self.key, "shared_parameters", "excluded_modules", position)
                near = nearest_names(regex, known)
                hint = f"the nearest names are {listed(near, 'and')}" if near else ""
                got = f"{shown(regex)}, which reaches none"
                self.problems.append(Problem(path, got, "a regex that reaches a module", hint))

    def _layers_reached(self, pattern: str) -> list[str]:
        excluded = self.block.shared.excluded_modules
        return [
            entry.name
            for entry in self.entries
            if (entry.is_layer or (pattern != EVERY_LAYER and _has_entries(entry.module)))
            and entry.is_reached_by(pattern)
            and not any(entry.is_reached_by(regex) for regex in excluded)
        ]

    def _is_excluded(self, structure: PrunableGroup) -> bool:
        return any(_reaches(regex, structure.modules) for regex in self.block.shared.excluded_modules)

    # -- what is wrong ---------------------------------------------------------------------------------

    def _nothing_reached(self, group: str, position: int, pattern: str) -> None:
        what = _OF_KIND[self.kind]
        path = self._modules_path(group, position)
        if self.problems and not self.found.groups:
            return
        if not self.found.groups:
            reasons = [f"{refusal.module}: {refusal.reason}" for refusal in self.found.unsupported]
            why = "; ".join(dict.fromkeys(reasons[:3])) or f"no {what} was recognised in this model"
            self.problems.append(
                Problem(path, f"a {type(self.model).__name__}", f"a model with a {what}", why)
            )
            return
        near = nearest_names(pattern, (name for s in self.found.groups for name in claim_names(s)))
        self.problems.append(
            Problem(
                path,
                f"{shown(pattern)}, which reaches none",
                f"a regex that reaches a {what}",
                f"the nearest names are {listed(near, 'and')}",
            )
        )

    def _modules_path(self, group: str, position: int) -> str:
        if group not in self.block.different_groups:
            return dotted(self.key)
        return dotted(self.key, "different_groups", group, "modules", position)

    def _contested(self, structure: PrunableGroup, first: str, second: str) -> None:
        self.problems.append(
            Problem(
                dotted(self.key, "different_groups", second, "modules"),
                f"{structure.name}, also claimed by group {listed([first])}",
                f"each structure in one group of {self.key}",
                f"narrow the regexes of {listed([first, second], 'or')}",
            )
        )

    def _frozen(self) -> Iterator[Problem]:
        parameters = dict(self.model.named_parameters())
        frozen = [
            target.structure.name
            for target in self.targets.values()
            if self.kind in (GroupKind.ROW, GroupKind.HEAD, GroupKind.CHANNEL)
            and any(m.masked and _is_frozen(parameters.get(m.tensor)) for m in target.structure.slices)
        ]
        if frozen:
            yield Problem(
                dotted(self.key),
                f"{few(frozen)}, of which some weights are frozen (requires_grad is False)",
                "structures of which every weight trains",
                f"unfreeze them, or add {shown(exact_pattern(frozen[0]))} to shared_parameters.excluded_modules",
            )

    def _too_few(self) -> Iterator[Problem]:
        """Targets that would be left with fewer units than the model needs to run."""
        for target in self.targets.values():
            structure, left = (
                target.structure,
                units_left(target.structure, target.dense_ratio, self.block.shared),
            )
            if left < structure.fewest:
                what = f"{target.dense_ratio}, which leaves {left} of {structure.units} in {structure.modules[0]}"
                hint = f"its router chooses among that many {structure.kind}s for each token"
                if structure.parts > 1:
                    hint += f", in {structure.parts} groups"
                lowest = f"a fraction that leaves {structure.fewest} or more"
                yield Problem(dotted(self.key), what, lowest, hint)
                return

    def _other_number_of_heads(self) -> Iterator[Problem]:
        for target in self.targets.values():
            if self._num_heads and target.structure.removable and self._num_heads % target.structure.units:
                yield Problem(
                    dotted(self.key, "shared_parameters", "num_heads"),
                    str(self._num_heads),
                    f"{target.structure.units}, the heads of {target.structure.name}",
                    "remove it: the number of heads is read from the model",
                )
                return

    def _unobserved(self) -> Iterator[Problem]:
        """Methods whose scores come from what a module is called with, for units that no module is called with."""
        method, structures = self.block.shared.method, [target.structure for target in self.targets.values()]
        path = dotted(self.key, "shared_parameters", "method")
        lists = [structure for structure in structures if self.kind is GroupKind.EXPERT and structure.layers]
        if lists and method in ("reap", "frequency"):
            yield Problem(
                path,
                shown(method),
                '"l2", "taylor" or "random" for experts in a ModuleList',
                f"which tokens {lists[0].layers[0]} is used for, and with what weight, shows in fused experts only",
            )
        fused = [structure.name for structure in structures if structure.parts > 1]
        if fused and method == "activation":
            yield Problem(
                path,
                shown(method),
                "a method that needs weights and gradients only: l1, l2, topk, taylor or random",
                f"{few(fused)}: what is between the matrices of fused experts is the input of no module; taylor is the "
                f"nearest, or add {shown(exact_pattern(fused[0]))} to shared_parameters.excluded_modules",
            )


def claim_names(structure: PrunableGroup) -> list[str]:
    """The modules by which a regex may reach it: not the layers that only read rows or channels."""
    if structure.kind not in _LOOSE:
        return list(structure.modules)
    owners = {member.tensor.rpartition(".")[0] for member in structure.slices}
    writers = {member.tensor.rpartition(".")[0] for member in structure.slices if member.scored}
    return [name for name in structure.modules if name in writers or name not in owners]


def _has_entries(module: nn.Module) -> bool:
    """Whether channels can be cut out of it: a weight, or the statistics of a normalization without one."""
    return module._parameters.get("weight") is not None or module._buffers.get("running_mean") is not None


def _reaches(pattern: str, names: Sequence[str]) -> bool:
    return pattern == EVERY_LAYER or any(occurs(pattern, name) for name in names)


def _is_frozen(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and not parameter.requires_grad
