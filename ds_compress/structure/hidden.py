"""The hidden size: entries of the residual stream, in models where removing masked entries is exact.

An entry that is zero in every embedding and that no layer writes to stays zero; matrices that read it can lose its
column. Normalizations by the root mean square over all n entries include the zeros, so that over the k that are left
their weights must grow by (n / k) ** 0.5. LayerNorm, which subtracts a mean first, has no exact equivalent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ds_compress.modelinfo.experts import fused_experts, moe_blocks
from ds_compress.modelinfo.kinds import kind_of, shape_of
from ds_compress.structure.attention import attentions_of
from ds_compress.structure.expert_rows import expert_hidden_slices, multiple_of_widths
from ds_compress.structure.feed_forward import feed_forwards_of
from ds_compress.structure.head_companions import OF_ROOT_MEAN_SQUARE
from ds_compress.structure.inventory import Inventory, rows, unique
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup, Unsupported

_MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "glm4_moe",
    "dots1",
    "gpt_oss",
    "granitemoe",
    "ernie4_5_moe",
)
_EXACT = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite", "glm", *_MIXTURES)
"""Model types whose residual stream is only read by matrices and root-mean-square norms, and scaled by constants."""
_WITH_OTHER_NORMS = ("qwen3", "olmo2", "qwen3_moe", "dots1")
_ASIDE = (".sinks", ".e_score_correction_bias")
"""Ends of the names of parameters with a number for each head, or for each expert."""
_WHY_NOT = {
    "gemma": "embeddings are multiplied by the root of the hidden size, and norms by one plus their weight",
    "olmoe": "its config has no width of its own for the norms of queries and keys",
    "t5": "outputs are scaled by the hidden size where embeddings are tied",
}


def hidden_groups(inventory: Inventory) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """The one group of the residual stream's entries, or why there is none."""
    model = inventory.model
    reason = _obstacle(model)
    if reason is None:
        try:
            return [_group(inventory)], []
        except _Unclear as why:
            reason = str(why)
    return [], [Unsupported(type(model).__name__, f"its hidden size cannot be cut exactly: {reason}")]


def scales_epsilon(config: Any) -> bool:
    """Whether all norms of the model are over the hidden entries, so that its epsilon can grow by n / k, too."""
    if getattr(config, "model_type", None) not in _EXACT or getattr(config, "use_qk_norm", False):
        return False
    return config.model_type not in _WITH_OTHER_NORMS


class _Unclear(Exception):
    """Why the hidden size cannot be pruned: the reason of an `Unsupported`."""


def _obstacle(model: nn.Module) -> str | None:
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if model_type in _EXACT:
        return None
    for prefix, why in _WHY_NOT.items():
        if model_type.startswith(prefix):
            return why
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            return f"{name} is a LayerNorm, which subtracts a mean over the removed entries, too"
    return f"what a {type(model).__name__} does with its hidden states is not known here"


