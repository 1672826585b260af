"""Mixture-of-experts blocks: where the matrices of the experts are, and what routes tokens to them.

Found from the interface, not from names of classes. transformers 5 fuses the experts of a layer into one module with
three-dimensional parameters, `gate_up_proj` and `down_proj`, one slice per expert; older models and code on the hub
have an nn.ModuleList of experts. Beside either lies a router, whose weight has a row for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.kinds import shape_of

_UP = ("gate_up_proj", "up_proj")
_DOWN = "down_proj"
_CHOSEN = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_REMOVED, _EXCLUDED = "_ds_compress_removed_to", "_ds_compress_excluded_to"
"""Attributes of a router whose mixture has fewer experts than it was made with."""
_CONCATENATED = "is_concatenated"
_INTERFACE = "experts_interface"
"""What the decorator's forward looks an implementation up in, as its closure calls it."""
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "_apply_gate")


@dataclass(frozen=True)
class FusedExperts:
    """How a module of fused experts lays out its parameters.

    experts, hidden, intermediate: sizes. up: "gate_up_proj", or "up_proj" of experts without a gate. transposed: the
    matrices are [experts, inputs, outputs], else [experts, outputs, inputs]. interleaved: the outputs of gate_up_proj
    are gate 0, up 0, gate 1, up 1, ..., else first all of the gate. biases: names of the parameters [experts, outputs]
    that the module has, `up` + "_bias" and "down_proj_bias".
    """

    experts: int
    hidden: int
    intermediate: int
    up: str
    transposed: bool
    interleaved: bool
    biases: tuple[str, ...]

    @property
    def down(self) -> str:
        return _DOWN

    @property
    def matrices(self) -> tuple[str, str]:
        return self.up, self.down

    @property
    def has_gate(self) -> bool:
        return self.up == _UP[0]


@dataclass(frozen=True, eq=False)
class MoeBlock:
    """One mixture of experts of a model.

    name, module: the block that holds router and experts. experts_name: of the module of fused experts, or of the
    ModuleList. fused: None for a ModuleList. experts: how many. routers: names of the modules whose `weight` is
    [experts, hidden], and of gates of shared experts, [1, hidden].
    """

    name: str
    module: nn.Module
    experts_name: str
    fused: FusedExperts | None
    experts: int
    routers: tuple[str, ...]

    @property
    def full_routers(self) -> list[str]:
        """Those with a row for each expert: not the gates of shared ones."""
        weights = {name: self.submodule(name).get_parameter("weight") for name in self.routers}
        return [name for name, weight in weights.items() if shape_of(weight)[0] == self.experts]

    def submodule(self, name: str) -> nn.Module:
        """A module inside of the block by its name in the model."""
        return self.module.get_submodule(self._inside(name))

    def routing_modules(self) -> Iterator[nn.Module]:
        """The block itself and its routers, with all that is in and around these."""
        yield self.module
        for router in self.full_routers:
            yield from self.module.get_submodule(self._inside(router).partition(".")[0]).modules()

    def _inside(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.") if self.name else name


def original_experts(router: nn.Module) -> torch.Tensor | None:
    """int64 (rows,): which expert each row stood for before any was removed or excluded; None: none was."""
    removed: torch.Tensor | None = vars(router).get(_REMOVED)
    excluded: torch.Tensor | None = vars(router).get(_EXCLUDED)
    return removed if excluded is None else excluded if removed is None else removed[excluded]


def remember_removed(router: nn.Module, kept: torch.Tensor) -> None:
    """The router now has the rows of the experts `kept` (int64, increasing) only."""
    rows = vars(router).pop(_REMOVED, None)
    vars(router).pop(_EXCLUDED, None)
    vars(router)[_REMOVED] = kept if rows is None else rows[kept]


def remember_excluded(router: nn.Module, kept: torch.Tensor | None) -> None:
    """The router runs with the rows of the experts `kept` only; None: with all that it has."""
    if kept is None:
        vars(router).pop(_EXCLUDED, None)
    else:
        vars(router)[_EXCLUDED] = kept


def experts_per_token(block: MoeBlock) -> int | None:
    """How many experts see a token, from an attribute or a config of the block; None where neither says so."""
    own = number_of_routing(block, _CHOSEN)
    if own is not None:
        return own
    configs = (getattr(module, "config", None) for module in block.module.modules())
    found: Iterator[Any] = (getattr(config, name, None) for config in configs for name in _CHOSEN)
    return next((value for value in found if type(value) is int), None)


def number_of_routing(block: MoeBlock, names: Sequence[str]) -> int | None:
    """The first integer attribute of one of these names, of the block or its routers."""
    for module in block.routing_modules():
        for name in names:
            value = vars(module).get(name)
            if type(value) is int:
                return value
    return None


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """The layout of a module that holds the matrices of all experts of a layer; None for any other module."""
    shapes = {
        name: shape_of(parameter)
        for name, parameter in module._parameters.items()
        if isinstance(parameter, nn.Parameter)
    }
    up = next((name for name in _UP if len(shapes.get(name, ())) == 3), None)
    if up is None or len(shapes.get(_DOWN, ())) != 3:
        return None
    transposed = _is_transposed(module, shapes[up], shapes[_DOWN], 2 if up == _UP[0] else 1)
    if transposed is None:
        return None
    experts, first, second = shapes[_DOWN]
    intermediate, hidden = (first, second) if transposed else (second, first)
    biases = tuple(name for name in (f"{up}_bias", f"{_DOWN}_bias") if name in shapes)
    interleaved = up == _UP[0] and not getattr(module, _CONCATENATED, True)
    return FusedExperts(experts, hidden, intermediate, up, transposed, interleaved, biases)


def _is_transposed(module: nn.Module, up: tuple[int, ...], down: tuple[int, ...], widths: int) -> bool | None:
    """None: the shapes are not those of experts. widths: outputs of `up` per entry of the intermediate state."""
    by_layout = {
        False: up == (down[0], widths * down[2], down[1]),
        True: up == (down[0], down[2], widths * down[1]),
    }
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool) and by_layout[said]:
        return said
    # Without a gate and with as many hidden as intermediate entries both fit: the usual one.
    return next((layout for layout, fits in by_layout.items() if fits), None)


