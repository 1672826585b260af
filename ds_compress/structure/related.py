"""Prunable groups that the JSON states itself: `modules` and `related_modules` of the legacy schema."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ds_compress.modelinfo.kinds import ModuleKind, shape_of
from ds_compress.structure.inventory import Inventory, Projection, rows, unique
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup

_VECTORS = ("weight", "bias", "running_mean", "running_var")


def stated_group(
    model: nn.Module,
    kind: GroupKind,
    module_names: Sequence[str],
    related_names: Sequence[str],
    num_heads: int | None = None,
) -> PrunableGroup:
    """The group of the units of `module_names`, which all `related_names` read.

    ROW and CHANNEL: units are the outputs of the modules; each related module loses the same inputs (a Linear
    behind a flattened map the whole width of a channel), a related normalization the same entries. HEAD: units are
    `num_heads` equal chunks of the input columns of the output projection(s) `module_names`; the related
    modules (queries, keys, values) lose the same outputs.

    Raises:
        ValueError: sizes do not match; the message names them.
    """
    inventory = Inventory(model)
    writers = [_projection(inventory, name) for name in module_names]
    if kind is GroupKind.HEAD:
        slices, units, observed, index = _heads(inventory, writers, related_names, num_heads)
    elif kind in (GroupKind.ROW, GroupKind.CHANNEL):
        slices, units, observed, index = _outputs(inventory, writers, related_names)
    else:
        raise ValueError(f"related_modules have no meaning for {kind.value} pruning")
    return PrunableGroup(
        name=writers[0].name,
        kind=kind,
        modules=unique([*module_names, *related_names]),
        units=units,
        slices=tuple(slices),
        observed=observed,
        observed_index=index,
    )


def mask_only_group(
    model: nn.Module, kind: GroupKind, module_name: str, num_heads: int | None = None
) -> PrunableGroup:
    """A group of one module whose units are zeroed and not removed, because what reads or feeds them is not known.

    Raises:
        ValueError: the module has no such units, or `num_heads` chunks do not divide it.
    """
    inventory = Inventory(model)
    projection = _projection(inventory, module_name)
    observed, index = None, None
    if kind is GroupKind.HEAD:
        units, width = _chunks(projection, num_heads)
        index = rows(units, width)
        slices = [projection.reader(index, scored=True)]
        observed = projection.name
    else:
        units = projection.outputs
        slices = projection.writers(rows(units), scored=True)
    return PrunableGroup(
        name=module_name,
        kind=kind,
        modules=(module_name,),
        units=units,
        slices=tuple(slices),
        observed=observed,
        observed_index=index,
        removable=False,
    )


_Parts = tuple[list[CoupledSlice], int, str | None, torch.Tensor | None]


def _outputs(inventory: Inventory, writers: Sequence[Projection], related: Sequence[str]) -> _Parts:
    units = writers[0].outputs
    for writer in writers[1:]:
        if writer.outputs != units:
            raise ValueError(
                f"{writer.name} has {writer.outputs} outputs, {writers[0].name} {units}: they cannot lose the same ones"
            )
    slices = [coupled for writer in writers for coupled in writer.writers(rows(units), scored=True)]
    observed, index = None, None
    for name in related:
        reader = inventory.projection(name)
        if reader is None:
            slices += _vectors(inventory, name, units)
            continue
        if reader.inputs % units:
            raise ValueError(
                f"{name} reads {reader.inputs} inputs, which {units} outputs of {writers[0].name} do not divide"
            )
        width = reader.inputs // units
        if width > 1 and reader.kind is not ModuleKind.LINEAR:
            raise ValueError(f"{name} reads {reader.inputs} inputs, {writers[0].name} has {units} outputs")
        slices.append(reader.reader(rows(units, width)))
        if observed is None:
            observed, index = name, rows(units, width)
    return slices, units, observed, index


def _heads(
    inventory: Inventory, outputs: Sequence[Projection], related: Sequence[str], num_heads: int | None
) -> _Parts:
    units, width = _chunks(outputs[0], num_heads)
    slices = []
    for output in outputs:
        if output.inputs != outputs[0].inputs:
            raise ValueError(
                f"{output.name} reads {output.inputs} inputs, {outputs[0].name} {outputs[0].inputs}: other heads"
            )
        slices.append(output.reader(rows(units, width), scored=True))
    for name in related:
        projection = _projection(inventory, name)
        if projection.outputs % units:
            raise ValueError(f"{name} has {projection.outputs} outputs, which {units} heads do not divide")
        slices += projection.writers(rows(units, projection.outputs // units))
    return slices, units, outputs[0].name, rows(units, width)


def _chunks(projection: Projection, num_heads: int | None) -> tuple[int, int]:
    if num_heads is None:
        raise ValueError(f"how many heads {projection.name} reads is not known; say it with num_heads")
    if projection.inputs % num_heads:
        raise ValueError(
            f"{projection.name} reads {projection.inputs} inputs, which {num_heads} heads do not divide"
        )
    return num_heads, projection.inputs // num_heads


def _vectors(inventory: Inventory, name: str, units: int) -> list[CoupledSlice]:
    module = inventory.modules.get(name)
    if module is None:
        raise ValueError(f"there is no module {name}")
    slices = []
    for key in _VECTORS:
        tensor = inventory.tensor(name, key)
        if tensor is None:
            continue
        own = module._parameters.get(key)
        shape = shape_of(own) if own is not None else tuple(module.get_buffer(key).shape)
        if shape != (units,):
            raise ValueError(f"{name}.{key} has the shape {list(shape)}, not [{units}]")
        # A zero channel must still be zero behind its normalization; the statistics are only sliced.
        slices.append(CoupledSlice(tensor, 0, rows(units), masked=key in ("weight", "bias")))
    if not slices:
        raise ValueError(f"{name} is a {type(module).__name__}: it has no inputs that could be cut")
    return slices


def _projection(inventory: Inventory, name: str) -> Projection:
    projection = inventory.projection(name)
    if projection is None:
        module = inventory.modules.get(name)
        what = "not a module" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"{name} is {what}, not a Linear, Conv1D or Conv2d")
    return projection
