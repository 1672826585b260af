"""One file per distillation loss; `LOSSES` maps its key in the JSON to what makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ds_compress.distill.losses.attention import attention_distillation
from ds_compress.distill.losses.base import DistillationLoss, Pair
from ds_compress.distill.losses.contrastive import ContrastiveDistillation
from ds_compress.distill.losses.embedding import EmbeddingDistillation
from ds_compress.distill.losses.hidden import HiddenDistillation
from ds_compress.distill.losses.logits import LogitsDistillation

LOSSES: Mapping[str, Callable[[Any, Pair], DistillationLoss]] = {
    "logits": LogitsDistillation,
    "hidden": HiddenDistillation,
    "attention": attention_distillation,
    "embedding": EmbeddingDistillation,
    "contrastive": ContrastiveDistillation,
}