def _group(inventory: Inventory) -> PrunableGroup:
    embedding, units = _embedding(inventory)
    index = rows(units)
    table = inventory.tensor(embedding, "weight")
    assert table is not None
    slices = [CoupledSlice(table, 1, index, scored=True)]
    names, inner = [embedding], set()
    attentions, unsupported = attentions_of(inventory)
    if unsupported:
        raise _Unclear(f"{unsupported[0].module}: {unsupported[0].reason}")
    for attention in attentions:
        parts = {part.projection.name: part.projection for part in attention.inputs}
        if attention.key_value_heads == 1:
            own = (
                inventory.projection(name)
                for name in inventory.modules
                if name.startswith(attention.name + ".")
            )
            parts.update({p.name: p for p in own if p is not None and p.name != attention.output.name})
        slices += [projection.reader(index, scored=True) for projection in parts.values()]
        slices += attention.output.writers(index, scored=True)
        inner |= {*parts, attention.output.name}
    for block in feed_forwards_of(inventory, frozenset(inner)):
        slices += [projection.reader(index, scored=True) for projection in block.widen]
        slices += block.narrow.writers(index, scored=True)
        inner |= {block.narrow.name, *(projection.name for projection in block.widen)}
    multiple = 1
    for name in [name for name, module in inventory.modules.items() if fused_experts(module) is not None]:
        slices += expert_hidden_slices(inventory, name, index)
        multiple = max(multiple, multiple_of_widths(inventory.modules[name]))
        inner.add(name)
    for mixture in moe_blocks(inventory.model):
        for router in mixture.routers:
            weight = inventory.tensor(router, "weight")
            assert weight is not None
            slices.append(CoupledSlice(weight, 1, index, scored=True))
            inner.add(router)
    names += sorted(inner)
    heads = list(_heads(inventory, inner, units))
    if not heads:
        raise _Unclear("it gives its hidden states to the caller; take the model with its head")
    known = {coupled.tensor for coupled in slices}
    for head in heads:
        weight = inventory.tensor(head, "weight")
        if weight is not None and weight not in known:
            slices.append(CoupledSlice(weight, 1, index, scored=True))
    norms = list(_norms(inventory, units))
    slices += [CoupledSlice(norm, 0, index, masked=False, rescale=OF_ROOT_MEAN_SQUARE) for norm in norms]
    _check_complete(inventory, slices, units)
    return PrunableGroup(
        name=embedding,
        kind=GroupKind.HIDDEN,
        modules=unique([*names, *heads, *(inventory.parent(norm) for norm in norms)]),
        units=units,
        slices=tuple(slices),
        observed=heads[0],
        observed_index=index,
        multiple=multiple,
    )


def _embedding(inventory: Inventory) -> tuple[str, int]:
    found = [name for name, module in inventory.modules.items() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        raise _Unclear(f"it has {len(found)} embeddings")
    return found[0], shape_of(inventory.modules[found[0]].get_parameter("weight"))[1]


def _heads(inventory: Inventory, inner: set[str], units: int) -> Iterator[str]:
    for name, module in inventory.modules.items():
        if isinstance(module, nn.Linear) and name not in inner:
            projection = inventory.projection(name)
            if projection is None or kind_of(module) is None or projection.inputs != units:
                raise _Unclear(f"what {name} reads is not known")
            yield name


def _norms(inventory: Inventory, units: int) -> Iterator[str]:
    for name, module in inventory.modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and "RMSNorm" in type(module).__name__ and shape_of(weight) == (units,):
            # A norm over all heads (OLMo2) is not over the hidden entries, though there may be as many.
            if name.rpartition(".")[2] in ("q_norm", "k_norm"):
                continue
            tensor = inventory.tensor(name, "weight")
            assert tensor is not None
            yield tensor


def _check_complete(inventory: Inventory, slices: list[CoupledSlice], units: int) -> None:
    """Every parameter has a slice in the group, or belongs to the inside of a layer."""
    known = {coupled.tensor for coupled in slices}
    of_experts = _biases_of_experts(inventory)
    for name, parameter in inventory.model.named_parameters():
        is_norm = name.split(".")[-2] in ("q_norm", "k_norm")
        is_inner_bias = name.endswith(".bias") and inventory.projection(inventory.parent(name)) is not None
        is_inner_bias = is_inner_bias or name in of_experts or name.endswith(_ASIDE)
        if name not in known and not is_norm and not is_inner_bias:
            raise _Unclear(
                f"what {name} {list(shape_of(parameter))} has to do with the {units} entries is not known"
            )


def _biases_of_experts(inventory: Inventory) -> set[str]:
    """Biases of what fused experts write before their activation, and of routers, which count experts."""
    found = set()
    for block in moe_blocks(inventory.model):
        if block.fused is not None:
            found.add(f"{block.experts_name}.{block.fused.up}_bias")
        for router in block.routers:
            # A correction bias may lie beside the weight or in the block around it.
            for holder in (router, inventory.parent(router)):
                own = inventory.modules[holder]._parameters.items()
                found |= {f"{holder}.{key}" for key, p in own if p is not None and len(shape_of(p)) == 1}
    return found
