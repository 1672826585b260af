"""Whether stock transformers loads this model with its weights packed."""

from __future__ import annotations

from torch import nn

from ds_compress.export.compressed_tensors import floats
from ds_compress.export.ptq import is_head
from ds_compress.export.source import ExportSource
from ds_compress.export.trial_load import loads_packed
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers
from ds_compress.quant.schemes import Scheme

_MAY_BE_PACKED = ("int", *floats.PACKED)


def loads_when_packed(source: ExportSource, final: nn.Module, rounds_to: Scheme | None = None) -> bool:
    """Whether the model class loads without the weights that would be packed.

    rounds_to: the scheme of a model that is rounded by the export.
    """
    modules = dict(source.model.named_modules())
    packed = {name for name, module in modules.items() if _is_packed(name, module, rounds_to)}
    plan = source.pruning_plan
    renamed = {name: f"{name}.weight" if plan is None else plan.renamed(f"{name}.weight") for name in packed}
    targets = [weight.removesuffix(".weight") for weight in renamed.values() if weight is not None]
    if not targets:
        return True
    users: dict[int, list[bool]] = {}
    for name, module in modules.items():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            is_quantized = name in packed or layers.fake_quant_of(module) is not None
            users.setdefault(id(weight), []).append(is_quantized)
    return loads_packed(final, targets, any(len(set(quantize)) > 1 for quantize in users.values()))


def _is_packed(name: str, module: nn.Module, rounds_to: Scheme | None) -> bool:
    if kind_of(module) is not ModuleKind.LINEAR:
        return False
    if rounds_to is not None:
        return (
            rounds_to.weights is not None and rounds_to.weights.format in _MAY_BE_PACKED and not is_head(name)
        )
    fake_quant = layers.fake_quant_of(module)
    return fake_quant is not None and fake_quant.grid.format in _MAY_BE_PACKED
