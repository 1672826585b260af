"""Layers: the units of a stack, each of which can be removed because its output has the shape of its input.

A layer whose class tree or parameter names differ from those of most others is no unit, because vanilla HF would build
one of the others in its place: T5's first block owns the position bias that its stack uses, ModernBERT's first layer
has no normalization before its attention.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from ds_compress.errors import ConfigError
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.modelinfo.layers import find_layers
from ds_compress.structure.inventory import Inventory
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup, Unsupported

_PATH = "compression_training.depth_pruning.shared_parameters.module_name_prefix"
_OF_HEADS = ("q_norm", "k_norm")
LAYER_LIST_NAMES = ("layers", "layer", "block", "blocks", "h")


def layer_groups(
    inventory: Inventory, prefix: str | None = None
) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """One group per stack: one in most models, two in encoder-decoders; `prefix`: the module of the only one.

    Raises:
        ConfigError: `prefix` names no ModuleList.
    """
    groups: list[PrunableGroup] = []
    unsupported: list[Unsupported] = []
    try:
        stacks = [find_layers(inventory.model, prefix, _PATH)] if prefix else list(stacks_of(inventory))
    except ConfigError as error:
        if prefix:
            raise
        why = "; ".join(problem.hint for problem in error.problems)
        key = "set shared_parameters.module_name_prefix"
        return [], [
            Unsupported(type(inventory.model).__name__, f"which ModuleList holds its layers: {why}; {key}")
        ]
    for name, layers in stacks:
        units = _alike(name, layers)
        if not _may_change_depth(inventory.model):
            unsupported.append(Unsupported(name, "its config does not allow another number of layers"))
        elif len(units) > 1:
            groups.append(PrunableGroup(name, GroupKind.LAYER, (name,), len(units), (), layers=units))
        else:
            unsupported.append(
                Unsupported(name, "its layers are all different: none can stand in for another")
            )
    return groups, unsupported


def stacks_of(inventory: Inventory) -> Iterator[tuple[str, nn.ModuleList]]:
    """Name and list of each stack of layers.

    Raises:
        ConfigError: which ModuleList it is, is not clear.
    """
    config = getattr(inventory.model, "config", None)
    two: list[tuple[str, nn.ModuleList]] = []
    for name, module in inventory.modules.items():
        *above, own = name.split(".")
        nested = any(name.startswith(other + ".") for other, _ in two)
        if (
            isinstance(module, nn.ModuleList)
            and own in LAYER_LIST_NAMES
            and {"encoder", "decoder"} & set(above)
            and not nested
        ):
            two.append((name, module))
    if getattr(config, "is_encoder_decoder", False) and two:
        yield from two
    else:
        yield find_layers(inventory.model)


def _may_change_depth(model: nn.Module) -> bool:
    config: Any = copy.copy(getattr(model, "config", None))
    if not hasattr(config, "num_hidden_layers"):
        return True
    try:
        config.num_hidden_layers = config.num_hidden_layers
    except NotImplementedError:
        return False
    return True


def _alike(name: str, layers: nn.ModuleList) -> tuple[str, ...]:
    signatures = [_signature(layer) for layer in layers]
    usual, count = Counter(signatures).most_common(1)[0]
    if count == 1 and len(layers) > 1:
        return ()
    return tuple(f"{name}.{index}" for index, own in enumerate(signatures) if own == usual)


def _signature(layer: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Classes and parameters, and the shapes of the parameters that tell the width of the residual stream.

    Those are the normalizations; the inside of layers may differ in width after an earlier pruning.
    """
    modules = dict(layer.named_modules())
    norms = {
        name
        for name, m in modules.items()
        if "norm" in type(m).__name__.lower() and name[-6:] not in _OF_HEADS
    }
    return tuple((name, type(module).__name__) for name, module in modules.items()) + tuple(
        (name, str(shape_of(parameter)) if not norms or name.rpartition(".")[0] in norms else "")
        for name, parameter in layer.named_parameters()
    )
