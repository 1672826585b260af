"""Attention layers of known models: where their heads are in the rows of q, k, v and the columns of o."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.head_companions import Unclear, Vector, check_surroundings, companions, tables_of
from ds_compress.structure.inventory import Inventory, Projection
from ds_compress.structure.prunable_group import Unsupported

_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
)
_OUTPUT = (
    "o_proj",
    "out_proj",
    "out_lin",
    "o",
    "dense",
    "wo",
    "Wo",
    "c_proj",
    "proj",
    "out",
    "to_out",
    "to_out.0",
    "linear_out",
)
_OUTPUT_BESIDE = ("output.dense", "output.out_proj")
"""Below the parent of the module that holds q, k and v (BERT)."""
_FUSED = {
    "GPT2Attention": ("c_attn", False),
    "ModernBertAttention": ("Wqkv", False),
    "Phi3Attention": ("qkv_proj", False),
    "GPTNeoXAttention": ("query_key_value", True),
    "PersimmonAttention": ("query_key_value", True),
}
"""Class -> projection of q, k and v in one; True: head by head [head, 3, dim], False: one by one [q | k | v]."""
_FUSED_NAMES = (
    "c_attn",
    "Wqkv",
    "qkv_proj",
    "query_key_value",
    "qkv",
    "in_proj",
    "W_pack",
    "to_qkv",
    "att_proj",
)
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads")


@dataclass(frozen=True, eq=False)
class Rows:
    """`width` rows per unit of a projection, those of unit 0 from `start` on."""

    projection: Projection
    width: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention layer.

    name: the module that contains all of it. holder: the module whose attributes count heads. inputs: the rows of each
    unit. vectors: other tensors that are sliced with the heads. bias_table: the Embedding [buckets, heads] added
    to the scores. A unit is a key/value head with its query heads, or a query head where all share one key/value head.
    """

    name: str
    holder: str
    inputs: tuple[Rows, ...]
    output: Projection
    heads: int
    key_value_heads: int
    head_dim: int
    vectors: tuple[Vector, ...] = ()
    bias_table: str | None = None

    @property
    def units(self) -> int:
        return self.heads if self.key_value_heads == 1 else self.key_value_heads

    @property
    def width(self) -> int:
        """Columns of the output projection per unit."""
        return self.heads // self.units * self.head_dim

    def counts(self, columns: int) -> tuple[int, int]:
        """(heads, key/value heads) when the output projection reads `columns` entries."""
        heads = columns // self.head_dim
        return heads, 1 if self.key_value_heads == 1 else heads * self.key_value_heads // self.heads


def attentions_of(
    inventory: Inventory, num_heads: int | None = None
) -> tuple[list[Attention], list[Unsupported]]:
    """All attention layers that are supported, and those that are not.

    num_heads: of layers that have no attribute for it.
    """
    found: list[Attention] = []
    unsupported: list[Unsupported] = []
    tables = tables_of(inventory)
    for name, module in inventory.modules.items():
        if any(name.startswith(other + ".") for other in (r.module for r in unsupported)):
            continue
        try:
            attention = _attention(inventory, name, module, num_heads)
            if attention is not None:
                check_surroundings(inventory, name, attention.heads, tables)
        except Unclear as why:
            unsupported.append(Unsupported(name, str(why)))
            continue
        if attention is not None:
            found.append(attention)
    unsupported += _unknown(inventory, found, unsupported)
    return found, unsupported


def attention_projections(inventory: Inventory) -> frozenset[str]:
    """Names of all projections that belong to attention layers."""
    attentions, _ = attentions_of(inventory)
    return frozenset(
        name
        for attention in attentions
        for name in (attention.output.name, *(part.projection.name for part in attention.inputs))
    )


def _attention(inventory: Inventory, name: str, module: nn.Module, num_heads: int | None) -> Attention | None:
    if isinstance(module, nn.MultiheadAttention):
        raise Unclear(
            "a torch.nn.MultiheadAttention keeps q, k and v in one tensor that its fast path reads by width; use an "
            "attention with q, k and v as Linear layers"
        )
    separate = _separate(inventory, name)
    if separate is not None:
        return _from_three(inventory, name, module, separate, num_heads)
    cls = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _FUSED), None)
    fused_name = (
        _FUSED[cls][0]
        if cls is not None
        else next(
            (fused for fused in _FUSED_NAMES if inventory.projection(inventory.child(name, fused))), None
        )
    )
    fused = inventory.projection(inventory.child(name, fused_name)) if fused_name else None
    if fused is None:
        return None
    if cls is None and not _is_attention(module):
        return None
    if cls is None:
        raise Unclear(
            f"how {fused.name} lays out queries, keys and values is not known for a {type(module).__name__}; name its "
            "parts with modules and related_modules"
        )
    return _from_fused(inventory, name, module, fused, interleaved=_FUSED[cls][1])