def follows_registry(module: nn.Module) -> bool:
    """Whether transformers' registry of experts implementations may replace the forward of this module: its class is
    decorated with `use_experts_implementation`, and no class below has another forward, nor the module itself."""
    cls = getattr(type(module), "_ds_compress_base_class", type(module))
    dispatches = _INTERFACE in getattr(getattr(cls.forward, "__code__", None), "co_freevars", ())
    return dispatches and "forward" not in vars(module) and all(hasattr(module, flag) for flag in _FLAGS)


def moe_blocks(model: nn.Module) -> Iterator[MoeBlock]:
    """The mixtures of experts of a model, in model order. Experts without a router beside them are none."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        fused = fused_experts(module)
        if fused is None and not _is_list_of_experts(module):
            continue
        experts = fused.experts if fused else len(module)
        parent = name.rpartition(".")[0]
        routers = tuple(_routers(modules[parent], parent, module, experts))
        if name and routers:
            yield MoeBlock(parent, modules[parent], name, fused, experts, routers)


def router_modules(model: nn.Module) -> frozenset[nn.Module]:
    """Modules that decide which experts see a token, and how much of each goes on, with all that is inside them."""
    children = (
        block.module.get_submodule(block._inside(name).partition(".")[0])
        for block in moe_blocks(model)
        for name in block.routers
    )
    return frozenset(module for child in children for module in child.modules())


def _is_list_of_experts(module: nn.Module) -> bool:
    """Whether it may be: a list of modules of one class, each with two matrices or more."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(item) for item in module}) > 1:
        return False
    return len(_rows_of_weights(module[0])) > 1


def _routers(parent: nn.Module, name: str, experts: nn.Module, count: int) -> Iterator[str]:
    """Children of the block with one matrix, of a row per expert or one row; the first kind has to be there."""
    found = {}
    for key, child in parent.named_children():
        rows = {} if child is experts else _rows_of_weights(child)
        if len(rows) == 1:
            below, count_of_rows = rows.popitem()
            found[".".join(part for part in (name, key, below) if part)] = count_of_rows
    if count in found.values():
        yield from (router for router, rows in found.items() if rows in (1, count))


def _rows_of_weights(module: nn.Module) -> dict[str, int]:
    """{name of the module: rows of its `weight`}, of those that have a matrix, `module` itself included."""
    weights = ((name, child._parameters.get("weight")) for name, child in module.named_modules())
    return {
        name: shape_of(weight)[0]
        for name, weight in weights
        if isinstance(weight, nn.Parameter) and len(shape_of(weight)) == 2
    }
