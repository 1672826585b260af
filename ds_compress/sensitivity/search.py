"""From a table of sensitivities and a goal to a `weight_quantization` block with a format for each group of layers.

The loss of a choice is taken as the sum of what its groups add alone, and the bytes as what the plan of the choice
predicts of an export. ModelOpt's AutoQuantize solves the same program; its goal, effective bits, is here the stored
bits of a weight of the layers in the table, scales included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ds_compress.config.report.plan import Plan
from ds_compress.config.report.size_estimate import format_of, stored
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import parse_config
from ds_compress.config.targets import Weight
from ds_compress.export.compatibility import loads_packed, refuse_unfit
from ds_compress.modelinfo.inventory import entries_of
from ds_compress.sensitivity.formats import format_named
from ds_compress.sensitivity.goal import PICOSECOND, Goal, Latency
from ds_compress.sensitivity.groups import BLOCK, block_with
from ds_compress.sensitivity.knapsack import Option, UnreachableError, choose
from ds_compress.sensitivity.latency import times
from ds_compress.sensitivity.patterns import patterns
from ds_compress.sensitivity.table import GroupSensitivity, Sensitivity

KEEP = "keep"
"""A group stays as it is."""
_HEADER = 130
_TENSORS = 4
"""Of one quantized matrix in a file, at most: values, scales, a shape or a zero point, a global scale. Each has its
name, its shape and its place in the header, for which these are the bytes beside the name."""


@dataclass(frozen=True)
class Predicted:
    """Of one choice of formats.

    increase: of the metric. bytes: of the weight files of an export, at most, headers included. effective_bits: stored
    bits of a weight of the layers in the table. seconds: of one forward, at least; None where the goal is none of time.
    """

    increase: float
    bytes: int
    effective_bits: float
    seconds: float | None = None


@dataclass(frozen=True)
class Searched:
    """What a search chose.

    block: of `compression_training`, whole. formats: by name of a group, "keep" where it stays. uniform: what it would
    be with one format for all groups, by the name of the format, where it fits them all.
    """

    block: dict[str, Any]
    formats: Mapping[str, str]
    predicted: Predicted
    uniform: Mapping[str, Predicted]

    def as_data(self) -> dict[str, Any]:
        """Plain data: what `cli.results` describes under `search`."""
        return {
            "formats": dict(self.formats),
            **asdict(self.predicted),
            "uniform": {name: asdict(predicted) for name, predicted in self.uniform.items()},
        }


def search(model: nn.Module, block: Mapping[str, Any], table: Sensitivity, goal: Goal) -> Searched:
    """The mix of formats that adds the least to the metric within the goal.

    Args:
        model: on the meta device is enough.
        block: what else `compression_training` has to say; its `export_to` decides how bytes are counted.

    Raises:
        ValueError: a table of another model; a goal that no choice reaches, with the smallest that one does; a goal
            that the model meets as it is; scipy is not there.
        ConfigError: a block that quantizes weights itself, or that does not go with the formats.
    """
    _refuse_own_quantization(block)
    _refuse_other_model(model, table)
    sizes = _Sizes.of(model, block, table)
    limited = times(model, sizes.plans, KEEP, table, goal) if isinstance(goal, Latency) else sizes
    options = [_options(group, limited.by_format[name]) for name, group in table.groups.items()]
    weights = sum(group.parameters for group in table.groups.values())
    try:
        found = choose(options, goal.budget(weights, limited.others))
    except UnreachableError as error:
        reached = goal.reached(error.smallest, weights, limited.others)
        raise ValueError(f"{goal}: the smallest that these formats reach is {reached}") from None
    chosen = dict(zip(table.groups, found, strict=True))
    if set(found) == {KEEP}:
        raise ValueError(f"{goal}: the model meets it as it is, so there is nothing to search")
    made = {**block, "export_to": sizes.export_to, BLOCK: _quantization(model, table, chosen)}
    _refuse_difference(model, made, table, chosen, sizes)

    def predicted(names: Sequence[str]) -> Predicted:
        own = [option[name] for option, name in zip(options, names, strict=True)]
        total = sum(of[name] for of, name in zip(sizes.by_format.values(), names, strict=True))
        picoseconds = limited.others + sum(option.size for option in own)
        return Predicted(
            sum(option.cost for option in own),
            sizes.others + total,
            8 * total / weights,
            picoseconds * PICOSECOND if isinstance(goal, Latency) else None,
        )

    uniform = {
        name: predicted([name] * len(options))
        for name in table.formats
        if all(name in option for option in options)
    }
    return Searched(made, chosen, predicted(found), uniform)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the groups of a table in an export.

    by_format: by name of a group, by format. others: of all other weights, and of the headers of the files. plans: by
    format, with all groups in it that can be.
    """

    export_to: str
    by_format: Mapping[str, Mapping[str, int]]
    others: int
    plans: Mapping[str, Plan]

    @classmethod
    def of(cls, model: nn.Module, block: Mapping[str, Any], table: Sensitivity) -> _Sizes:
        plain = resolve(model, block)
        planned = {name: plan for name in table.formats if (plan := _planned(model, block, table, name))}
        first = next(iter(planned.values()))
        export_to = plain.config.export_to or format_of(first)
        for plan in (plain, *planned.values()):
            plan.config = plan.config.model_copy(update={"export_to": export_to})
        packs = loads_packed(first, model)
        parameters = _parameters(model, table)
        sizes: dict[str, dict[str, int]] = {name: {} for name in table.groups}
        plans = {KEEP: plain, **planned}
        for format, plan in plans.items():
            plan.packs = packs
            own = _bytes_by_group(plan, parameters)
            fitting = table.groups if format == KEEP else _fitting(table, format)
            for name in fitting:
                sizes[name][format] = own[name]
        claimed = {name for names in parameters.values() for name in names}
        others = sum(weight.after for name, weight in stored(plain).items() if name not in claimed)
        return cls(export_to, sizes, others + sum(map(_header_bytes, plain.weights)), plans)


