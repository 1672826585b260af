"""Attention layers as they are met in models: where their heads are in the rows of q, k, v and the columns of o."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ds_compress.config.modules import shape_of
from ds_compress.structure.inventory import Inventory, Projection
from ds_compress.structure.structure import Refusal

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
}
"""Class -> projection of q, k and v in one; True: head by head [head, 3, dim], False: whole [q | k | v]."""
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
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm")


@dataclass(frozen=True, eq=False)
class Rows:
    """`width` rows per unit of a projection, those of unit 0 from `start` on."""

    projection: Projection
    width: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention layer.

    name: the module that holds all of it. holder: the module whose attributes count heads. inputs: the rows of each
    unit. norms: (module name, entries per unit) of normalizations over all heads at once. bias_table: an
    Embedding [buckets, heads] that is added to the scores. A unit is a key/value head with its query heads, or
    a query head where all share the only key/value head.
    """

    name: str
    holder: str
    inputs: tuple[Rows, ...]
    output: Projection
    heads: int
    key_value_heads: int
    head_dim: int
    norms: tuple[tuple[str, int], ...] = ()
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


class _Unclear(Exception):
    """What keeps an attention layer from being pruned, for the Refusal."""


def attentions_of(
    inventory: Inventory, num_heads: int | None = None
) -> tuple[list[Attention], list[Refusal]]:
    """All attention layers that are understood, and those that are not.

    num_heads: of layers that do not say themselves how many heads they have.
    """
    found: list[Attention] = []
    refusals: list[Refusal] = []
    for name, module in inventory.modules.items():
        if any(name.startswith(other + ".") for other in (r.module for r in refusals)):
            continue
        try:
            attention = _attention(inventory, name, module, num_heads)
        except _Unclear as why:
            refusals.append(Refusal(name, str(why)))
            continue
        if attention is not None:
            found.append(attention)
    refusals += _unknown(inventory, found, refusals)
    return found, refusals


def _attention(inventory: Inventory, name: str, module: nn.Module, num_heads: int | None) -> Attention | None:
    if isinstance(module, nn.MultiheadAttention):
        raise _Unclear(
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
    if cls is None:
        raise _Unclear(
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
                raise _Unclear(
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
    whole, output = _output(inventory, name, qkv, q.outputs)
    head_dim = _head_dim(inventory, name, module, q.outputs, num_heads)
    heads, key_values = q.outputs // head_dim, k.outputs // head_dim
    if k.outputs != v.outputs or output.inputs != q.outputs or k.outputs % head_dim or heads % key_values:
        raise _Unclear(
            f"q, k, v and o are {q.outputs}, {k.outputs}, {v.outputs} and {output.inputs} wide: heads of unequal size"
        )
    norms, table = _companions(inventory, name, {p.name for p in (*qkv, output)}, heads, key_values, head_dim)
    if key_values == 1:
        inputs: tuple[Rows, ...] = (Rows(q, head_dim),)
        norms = tuple(norm for norm in norms if norm[1] * heads == q.outputs)
    else:
        inputs = (Rows(q, heads // key_values * head_dim), Rows(k, head_dim), Rows(v, head_dim))
    return Attention(whole, name, inputs, output, heads, key_values, head_dim, norms, table)


def _from_fused(
    inventory: Inventory, name: str, module: nn.Module, fused: Projection, interleaved: bool
) -> Attention:
    whole, output = _output(inventory, name, (fused,), None)
    head_dim = _head_dim(inventory, name, module, output.inputs, None)
    heads = output.inputs // head_dim
    key_values = (fused.outputs // head_dim - heads) // 2
    if (heads + 2 * key_values) * head_dim != fused.outputs or key_values < 1 or heads % key_values:
        raise _Unclear(
            f"{fused.name} has {fused.outputs} rows, which is not q, k and v of {heads} heads of {head_dim}"
        )
    norms, table = _companions(inventory, name, {fused.name, output.name}, heads, key_values, head_dim)
    group, keys = heads // key_values * head_dim, heads * head_dim
    if interleaved:
        inputs: tuple[Rows, ...] = (Rows(fused, 3 * head_dim),)
    elif key_values == 1:
        inputs = (Rows(fused, head_dim),)
    else:
        values = keys + key_values * head_dim
        inputs = (Rows(fused, group), Rows(fused, head_dim, keys), Rows(fused, head_dim, values))
    return Attention(whole, name, inputs, output, heads, key_values, head_dim, norms, table)


def _output(
    inventory: Inventory, name: str, inputs: tuple[Projection, ...], width: int | None
) -> tuple[str, Projection]:
    """(the module that holds all of the attention, its output projection)."""
    parent = inventory.parent(name)
    candidates = [(name, inventory.child(name, path)) for path in _OUTPUT]
    candidates += [(parent, inventory.child(parent, path)) for path in _OUTPUT_BESIDE]
    for whole, path in candidates:
        output = inventory.projection(path)
        if output is not None and output not in inputs and width in (None, output.inputs):
            return whole, output
    raise _Unclear(
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
    raise _Unclear("how many heads it has is not known; say it with shared_parameters.num_heads")


def _companions(
    inventory: Inventory, name: str, known: set[str], heads: int, key_values: int, head_dim: int
) -> tuple[tuple[tuple[str, int], ...], str | None]:
    """Normalizations over all heads, and the table of position biases; refuses anything else with weights."""
    norms: list[tuple[str, int]] = []
    table: str | None = None
    units = heads if key_values == 1 else key_values
    for child, _ in inventory.modules[name].named_children():
        path = inventory.child(name, child)
        shapes = [shape_of(p) for p in inventory.modules[path].parameters()]
        if path in known or not shapes or any(other.startswith(path + ".") for other in known):
            continue
        if child in _NORMS and all(shape == (head_dim,) for shape in shapes):
            continue
        if child in _NORMS and shapes in ([(heads * head_dim,)], [(key_values * head_dim,)]):
            norms.append((path, shapes[0][0] // units))
        elif child == "relative_attention_bias" and len(shapes) == 1 and shapes[0][1] == heads:
            table = path
        elif child != "distance_embedding":
            raise _Unclear(f"it also has {path}, and which of its entries belong to which head is not known")
    own = [key for key, parameter in inventory.modules[name]._parameters.items() if parameter is not None]
    if own:
        raise _Unclear(
            f"it also has a parameter {own[0]}, and which of its entries belong to which head is not known"
        )
    return tuple(norms), table


def _unknown(inventory: Inventory, found: list[Attention], refusals: list[Refusal]) -> Iterator[Refusal]:
    """Modules that are called attention, have projections of their own, and were not understood."""
    known = [attention.name for attention in found] + [refusal.module for refusal in refusals]
    for name, module in inventory.modules.items():
        if "attention" not in type(module).__name__.lower() or not inventory.own_projections(name):
            continue
        related = any(name == k or name.startswith(k + ".") or k.startswith(name + ".") for k in known)
        holders = any(name == attention.holder for attention in found)
        if not related and not holders:
            yield Refusal(
                name,
                f"how a {type(module).__name__} uses its projections is not known; name them with modules (the output "
                "projection) and related_modules (queries, keys, values)",
            )
