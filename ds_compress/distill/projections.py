"""The projections of a layer that compute its queries, keys and values."""

from __future__ import annotations

from torch import nn

from ds_compress.errors import ConfigError, Problem

# Names of these projections in the model families of transformers.
_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)
_FUSED = ("c_attn", "qkv", "Wqkv", "qkv_proj")


def find_projections(layer: nn.Module) -> list[nn.Module]:
    """The modules that compute queries, keys and values in a layer: three, or one for all of them.

    Raises:
        ConfigError: when none of the known names is in the layer.
    """
    for parent in layer.modules():
        for names in _SEPARATE:
            found = [getattr(parent, name, None) for name in names]
            if all(isinstance(module, nn.Module) for module in found):
                return found  # type: ignore[return-value]
        for name in _FUSED:
            module = getattr(parent, name, None)
            # With grouped-query attention the fused output is not three equal parts.
            if isinstance(module, nn.Module) and getattr(parent, "num_key_value_groups", 1) == 1:
                return [module]
    raise ConfigError(
        [
            Problem(
                "compression_training.distillation.losses.attention",
                f"layers of class {type(layer).__name__}",
                "layers with query, key and value projections of a known name",
                'use "kind": "maps", or the hidden loss instead',
            )
        ]
    )