def _options(group: GroupSensitivity, amounts: Mapping[str, int]) -> dict[str, Option]:
    """amounts: what the goal limits, by format."""
    options = {KEEP: Option(0.0, amounts[KEEP])}
    for format, value in group.increase.items():
        if value is not None:
            options[format] = Option(value, amounts[format])
    return options


def _planned(model: nn.Module, block: Mapping[str, Any], table: Sensitivity, format: str) -> Plan | None:
    """With every group in `format` that can be; None where none can."""
    chosen = dict.fromkeys(_fitting(table, format), format)
    if not chosen:
        return None
    return resolve(model, {**block, BLOCK: _quantization(model, table, chosen)})


def _fitting(table: Sensitivity, format: str) -> list[str]:
    return [name for name, group in table.groups.items() if format in group.increase]


def _quantization(model: nn.Module, table: Sensitivity, chosen: Mapping[str, str]) -> dict[str, Any]:
    modules: dict[str, list[str]] = {}
    for group, format in chosen.items():
        if format != KEEP:
            modules.setdefault(format, []).extend(table.groups[group].modules)
    every = [entry.name for entry in entries_of(model)]
    return block_with(
        {
            format: (format_named(format).params, patterns(modules[format], every))
            for format in table.formats
            if format in modules
        }
    )


def _parameters(model: nn.Module, table: Sensitivity) -> dict[str, list[str]]:
    """Names of the weights of each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_module = {entry.name: names[id(entry.weight)] for entry in entries_of(model) if entry.kind is not None}
    return {name: [of_module[module] for module in group.modules] for name, group in table.groups.items()}


def _bytes_by_group(plan: Plan, parameters: Mapping[str, list[str]]) -> dict[str, int]:
    own = stored(plan)
    return {group: sum(own[name].after for name in names) for group, names in parameters.items()}


def _header_bytes(weight: Weight) -> int:
    """At most, of the entries for one weight in the header of a file."""
    if len(weight.shape) < 2:
        return len(weight.name) + _HEADER
    matrices = weight.experts if weight.shape[0] == weight.experts else 1
    return _TENSORS * matrices * (len(weight.name) + _HEADER)


def _refuse_own_quantization(block: Mapping[str, Any]) -> None:
    parsed = parse_config(block)
    if parsed.scheme is not None or "weight_quantization" in parsed.enabled_blocks():
        raise ValueError(
            "the block quantizes weights already (weight_quantization, a scheme or a recipe), which is what a search "
            "writes: remove that from the JSON"
        )


def _refuse_other_model(model: nn.Module, table: Sensitivity) -> None:
    shapes = {entry.name: entry.shape for entry in entries_of(model) if entry.kind is not None}
    for name, group in table.groups.items():
        if missing := [module for module in group.modules if module not in shapes]:
            raise ValueError(f"the table is of another model: this one has no layer {missing[0]}")
        parameters = sum(math.prod(shapes[module]) for module in group.modules)
        if parameters != group.parameters:
            raise ValueError(
                f"the table is of another model: {name} has {group.parameters:,} weights there, and {parameters:,} here"
            )


def _refuse_difference(
    model: nn.Module, block: Mapping[str, Any], table: Sensitivity, chosen: Mapping[str, str], sizes: _Sizes
) -> None:
    """The block does what was chosen, and the format of the export can store it; also beside the other blocks.

    Raises:
        ConfigError: the format of the export cannot.
        ValueError: bytes or formats of a group are not those of the search.
    """
    plan = resolve(model, block)
    refuse_unfit(plan, model)
    plan.packs = loads_packed(plan, model)
    found = {target.module_name: target.group for target in plan.techniques[BLOCK].targets}
    expected = {
        module: format
        for name, format in chosen.items()
        if format != KEEP
        for module in table.groups[name].modules
    }
    own = _bytes_by_group(plan, _parameters(model, table))
    other = [name for name, format in chosen.items() if own[name] != sizes.by_format[name][format]]
    if found != expected or other:
        differing = other or sorted(set(found.items()) ^ set(expected.items()))[0][:1]
        raise ValueError(f"the block does not do what was chosen for {differing[0]}: please report it")
