"""Rows: the inner neurons of feed-forward blocks.

Unit u is row u of every matrix that widens (gate and up alike), its bias entries, and column u of the one that
narrows again. The activation between is elementwise, so that a neuron without an outgoing column is no neuron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ds_compress.modelinfo.experts import fused_experts, moe_blocks
from ds_compress.modelinfo.kinds import ModuleKind, shape_of
from ds_compress.structure.expert_rows import counted_alike, expert_row_groups
from ds_compress.structure.inventory import Inventory, Projection, exclude_tied, rows, unique
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup, Unsupported

_NAMED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("intermediate.dense",), "output.dense"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("Wi",), "Wo"),
    (("w1", "w3"), "w2"),
    (("w1",), "w2"),
    (("lin1",), "lin2"),
    (("fc1",), "fc2"),
    (("linear1",), "linear2"),
    (("fc_in",), "fc_out"),
    (("ffn",), "ffn_output"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
"""Below one parent: the projections that widen, and the one that narrows. The first row that is complete counts."""
_FUSED = ("gate_up_proj", "Wi", "wi", "linear1", "fc1")
"""Names of projections that may hold gate and up, one half behind the other."""
_EXPERTS = ("Experts", "MoE", "Moe", "SparseMoeBlock", "MoEBlock", "SparseMLP")
"""Ends of the names of classes that hold experts, which may be laid out in a way that is not known."""
_ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Mish,
    nn.Hardswish,
    nn.Dropout,
    nn.Identity,
)


@dataclass(frozen=True, eq=False)
class FeedForward:
    """Projections that widen to `units` neurons (`halves` rows of each per neuron), and the one that reads them."""

    parent: str
    widen: tuple[Projection, ...]
    narrow: Projection
    halves: int = 1

    @property
    def units(self) -> int:
        return self.narrow.inputs


def feed_forwards_of(inventory: Inventory, claimed: frozenset[str] = frozenset()) -> list[FeedForward]:
    """All blocks that are recognised, none of them made of `claimed` projections (those of attention)."""
    found: list[FeedForward] = []
    taken = set(claimed)
    experts = _unknown_experts(inventory)
    for parent in inventory.modules:
        if any(parent == name or parent.startswith(name + ".") for name in experts):
            continue
        for block in (*_by_name(inventory, parent), *_by_shape(inventory, parent, taken)):
            names = {projection.name for projection in (*block.widen, block.narrow)}
            if not names & taken:
                taken |= names
                found.append(block)
    return found


def _instead(inventory: Inventory, name: str) -> str:
    """What to do about experts that are neither fused in a known way nor a list beside a router."""
    prefix = f"{name}."
    fused = any(
        parameter.dim() > 2 or len(shape_of(parameter)) > 2
        for module_name, module in inventory.modules.items()
        if f"{module_name}.".startswith(prefix)
        for parameter in module.parameters(recurse=False)
    )
    if fused:
        return "they are fused into three-dimensional parameters in a way that is not known here"
    return "prune its weights with sparse_pruning instead"


def row_groups(
    inventory: Inventory, claimed: frozenset[str]
) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """The groups of all feed-forward blocks, and what looks like one but cannot be pruned."""
    blocks = feed_forwards_of(inventory, claimed)
    unsupported = [
        Unsupported(
            name,
            "a router chooses among its experts, of which each would have to lose as many neurons; "
            + _instead(inventory, name),
        )
        for name in _unknown_experts(inventory)
    ]
    unsupported += _wrapped(inventory)
    groups = expert_row_groups(inventory)
    known = claimed | {p.name for block in blocks for p in (*block.widen, block.narrow)}
    for block in blocks:
        between = _between(inventory, block, known)
        if between is None:
            groups.append(_group(inventory, block))
        else:
            reason = f"{between} has as many entries as it has neurons, and which is whose is not known"
            unsupported.append(Unsupported(block.widen[0].name, reason))
    order = {name: position for position, name in enumerate(inventory.modules)}
    groups.sort(key=lambda group: order[group.name])
    return exclude_tied(inventory, counted_alike(groups), unsupported)


def _between(inventory: Inventory, block: FeedForward, known: frozenset[str]) -> str | None:
    """A parameter of the block's parent that may have to be sliced, too: a convolution or norm of the neurons.

    known: projections that were recognised.
    """
    outer = {block.narrow.outputs, *(projection.inputs for projection in block.widen)}
    if block.units in outer or not block.parent:
        return None
    for name, module in inventory.modules.items():
        within = name.startswith(block.parent + ".") and name not in known
        if within and not any(
            "attention" in type(inventory.modules[above]).__name__.lower() for above in _above(name)
        ):
            for key, parameter in module.named_parameters(recurse=False):
                if block.units in shape_of(parameter):
                    return f"{name}.{key}"
    return None


def _above(name: str) -> list[str]:
    """The names of the module and of all that it is in."""
    parts = name.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _group(inventory: Inventory, block: FeedForward) -> PrunableGroup:
    units = block.units
    one = rows(units)
    index = torch.cat([one + half * units for half in range(block.halves)], dim=1)
    slices = [coupled for widen in block.widen for coupled in widen.writers(index, scored=True)]
    slices.append(block.narrow.reader(one))
    names = [projection.name for projection in (*block.widen, block.narrow)]
    others = [
        name
        for name, module in inventory.modules.items()
        if name.startswith(block.parent + ".") and module._parameters.get("weight") is not None
    ]
    whole = bool(block.parent) and set(others) <= set(names)
    return PrunableGroup(
        name=block.parent if whole else names[0],
        kind=GroupKind.ROW,
        modules=unique([block.parent, *names] if whole else names),
        units=units,
        slices=tuple(slices),
        observed=block.narrow.name,
        observed_index=one,
    )


def _by_name(inventory: Inventory, parent: str) -> Iterator[FeedForward]:
    for widen_names, narrow_name in _NAMED:
        widen = [inventory.projection(inventory.child(parent, name)) for name in widen_names]
        narrow = inventory.projection(inventory.child(parent, narrow_name))
        if narrow is None or any(projection is None for projection in widen):
            continue
        whole = tuple(projection for projection in widen if projection is not None)
        if all(projection.outputs == narrow.inputs for projection in whole):
            yield FeedForward(parent, whole, narrow)
            return
        if widen_names[0] in _FUSED and [p.outputs for p in whole] == [2 * narrow.inputs]:
            yield FeedForward(parent, whole, narrow, halves=2)
            return


def _by_shape(inventory: Inventory, parent: str, taken: set[str]) -> Iterator[FeedForward]:
    """Neighbours in a Sequential, or the only projections of a module, that widen and narrow back."""
    module = inventory.modules[parent]
    if isinstance(module, nn.Sequential):
        yield from _in_sequence(inventory, parent, module)
        return
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention)):
        return
    own = inventory.own_projections(parent)
    if any(projection.kind is ModuleKind.CONV2D for projection in own):
        return
    if len(own) not in (2, 3) or any(projection.name in taken for projection in own):
        return
    parameters = {f"{p.name}.{name}" for p in own for name in ("weight", "bias")}
    if any(inventory.child(parent, name) not in parameters for name, _ in module.named_parameters()):
        # A normalization between them, say, would depend on the removed neurons.
        return
    widen, narrow = own[:-1], own[-1]
    if narrow.inputs != narrow.outputs and all(
        p.outputs == narrow.inputs and p.inputs == narrow.outputs for p in widen
    ):
        yield FeedForward(parent, tuple(widen), narrow)


def _in_sequence(inventory: Inventory, parent: str, module: nn.Sequential) -> Iterator[FeedForward]:
    before: Projection | None = None
    for name, child in module.named_children():
        projection = inventory.projection(inventory.child(parent, name))
        if projection is not None and isinstance(child, nn.Linear):
            if before is not None and before.outputs == projection.inputs:
                yield FeedForward(parent, (before,), projection)
            before = projection
        elif not isinstance(child, _ELEMENTWISE):
            before = None


def _unknown_experts(inventory: Inventory) -> list[str]:
    """Modules that are called experts and are none of a mixture that `moe_blocks` finds, nor around one."""
    known = [block.name for block in moe_blocks(inventory.model)]
    known += [name for name, module in inventory.modules.items() if fused_experts(module) is not None]
    found: list[str] = []
    for name, module in inventory.modules.items():
        if not name or any(f"{a}.".startswith(f"{b}.") for k in known for a, b in ((name, k), (k, name))):
            continue
        is_experts = name.rpartition(".")[2] == "experts" or type(module).__name__.endswith(_EXPERTS)
        has_weights = next(module.parameters(), None) is not None
        if is_experts and has_weights and not any(name.startswith(other + ".") for other in found):
            found.append(name)
    return found


def _wrapped(inventory: Inventory) -> list[Unsupported]:
    """Blocks with the right names whose projections compute something else (adapters, parametrizations)."""
    unsupported = []
    for parent in inventory.modules:
        for widen, narrow in _NAMED:
            names = [inventory.child(parent, name) for name in (*widen, narrow)]
            strange = [name for name in names if inventory.projection(name) is None]
            if strange and all(
                name in inventory.modules and next(inventory.modules[name].parameters(), None) is not None
                for name in names
            ):
                cls = type(inventory.modules[strange[0]]).__name__
                reason = f"{strange[0]} is a {cls}, whose layout is not known here; merge or unwrap it first"
                unsupported.append(Unsupported(parent, reason))
                break
    return unsupported
