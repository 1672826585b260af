"""Captures activations of a forward pass: hidden states, queries, keys and values, attention scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.distill.attention_scores import AttentionScores, subscribe_scores
from ds_compress.distill.projections import find_projections
from ds_compress.distill.router_logits import RouterLogits, routers_of, subscribe_logits

if TYPE_CHECKING:
    from ds_compress.distill.lazy_logits import LazyLogits
    from ds_compress.distill.pending_loss import PendingLoss
    from ds_compress.distill.sparse_logits import SparseLogits


@dataclass
class CapturedActivations:
    """The activations of one forward pass; lists follow the layer map.

    hidden: (batch, tokens, width), output of each mapped layer. relations: per mapped layer (q, k, v), each
    (batch, tokens, width of its projection). maps: attention scores of each mapped layer. routers: of those mapped
    layers that are mixtures of experts, by place in the map. embedding: (batch, tokens, width), input of the first
    layer. last: (batch, tokens, width), output of the last layer. logits: the model's logits, perhaps not computed yet.
    token_mask: bool (batch, tokens), False where the input is padding, or None. pending_loss: the loss over the logits,
    when it may be computed beside the task's.
    """

    logits: torch.Tensor | LazyLogits | SparseLogits | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)
    relations: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    maps: list[AttentionScores] = field(default_factory=list)
    routers: dict[int, RouterLogits] = field(default_factory=dict)
    embedding: torch.Tensor | None = None
    last: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    pending_loss: PendingLoss | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All outputs of layers, which must require a gradient in a student."""
        flat = [*self.hidden, *(tensor for layer in self.relations for tensor in layer)]
        flat += [tensor for layer in self.maps for tensor in (layer.query, layer.key)]
        flat += [router.logits for router in self.routers.values()]
        return flat + ([] if self.last is None else [self.last])


class ActivationCapture:
    """Hooks on the layers of a model that capture between `start` and `finish`.

    Not in between: activation checkpointing runs the layers once more in backward.

    Args:
        layers: the whole stack, first to last. mapped: the indices of those that are compared, in order.
        wanted: names of the fields of `CapturedActivations` to fill.
    """

    def __init__(self, layers: Sequence[nn.Module], mapped: Sequence[int], wanted: Collection[str]) -> None:
        self._found: dict[tuple[str, int, int], Any] = {}
        self._mapped = len(mapped)
        self._recording = False
        self._handles: list[Any] = []
        if "embedding" in wanted:
            self._handles.append(layers[0].register_forward_pre_hook(self._input, with_kwargs=True))
        if "last" in wanted:
            self._handles.append(layers[-1].register_forward_hook(self._output("last", 0)))
        for index, layer in enumerate(layers[at] for at in mapped):
            if "hidden" in wanted:
                self._handles.append(layer.register_forward_hook(self._output("hidden", index)))
            if "relations" in wanted:
                for slot, module in enumerate(find_projections(layer)):
                    self._handles.append(module.register_forward_hook(self._output("relations", index, slot)))
            if "routers" in wanted:
                for router in routers_of(layer)[:1]:
                    self._handles.append(subscribe_logits(router, self._routing(index)))
            if "maps" in wanted:
                self._handles.append(subscribe_scores(layer, self._scores(index)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self) -> None:
        self._found, self._recording = {}, True

    def finish(self) -> CapturedActivations:
        self._recording = False
        found, self._found = self._found, {}
        record = CapturedActivations(embedding=found.get(("embedding", 0, 0)), last=found.get(("last", 0, 0)))
        for index in range(self._mapped):
            if ("hidden", index, 0) in found:
                record.hidden.append(found["hidden", index, 0])
            if ("maps", index, 0) in found:
                record.maps.append(found["maps", index, 0])
            if ("routers", index, 0) in found:
                record.routers[index] = found["routers", index, 0]
            parts = [found[key] for key in sorted(k for k in found if k[:2] == ("relations", index))]
            if parts:
                record.relations.append(tuple(parts) if len(parts) == 3 else tuple(parts[0].chunk(3, dim=-1)))
        return record

    def _keep(self, kind: str, index: int, slot: int, value: Any) -> None:
        # Of a layer that runs twice in a pass (shared weights), the first output is captured.
        if self._recording:
            self._found.setdefault((kind, index, slot), value)

    def _input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._keep("embedding", 0, 0, args[0] if args else kwargs["hidden_states"])

    def _output(self, kind: str, index: int, slot: int = 0) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._keep(kind, index, slot, output[0] if isinstance(output, tuple) else output)

        return hook

    def _routing(self, index: int) -> Any:
        return lambda logits: self._keep("routers", index, 0, logits)

    def _scores(self, index: int) -> Any:
        return lambda scores: self._keep("maps", index, 0, scores)
