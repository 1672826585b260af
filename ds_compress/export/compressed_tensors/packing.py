"""Whether stock transformers loads this model with its weights packed."""

from __future__ import annotations

from torch import nn

from ds_compress.export.compressed_tensors import floats
from ds_compress.export.source import ExportSource
from ds_compress.export.trial_load import loads_packed
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers

_MAY_BE_PACKED = ("int", *floats.PACKED)


def loads_when_packed(source: ExportSource, final: nn.Module) -> bool:
    """Whether the model class loads without the weights that would be packed."""
    fake_quants = {name: layers.fake_quant_of(module) for name, module in source.model.named_modules()}
    renamed = (
        {}
        if source.pruning_plan is None
        else {name: source.pruning_plan.renamed(f"{name}.weight") for name in fake_quants}
    )
    targets = [
        str(renamed.get(name, f"{name}.weight")).removesuffix(".weight")
        for name, fake_quant in fake_quants.items()
        if fake_quant is not None and fake_quant.grid.format in _MAY_BE_PACKED
        if kind_of(source.model.get_submodule(name)) is ModuleKind.LINEAR
        if renamed.get(name, "") is not None
    ]
    if not targets:
        return True
    users: dict[int, list[bool]] = {}
    for name, module in source.model.named_modules():
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            users.setdefault(id(weight), []).append(fake_quants[name] is not None)
    return loads_packed(final, targets, any(len(set(quantize)) > 1 for quantize in users.values()))
