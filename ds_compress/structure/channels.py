"""Channels of convolutions, and which of them are coupled.

Torch-Pruning's dependency graph (Fang et al. 2023, "DepGraph") tells which tensors lose entries with a channel: the
normalization behind it, the inputs of the next layers, and all that is added to it. It takes every operation that it
does not know for elementwise. Each group is therefore tested on a copy with random weights: it is used only if the
network without some of its channels computes what the network with these channels at zero does.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.example_inputs import Inputs, example_inputs_of, tensors_of
from ds_compress.structure.inventory import Inventory, exclude_tied, unique
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup, Unsupported
from ds_compress.structure.pruning_plan import PruningPlan

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_TOLERANCE = 1e-8
"""Of the trial, relative, in fp64."""


def channel_groups(
    inventory: Inventory, inputs: Mapping[str, Any] | None
) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """One group per set of convolutions that share their output channels, in the order of the model.

    Raises:
        ImportError: Torch-Pruning is not installed.
    """
    model = inventory.model
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return [], []
    graphs = _torch_pruning()
    if any(shape_of(parameter) != tuple(parameter.shape) for parameter in model.parameters()):
        reason = (
            "its weights are partitioned (zero.Init), so that it cannot be run on an example; name the layers that are "
            "coupled with modules and related_modules, or build it without zero.Init"
        )
        return [], [Unsupported(type(model).__name__, reason)]
    twin = _random_twin(model)
    try:
        example = example_inputs_of(twin, inputs)
    except ValueError as error:
        return [], [Unsupported(type(model).__name__, str(error))]
    groups, unsupported = _Groups(inventory, twin, example, graphs).read()
    exact, inexact = _tried(twin, example, groups)
    return exclude_tied(inventory, exact, [*unsupported, *inexact])


class _Unclear(Exception):
    """Why a group cannot be pruned: the reason of an `Unsupported`."""


class _Entrance(nn.Conv2d):
    """Stands for the input image: the graph knows no tensor that is not the output of a layer."""


class _WithEntrance(nn.Module):
    """The twin on its example, in which every image has passed a 1x1 convolution."""

    def __init__(self, twin: nn.Module, example: Inputs) -> None:
        super().__init__()
        self.twin, self._example = twin, example
        widths = {value.shape[1] for value in example.images()}
        self.entrances = nn.ModuleList(_Entrance(width, width, 1).double() for width in widths)

    def forward(self) -> Any:
        entrances: dict[int, nn.Module] = {int(e.get_parameter("weight").shape[0]): e for e in self.entrances}
        return self._example.changed(lambda image: entrances[image.shape[1]](image)).call(self.twin)


class _Groups:
    """The dependency graph of a twin of the model, translated to prunable groups of the model."""

    def __init__(self, inventory: Inventory, twin: nn.Module, example: Inputs, graphs: Any) -> None:
        self._inventory = inventory
        self._twin = twin
        self._names = {module: name for name, module in twin.named_modules()}
        traced = _WithEntrance(twin, example)
        self._types = graphs.ops.OPTYPE
        self._graph = graphs.DependencyGraph()
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph.build_dependency(
                traced,
                example_inputs=(),
                forward_fn=lambda module, _: module(),
                # One more operation: else the layer that computes the result would not be next to an output.
                output_transform=lambda output: [tensor * 1.0 for tensor in tensors_of(output)],
                verbose=False,
            )

    def read(self) -> tuple[list[PrunableGroup], list[Unsupported]]:
        groups: list[PrunableGroup] = []
        unsupported: list[Unsupported] = []
        seen: set[str] = set()
        for name, module in self._twin.named_modules():
            if not isinstance(module, nn.Conv2d) or name in seen or module not in self._graph.module2node:
                continue
            if module.groups == module.out_channels > 1:
                # Depthwise: its channels are those of the layer before it.
                continue
            dependencies = self._dependencies(module)
            seen |= {self._names.get(d.target.module, "") for d, _ in dependencies if self._writes(d)}
            try:
                groups.append(self._group(name, dependencies))
            except _Unclear as why:
                unsupported.append(Unsupported(name, str(why)))
        return groups, unsupported

    def _dependencies(self, module: nn.Conv2d) -> Any:
        prune = self._graph.get_pruner_of_module(module).prune_out_channels
        return self._graph.get_pruning_group(module, prune, list(range(module.out_channels)))

    def _writes(self, dependency: Any) -> bool:
        """Whether the dependency is about the outputs of a layer that computes them from other channels."""
        is_layer = isinstance(dependency.target.module, (nn.Conv2d, nn.Linear))
        return is_layer and bool(self._graph.is_out_channel_pruning_fn(dependency.handler))

    def _group(self, name: str, dependencies: Any) -> PrunableGroup:
        units = self._twin.get_submodule(name).get_parameter("weight").shape[0]
        slices: list[CoupledSlice] = []
        names: list[str] = []
        observed: tuple[str, torch.Tensor] | None = None
        for item in dependencies:
            dependency, target = item.dep, item.dep.target
            if target.type in (
                self._types.ELEMENTWISE,
                self._types.RESHAPE,
                self._types.CONCAT,
                self._types.SPLIT,
            ):
                continue
            layer = self._names.get(target.module, "")
            if target.type is self._types.OUTPUT:
                raise _Unclear("its channels are an output of the network")
            if isinstance(target.module, _Entrance):
                raise _Unclear("its channels are added to those of the network's input")
            index = _index(item, units, layer)
            own = self._slices(layer, target.module, self._writes(dependency), index)
            slices += own
            names.append(layer)
            reads = isinstance(target.module, (nn.Conv2d, nn.Linear)) and not self._writes(dependency)
            if observed is None and own and reads:
                observed = (layer, index)
        return PrunableGroup(
            name=name,
            kind=GroupKind.CHANNEL,
            modules=unique(names),
            units=units,
            slices=tuple(slices),
            observed=observed[0] if observed else None,
            observed_index=observed[1] if observed else None,
        )

    def _slices(self, layer: str, module: nn.Module, writes: bool, index: torch.Tensor) -> list[CoupledSlice]:
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d, nn.PReLU)):
            return self._vectors(layer, index)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            projection = self._inventory.projection(layer)
            if projection is None:
                raise _Unclear(
                    f"{layer} is a {type(module).__name__} that computes something else than its class"
                )
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                if not module.groups == module.in_channels == module.out_channels:
                    raise _Unclear(
                        f"{layer} is a convolution in {module.groups} groups, whose sizes must stay equal"
                    )
                return projection.writers(index, scored=True)
            if writes:
                return projection.writers(index, scored=isinstance(module, nn.Conv2d))
            return [projection.reader(index)]
        what = layer or "a parameter of its own"
        raise _Unclear(
            f"{what} ({type(module).__name__}) mixes channels, or uses them in a way not known here"
        )

    def _vectors(self, layer: str, index: torch.Tensor) -> list[CoupledSlice]:
        slices = []
        for key in _VECTORS:
            tensor = self._inventory.tensor(layer, key)
            module = self._inventory.modules[layer]
            if tensor is not None and getattr(module, key).numel() > 1:
                # A zero channel must still be zero behind its normalization; the statistics are only sliced.
                slices.append(CoupledSlice(tensor, 0, index, masked=key in ("weight", "bias")))
        return slices


def _index(item: Any, units: int, layer: str) -> torch.Tensor:
    """int64 (units, width): the entries of a layer by the channel of the root that they belong to."""
    entries: dict[int, set[int]] = {unit: set() for unit in range(units)}
    for entry, root in zip(item.idxs, item.root_idxs, strict=True):
        entries.setdefault(root, set()).add(entry)
    widths = {len(own) for own in entries.values()}
    if len(widths) != 1 or not widths.pop() or len(entries) != units:
        raise _Unclear(f"{layer} does not have as many entries of each channel")
    return torch.tensor([sorted(entries[unit]) for unit in range(units)])


@torch.no_grad()
def _random_twin(model: nn.Module) -> nn.Module:
    """A CPU copy in fp64 and eval mode, with weights that make wrong couplings visible."""
    twin = copy.deepcopy(model)
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
    twin = twin.to("cpu", torch.float64).eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0
        parameter.normal_(0.0, spread, generator=generator)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return twin


def _tried(
    twin: nn.Module, example: Inputs, groups: Sequence[PrunableGroup]
) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """Groups whose units can be removed with no other effect than masking them: all at once, else one by one."""
    if not groups or _is_exact(twin, example, groups):
        return list(groups), []
    exact = [group for group in groups if _is_exact(twin, example, [group])]
    reason = (
        "removing channels does not give the output of masking them: something in the network mixes channels"
    )
    return exact, [Unsupported(group.name, reason) for group in groups if group not in exact]


@torch.no_grad()
def _is_exact(twin: nn.Module, example: Inputs, groups: Sequence[PrunableGroup]) -> bool:
    # The last units of one, the first of the next: shared dimensions lose entries of both.
    kept = {
        group.name: torch.arange(group.units)[(position % 2) :: 2]
        for position, group in enumerate(groups)
        if group.units > 1
    }
    masked, smaller = copy.deepcopy(twin), copy.deepcopy(twin)
    try:
        _mask(masked, groups, kept)
        apply_pruning(smaller, PruningPlan.of(groups, kept))
        ours, theirs = tensors_of(example.call(smaller)), tensors_of(example.call(masked))
    except (RuntimeError, ValueError, IndexError):
        return False
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE * (1 + b.abs().max()))
        for a, b in zip(ours, theirs, strict=True)
    )


def _mask(model: nn.Module, groups: Sequence[PrunableGroup], kept: Mapping[str, torch.Tensor]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in groups:
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[kept.get(group.name, torch.arange(group.units))] = False
        for coupled in group.slices:
            if coupled.masked:
                tensors[coupled.tensor].index_fill_(coupled.dim, coupled.index[gone].flatten(), 0)


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise ImportError("channel_pruning needs Torch-Pruning: pip install 'ds_compress[prune]'") from error
