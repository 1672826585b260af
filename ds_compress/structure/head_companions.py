"""The tensors of an attention layer beside its projections, and which of their entries belong to which head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.inventory import Inventory

OF_ROOT_MEAN_SQUARE = -0.5
"""Rescale of a normalization's weight: the mean over k entries is n / k times that over n, of which n - k are 0."""
_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm", "q_ln", "k_ln")
_BEHIND = ("LayerNorm", "layer_norm")
"""Normalizations of the output projection's outputs (ALBERT)."""
_TABLE = re.compile(r"relative.*bias|position_bias|rel_pos|alibi|slopes")


class Unclear(Exception):
    """Why an attention layer cannot be pruned: the reason of an `Unsupported`."""


@dataclass(frozen=True, eq=False)
class Vector:
    """A tensor with `width` entries per unit along `dim`, which is sliced but not masked."""

    tensor: str
    width: int
    dim: int = 0
    rescale: float = 0.0


def companions(
    inventory: Inventory, name: str, known: set[str], heads: int, key_values: int, head_dim: int
) -> tuple[tuple[Vector, ...], str | None]:
    """(tensors that are sliced with the heads, the table of position biases or None) of the module `name`.

    known: its projections. A normalization over all heads at once (OLMo2) keeps its epsilon, which is a little smaller
    relative to the mean over fewer entries.

    Raises:
        Unclear: it has other weights.
    """
    units = heads if key_values == 1 else key_values
    vectors: list[Vector] = []
    table: str | None = None
    for child, _ in inventory.modules[name].named_children():
        path = inventory.child(name, child)
        shapes = [shape_of(p) for p in inventory.modules[path].parameters()]
        if path in known or not shapes or any(other.startswith(path + ".") for other in known):
            continue
        if child in _NORMS and all(shape == (head_dim,) for shape in shapes):
            continue
        weight = inventory.tensor(path, "weight")
        if (
            child in _NORMS
            and weight is not None
            and len(shapes) == 1
            and _is_root_mean_square(inventory, path)
        ):
            if shapes[0] == (heads * head_dim,):
                vectors.append(Vector(weight, heads * head_dim // units, rescale=OF_ROOT_MEAN_SQUARE))
                continue
            if shapes[0] == (key_values * head_dim,):
                # The only key/value head is not pruned.
                if key_values > 1:
                    vectors.append(Vector(weight, head_dim, rescale=OF_ROOT_MEAN_SQUARE))
                continue
        if child == "relative_attention_bias" and weight is not None and shapes[0][-1] == heads:
            table = path
            vectors.append(Vector(weight, heads // units, dim=1))
        elif child not in ("distance_embedding", *_BEHIND):
            raise Unclear(f"it also has {path}, and which of its entries belong to which head is not known")
    for key, parameter in inventory.modules[name]._parameters.items():
        tensor = inventory.tensor(name, key)
        if parameter is None or tensor is None:
            continue
        if key != "sinks" or shape_of(parameter) != (heads,):
            raise Unclear(
                f"it also has a parameter {key}, and which of its entries belong to which head is not known"
            )
        vectors.append(Vector(tensor, heads // units))
    return tuple(vectors), table


@dataclass(frozen=True)
class Table:
    """A parameter that looks like position biases. scope: name of the module below which it counts, "" for all."""

    tensor: str
    scope: str
    shape: tuple[int, ...]


def check_surroundings(inventory: Inventory, name: str, heads: int, tables: Sequence[Table]) -> None:
    """Refuses heads of which something outside the attention layer depends on their number.

    tables: of the whole model.

    Raises:
        Unclear: a table of position biases above it, or slopes by the head's number (ALiBi).
    """
    config = getattr(inventory.model, "config", None)
    if getattr(config, "alibi", False) is True or getattr(config, "position_embedding_type", "") == "alibi":
        raise Unclear("its model has ALiBi position biases, whose slopes follow from the number of the head")
    for table in tables:
        if heads in table.shape and (not table.scope or name.startswith(table.scope + ".")):
            raise Unclear(
                f"{table.tensor} is added to its scores head by head, and would not be pruned with them"
            )


def tables_of(inventory: Inventory) -> list[Table]:
    """Those of position biases that no attention layer holds itself."""
    found = []
    for tensor, parameter in inventory.model.named_parameters():
        if not _TABLE.search(tensor):
            continue
        scope = inventory.parent(inventory.parent(tensor))
        if "attention" not in type(inventory.modules[scope]).__name__.lower():
            found.append(Table(tensor, scope, shape_of(parameter)))
    return found


def _is_root_mean_square(inventory: Inventory, path: str) -> bool:
    return "rms" in type(inventory.modules[path]).__name__.lower()
