"""The public functions that look at several parts of the package at once."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from ds_compress.config.report.plan import Plan
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.source import block_of
from ds_compress.export import compatibility


def plan(
    model: nn.Module, config: CompressionConfig | Mapping[str, Any] | str | PathLike[str], world_size: int = 1
) -> Plan:
    """Resolves a config against a model without training.

    config: the `compression_training` block, a DeepSpeed config that contains it, or the path of a JSON file
    with either. world_size: processes that share the training state.

    Raises:
        ConfigError: everything that is wrong with the config, or with what it asks of this model.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it counts processes, so it is at least 1")
    resolved = resolve(model, config if isinstance(config, CompressionConfig) else block_of(config))
    resolved.world_size = world_size
    # Not for whoever only resolves: models are built for it, without weights.
    compatibility.refuse_unfit(resolved, model)
    resolved.packs = compatibility.loads_packed(resolved, model)
    resolved.notes = (
        tuple(compatibility.notes(resolved, model)) if resolved.techniques or resolved.structures else ()
    )
    return resolved
