"""The layer that makes logits over the vocabulary."""

from __future__ import annotations

from torch import nn


def output_head(model: nn.Module) -> nn.Module | None:
    """What `get_output_embeddings` of a model of transformers gives; None for models without."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        found = getter()
    except (NotImplementedError, AttributeError):  # classes of transformers without a head
        return None
    return found if isinstance(found, nn.Module) else None
