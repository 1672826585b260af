"""Records what a forward pass shows of its layers: hidden states, and queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ds_compress.config.errors import ConfigError, Problem

# Names of the projections that make queries, keys and values, in the families of transformers.
_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)
_FUSED = ("c_attn", "qkv", "Wqkv", "qkv_proj")


@dataclass
class Record:
    """One forward pass; lists follow the layer map.

    hidden: (batch, tokens, width) after each mapped layer. relations: per mapped layer (q, k, v), each
    (batch, tokens, width of its projection). logits: the model's prediction. token_mask: bool
    (batch, tokens), False where the input is padding, or None.
    """

    logits: torch.Tensor | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)
    relations: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    token_mask: torch.Tensor | None = None


class Recorder:
    """Hooks on some layers of a model; records between `start` and `finish` only.

    The window matters: activation checkpointing runs the layers once more in backward.
    """

    def __init__(self, layers: Sequence[nn.Module], hidden: bool, relations: bool) -> None:
        self._hidden: dict[int, torch.Tensor] = {}
        self._projected: dict[tuple[int, int], torch.Tensor] = {}
        self._layers = len(layers)
        self._recording = False
        self._handles: list[Any] = []
        for index, layer in enumerate(layers):
            if hidden:
                self._handles.append(layer.register_forward_hook(self._hidden_hook(index)))
            if relations:
                self._handles += self._projection_hooks(index, layer)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self) -> None:
        self._hidden, self._projected, self._recording = {}, {}, True

    def finish(self) -> Record:
        self._recording = False
        hidden = [self._hidden[i] for i in range(self._layers)] if self._hidden else []
        relations = []
        if self._projected:
            slots = range(1 + max(slot for _, slot in self._projected))
            for i in range(self._layers):
                parts = tuple(self._projected[i, slot] for slot in slots)
                relations.append(parts if len(parts) == 3 else parts[0].chunk(3, dim=-1))
        self._hidden, self._projected = {}, {}
        return Record(hidden=hidden, relations=relations)

    def _hidden_hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._recording:
                self._hidden[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def _projection_hooks(self, index: int, layer: nn.Module) -> list[Any]:
        def recorder(slot: int) -> Any:
            def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
                if self._recording:
                    self._projected[index, slot] = output

            return hook

        return [
            projection.register_forward_hook(recorder(slot))
            for slot, projection in enumerate(find_projections(layer))
        ]


def find_projections(layer: nn.Module) -> list[nn.Module]:
    """The modules that make queries, keys and values in a layer: three, or one that makes all of them.

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
                "remove the attention loss, or use the hidden loss instead",
            )
        ]
    )
