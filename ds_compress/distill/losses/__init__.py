"""One file per distillation loss; `LOSSES` maps its key in the JSON to what makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_compress.config.schema.compression_training import register_loss_config
from ds_compress.config.schema.distillation import Loss
from ds_compress.distill.losses.attention import attention_distillation
from ds_compress.distill.losses.base import DistillationLoss, ModelPair
from ds_compress.distill.losses.contrastive import ContrastiveDistillation
from ds_compress.distill.losses.embedding import EmbeddingDistillation
from ds_compress.distill.losses.hidden import HiddenDistillation
from ds_compress.distill.losses.logits import LogitsDistillation
from ds_compress.distill.losses.router import RouterDistillation

LOSSES: dict[str, Callable[[Any, ModelPair], DistillationLoss]] = {
    "logits": LogitsDistillation,
    "hidden": HiddenDistillation,
    "attention": attention_distillation,
    "router": RouterDistillation,
    "embedding": EmbeddingDistillation,
    "contrastive": ContrastiveDistillation,
}


def register_loss(name: str, loss: Callable[[Any, ModelPair], DistillationLoss], config: type[Loss]) -> None:
    """`distillation.losses` has one more key from now on: `config` says what may stand there, `loss` is made of it.

    Raises:
        ValueError: the key is taken.
    """
    if LOSSES.get(name, loss) is not loss:
        raise ValueError(f"there is a loss {name!r} already")
    register_loss_config(name, config)
    LOSSES[name] = loss
