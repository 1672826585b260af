"""A model's modules one by one, each with whole parameters while it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ds_compress.engine.registry import run_of
from ds_compress.engine.zero.parameters import full_parameters
from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.quant import layers


def full_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module); until the next one is asked for, its own parameters are whole.

    So are the learned scales of whatever module quantizes one of them, which need not be the same where weights are
    tied. Nothing auxiliary is among them. A collective where parameters are partitioned: every process goes through
    all modules.
    """
    run = run_of(model)
    if run is not None:
        run.refresh_weights()
    scales_of: dict[int, list[Any]] = {}
    for module in model.modules():
        for parameter in layers.quantized_parameters(module):
            scale = module._parameters.get(layers.step_size_name(parameter))
            if scale is not None:
                scales_of.setdefault(id(module.get_parameter(parameter)), []).append(scale)
    for name, module in list(model.named_modules()):
        if is_auxiliary(name):
            continue
        own: list[Any] = [p for p in module._parameters.values() if p is not None]
        scales = [scale for parameter in own for scale in scales_of.get(id(parameter), ())]
        unique = {id(parameter): parameter for parameter in (*own, *scales)}
        with full_parameters(unique.values()):
            yield name, module
