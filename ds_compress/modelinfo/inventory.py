"""The modules of a model by name, and the names that come nearest to a pattern that reaches none."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ds_compress.modelinfo.adapters import hosts
from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.experts import fused_experts, router_modules
from ds_compress.modelinfo.kinds import ModuleKind, is_layer, kind_of, shape_of
from ds_compress.regexes import occurs

EVERY_LAYER = "*"
"""The pattern for all Linear, Conv1D and Conv2d layers and experts; also what an absent `modules` means."""
_NAMES_SUGGESTED = 3
_LONGEST_NAME = 200
"""No name of a module is longer; comparing takes the product of both lengths."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One module with every name that reaches it (a shared module has several); `name` is the first.

    `hosts`: for a module of an adapter, the names of the layer that it adapts (see `adapters`). `parameter`: the local
    name of its weight. A module of fused experts has an entry for each of its matrices, by the name of the parameter.
    `is_router`: whether it routes tokens to experts.
    """

    names: tuple[str, ...]
    module: nn.Module
    kind: ModuleKind | None
    hosts: tuple[str, ...] = ()
    parameter: str = "weight"
    is_router: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.parameter)

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.weight)

    @property
    def is_unsupported(self) -> bool:
        """Whether it owns a matrix, in a layout that nothing here understands."""
        return self.kind is None and self.own_weights > 0

    @property
    def own_weights(self) -> int:
        """How many numbers it holds itself in matrices and larger tensors."""
        own = (shape_of(parameter) for parameter in self.module.parameters(recurse=False))
        return sum(math.prod(shape) for shape in own if len(shape) >= 2)

    @property
    def is_layer(self) -> bool:
        return not self.is_router and (
            is_layer(self.module) or (self.kind is not None and self.kind.is_experts)
        )

    def is_reached_by(self, pattern: str) -> bool:
        """re.search on any of its names; "*" is for every Linear, Conv1D, Conv2d and matrix of experts.

        A module of an adapter is only reached by what does not reach the layer that it adapts.
        """
        return self._is_named_by(pattern) and not self.is_left_out_by(pattern)

    def is_left_out_by(self, pattern: str) -> bool:
        """Whether only its being part of an adapter saves it from `pattern`."""
        if not self.hosts or not self._is_named_by(pattern):
            return False
        return pattern == EVERY_LAYER or any(occurs(pattern, host) for host in self.hosts)

    def _is_named_by(self, pattern: str) -> bool:
        if pattern == EVERY_LAYER:
            return self.is_layer
        return any(occurs(pattern, name) for name in self.names)


def entries_of(model: nn.Module) -> tuple[Entry, ...]:
    """All modules of the model, itself included, in `named_modules` order; nothing auxiliary."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not is_auxiliary(name):
            names.setdefault(module, []).append(name)
    host, routers = hosts(model), router_modules(model)
    return tuple(
        entry
        for module, every in names.items()
        for entry in _entries(module, tuple(every), host.get(module, ()), module in routers)
    )


def _entries(
    module: nn.Module, names: tuple[str, ...], host: tuple[str, ...], is_router: bool
) -> Iterator[Entry]:
    experts = fused_experts(module)
    if experts is None:
        kind = kind_of(module)
        weight = module._parameters.get("weight")
        if kind is None and is_router and weight is not None and len(shape_of(weight)) == 2:
            kind = ModuleKind.ROUTER
        yield Entry(names, module, kind, host, is_router=is_router)
        return
    kind = ModuleKind.TRANSPOSED_EXPERTS if experts.transposed else ModuleKind.EXPERTS
    for parameter in experts.matrices:
        # "experts$" means both matrices.
        own = tuple(f"{name}.{parameter}".lstrip(".") for name in names)
        yield Entry((*own, *names), module, kind, host, parameter)


def nearest_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The three names most like the pattern; of names that differ in a layer number only, the first."""
    first_of_kind: dict[str, str] = {}
    for name in names:
        if name:
            first_of_kind.setdefault(re.sub(r"\d+", "#", name), name)
    wanted = _literal_text(pattern[:_LONGEST_NAME])
    ranked = sorted(first_of_kind.values(), key=lambda name: -_likeness(wanted, name))
    return ranked[:_NAMES_SUGGESTED]


def exact_pattern(name: str) -> str:
    """The regex that reaches the module `name` and nothing else."""
    return f"^{re.escape(name)}$"


def covering_patterns(names: Iterable[str]) -> list[str]:
    """Regexes that reach these modules, and those that differ from them in a layer number only; in their order."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return [
        exact_pattern(alike[0])
        if len(alike) == 1
        else "^" + r"\d+".join(re.escape(part) for part in kind.split("#")) + "$"
        for kind, alike in by_kind.items()
    ]


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = len(names) - _NAMES_SUGGESTED
    return ", ".join(names[:_NAMES_SUGGESTED]) + (f" and {more} more" if more > 0 else "")


def _literal_text(pattern: str) -> str:
    text = re.sub(r"\\[dw][+*]?|\[0-9\][+*]?", "0", pattern)
    return re.sub(r"[\\^$*+?()\[\]{}|]", "", text).strip(".").lower()


def _likeness(wanted: str, name: str) -> float:
    """Best match of `wanted` with any run of as many dotted parts of `name` as it has itself."""
    parts = name.lower().split(".")
    length = min(len(parts), wanted.count(".") + 1)
    runs = (".".join(parts[start : start + length]) for start in range(len(parts) - length + 1))
    return max(difflib.SequenceMatcher(None, wanted, run).ratio() for run in runs)