def _separate(inventory: Inventory, name: str) -> tuple[Projection, Projection, Projection] | None:
    for names in _QKV:
        q, k, v = (inventory.projection(inventory.child(name, part)) for part in names)
        if q is not None and k is not None and v is not None:
            return q, k, v
        if all(inventory.child(name, part) in inventory.modules for part in names):
            strange = next(
                inventory.child(name, part)
                for part in names
                if inventory.projection(inventory.child(name, part)) is None
            )
            module = inventory.modules[strange]
            if next(module.parameters(), None) is not None:
                raise Unclear(
                    f"{strange} is a {type(module).__name__}, whose layout is not known here; merge or unwrap it first"
                )
    return None


def _from_three(
    inventory: Inventory,
    name: str,
    module: nn.Module,
    qkv: tuple[Projection, Projection, Projection],
    num_heads: int | None,
) -> Attention:
    q, k, v = qkv
    container, output = _output(inventory, name, qkv, q.outputs)
    head_dim = _head_dim(inventory, name, module, q.outputs, num_heads)
    heads, key_values = q.outputs // head_dim, k.outputs // head_dim
    if k.outputs != v.outputs or output.inputs != q.outputs or k.outputs % head_dim or heads % key_values:
        raise Unclear(
            f"q, k, v and o are {q.outputs}, {k.outputs}, {v.outputs} and {output.inputs} wide: heads of unequal size"
        )
    vectors, table = companions(
        inventory, name, {p.name for p in (*qkv, output)}, heads, key_values, head_dim
    )
    if key_values == 1:
        inputs: tuple[Rows, ...] = (Rows(q, head_dim),)
    else:
        inputs = (Rows(q, heads // key_values * head_dim), Rows(k, head_dim), Rows(v, head_dim))
    return Attention(container, name, inputs, output, heads, key_values, head_dim, vectors, table)


def _from_fused(
    inventory: Inventory, name: str, module: nn.Module, fused: Projection, interleaved: bool
) -> Attention:
    container, output = _output(inventory, name, (fused,), None)
    head_dim = _head_dim(inventory, name, module, output.inputs, None)
    heads = output.inputs // head_dim
    key_values = (fused.outputs // head_dim - heads) // 2
    if (heads + 2 * key_values) * head_dim != fused.outputs or key_values < 1 or heads % key_values:
        raise Unclear(
            f"{fused.name} has {fused.outputs} rows, which is not q, k and v of {heads} heads of {head_dim}"
        )
    vectors, table = companions(inventory, name, {fused.name, output.name}, heads, key_values, head_dim)
    group, keys = heads // key_values * head_dim, heads * head_dim
    if interleaved:
        inputs: tuple[Rows, ...] = (Rows(fused, 3 * head_dim),)
    elif key_values == 1:
        inputs = (Rows(fused, head_dim),)
    else:
        values = keys + key_values * head_dim
        inputs = (Rows(fused, group), Rows(fused, head_dim, keys), Rows(fused, head_dim, values))
    return Attention(container, name, inputs, output, heads, key_values, head_dim, vectors, table)


def _output(
    inventory: Inventory, name: str, inputs: tuple[Projection, ...], width: int | None
) -> tuple[str, Projection]:
    """(the module that holds all of the attention, its output projection)."""
    parent = inventory.parent(name)
    candidates = [(name, inventory.child(name, path)) for path in _OUTPUT]
    candidates += [(parent, inventory.child(parent, path)) for path in _OUTPUT_BESIDE]
    for container, path in candidates:
        output = inventory.projection(path)
        if output is not None and output not in inputs and width in (None, output.inputs):
            return container, output
    raise Unclear(
        "the projection that reads its heads was not found; name it in modules, and q, k, v as related_modules"
    )


def _head_dim(inventory: Inventory, name: str, module: nn.Module, width: int, num_heads: int | None) -> int:
    for attribute in HEAD_DIM:
        value = getattr(module, attribute, None)
        if isinstance(value, int) and value > 0 and width % value == 0:
            return value
    counts = [getattr(module, attribute, None) for attribute in HEADS]
    config = getattr(module, "config", None) or getattr(inventory.model, "config", None)
    for count in (*counts, num_heads, getattr(config, "num_attention_heads", None)):
        if isinstance(count, int) and count > 0 and width % count == 0:
            return width // count
    raise Unclear("how many heads it has is not known; set shared_parameters.num_heads")


def _is_attention(module: nn.Module) -> bool:
    has_heads = any(isinstance(getattr(module, attribute, None), int) for attribute in HEADS)
    return has_heads or "attention" in type(module).__name__.lower()


def _unknown(
    inventory: Inventory, found: list[Attention], unsupported: list[Unsupported]
) -> Iterator[Unsupported]:
    """Modules that are called attention, have matrices of their own, and were not recognised."""
    known = [attention.name for attention in found] + [refusal.module for refusal in unsupported]
    holders = {attention.holder for attention in found}
    for name, module in inventory.modules.items():
        matrices = any(
            len(shape_of(parameter)) >= 2
            for child in (module, *module.children())
            for parameter in child.parameters(recurse=False)
        )
        related = any(name == k or name.startswith(k + ".") or k.startswith(name + ".") for k in known)
        if matrices and "attention" in type(module).__name__.lower() and not related and name not in holders:
            yield Unsupported(
                name,
                f"how a {type(module).__name__} uses its projections is not known; name them with modules (the output "
                "projection) and related_modules (queries, keys, values)",
            )
