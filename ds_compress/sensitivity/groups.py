"""Layers that share a format: q, k and v, or gate and up, which servers multiply as one matrix; all others alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.targets import Target
from ds_compress.modelinfo.head import output_head
from ds_compress.modelinfo.inventory import EVERY_LAYER, exact_pattern
from ds_compress.sensitivity.formats import Format
from ds_compress.techniques.global_scales import fused_families

BLOCK = "weight_quantization"


@dataclass(frozen=True)
class LayerGroup:
    """modules: as the JSON's regexes reach them, in model order. parameters: numbers in their weights."""

    modules: tuple[str, ...]
    parameters: int

    @property
    def name(self) -> str:
        """E.g. "model.layers.0.self_attn.{q_proj,k_proj,v_proj}"."""
        if len(self.modules) == 1:
            return self.modules[0]
        parent = self.modules[0].rpartition(".")[0]
        names = ",".join(module.rpartition(".")[2] for module in self.modules)
        return f"{parent}.{{{names}}}".lstrip(".")


def block_with(
    groups: Mapping[str, tuple[Mapping[str, Any], Sequence[str]]], excluded: Sequence[str] = ()
) -> dict[str, Any]:
    """A `weight_quantization` block, by name of a group its params and its patterns."""
    shared: dict[str, Any] = {"enabled": True, "schedule_offset": 0}
    if excluded:
        shared["excluded_modules"] = list(excluded)
    return {
        "shared_parameters": shared,
        "different_groups": {
            name: {"params": dict(params), "modules": list(patterns)}
            for name, (params, patterns) in groups.items()
        },
    }


def layer_groups(model: nn.Module, excluded: Sequence[str] = ()) -> list[LayerGroup]:
    """All layers and experts but the output head, without those that a regex of `excluded` finds.

    Raises:
        ConfigError: a regex that is none, that reaches nothing, or that leaves no layer.
    """
    patterns = list(excluded)
    head = output_head(model)
    patterns += [exact_pattern(name) for name, module in model.named_modules() if module is head]
    block = block_with({"all": ({"target_bits": 8, "granularity": "per_channel"}, [EVERY_LAYER])}, patterns)
    targets = {t.module_name: t for t in resolve(model, {BLOCK: block}).techniques[BLOCK].targets}
    order = {name: position for position, name in enumerate(targets)}
    families = [sorted(family, key=order.__getitem__) for family in fused_families(list(targets))]
    return [
        LayerGroup(tuple(family), sum(math.prod(targets[name].shape) for name in family))
        for family in sorted(families, key=lambda family: order[family[0]])
    ]


def targets_in(
    model: nn.Module, groups: Sequence[LayerGroup], format: Format
) -> tuple[Any, dict[str, tuple[Target, ...]]]:
    """The shared settings of the block, and by name of a group its targets in `format`, where all of them fit it."""
    # Shapes decide what fits, so they are asked in a format that fits all.
    names = [name for group in groups for name in group.modules]
    plain = _resolved(model, {"target_bits": 8, "granularity": "per_channel"}, names)[1]
    fitting = [group for group in groups if all(format.fits(plain[name]) for name in group.modules)]
    if not fitting:
        return None, {}
    shared, targets = _resolved(model, format.params, [name for group in fitting for name in group.modules])
    return shared, {group.name: tuple(targets[name] for name in group.modules) for group in fitting}


def _resolved(
    model: nn.Module, params: Mapping[str, Any], names: Sequence[str]
) -> tuple[Any, dict[str, Target]]:
    block = block_with({"all": (params, [exact_pattern(name) for name in names])})
    technique = resolve(model, {BLOCK: block}).techniques[BLOCK]
    return technique.shared, {target.module_name: target for target in technique.targets}
