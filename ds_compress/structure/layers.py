"""Layers: the units of a stack, each of which can be left out because it takes what it gives.

A layer whose class tree or parameter names differ from those of most others is no unit, because stock code would put
one of the others in its place: T5's first block owns the position bias that all of its stack use, ModernBERT's
first layer has no normalization before its attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from ds_compress.config.errors import ConfigError
from ds_compress.config.layers import find_layers
from ds_compress.config.modules import shape_of
from ds_compress.structure.inventory import Inventory
from ds_compress.structure.structure import Refusal, Structure, StructureKind

_LIST_NAMES = ("layers", "layer", "block", "blocks", "h")


def layer_structures(inventory: Inventory) -> tuple[list[Structure], list[Refusal]]:
    """One structure per stack: one in most models, two in encoder-decoders."""
    structures: list[Structure] = []
    refusals: list[Refusal] = []
    config = getattr(inventory.model, "config", None)
    try:
        stacks = list(stacks_of(inventory))
    except ConfigError as error:
        why = "; ".join(problem.hint for problem in error.problems)
        return [], [Refusal(type(inventory.model).__name__, f"which ModuleList holds its layers: {why}")]
    for name, layers in stacks:
        # A stage of a convolutional network, say, changes the width: without a config nothing else tells.
        units = _alike(name, layers, with_shapes=not hasattr(config, "num_hidden_layers"))
        if len(units) > 1:
            structures.append(Structure(name, StructureKind.LAYER, (name,), len(units), (), layers=units))
        else:
            refusals.append(Refusal(name, "its layers are all different: none can stand in for another"))
    return structures, refusals


def stacks_of(inventory: Inventory) -> Iterator[tuple[str, nn.ModuleList]]:
    """Name and list of each stack of layers.

    Raises:
        ConfigError: which ModuleList it is, is not clear.
    """
    config = getattr(inventory.model, "config", None)
    two = [
        (name, module)
        for name, module in inventory.modules.items()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and name.rpartition(".")[2] in _LIST_NAMES
        and name.split(".")[-2:-1] in (["encoder"], ["decoder"])
    ]
    if getattr(config, "is_encoder_decoder", False) and two:
        yield from two
    else:
        yield find_layers(inventory.model)


def _alike(name: str, layers: nn.ModuleList, with_shapes: bool) -> tuple[str, ...]:
    signatures = [_signature(layer, with_shapes) for layer in layers]
    usual, count = Counter(signatures).most_common(1)[0]
    if count == 1 and len(layers) > 1:
        return ()
    return tuple(f"{name}.{index}" for index, own in enumerate(signatures) if own == usual)


def _signature(layer: nn.Module, with_shapes: bool) -> tuple[tuple[str, ...], ...]:
    modules = tuple((name, type(module).__name__) for name, module in layer.named_modules())
    parameters = tuple(
        (name, str(shape_of(parameter)) if with_shapes else "")
        for name, parameter in layer.named_parameters()
    )
    return modules + parameters
