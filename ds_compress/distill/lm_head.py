"""Which module of a model is its LM head, and how many rows of its logits may exist at a time."""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_compress.distill.lazy_head import LazyHead
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.quant.grid import TokenGranularity
from ds_compress.quant.layers import InputQuantizer

_BYTES_OF_A_CHUNK = 64 * 2**20
_FEWEST_ROWS = 16


def lazy_head(model: Any, chunk: int | None) -> LazyHead | None:
    """The head of a language model of transformers, made lazy; None for every other model, and for a head that
    quantizes its input with one scale for the batch.

    chunk: rows of logits at a time; None: as many fp32 ones as fit 64 MiB.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module) or _has_one_scale_per_batch(head):
        return None
    vocabulary = getattr(head, "out_features", None) or shape_of(head.get_parameter("weight"))[0]
    rows = chunk or max(_FEWEST_ROWS, _BYTES_OF_A_CHUNK // (4 * vocabulary))
    return LazyHead(head, vocabulary, rows)


def _has_one_scale_per_batch(head: nn.Module) -> bool:
    quantizer: InputQuantizer | None = getattr(head, "input_quantizer", None)
    if quantizer is None:
        return False
    return not quantizer.grid.static and quantizer.grid.granularity is TokenGranularity.PER_TENSOR
