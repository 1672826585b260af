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
    quantized_by: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if layers.fake_quant_of(module) is not None:
            quantized_by.setdefault(id(module.weight), []).append(module)
    for name, module in list(model.named_modules()):
        if is_auxiliary(name):
            continue
        own: list[Any] = [p for p in module._parameters.values() if p is not None]
        scales = [
            scale
            for parameter in own
            for owner in quantized_by.get(id(parameter), ())
            if (scale := owner._parameters.get(layers.STEP_SIZE)) is not None
        ]
        unique = {id(parameter): parameter for parameter in (*own, *scales)}
        with full_parameters(unique.values()):
            yield name, module
