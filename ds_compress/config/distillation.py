"""`distillation`: the teacher, and what of it the student is asked to imitate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.fields import Choice, Conflict, Flag, Real, Section, Whole
from ds_compress.config.layer_reduction import LayerIndices

LossWeight = Annotated[Real, Field(ge=0)]


class LogitsLoss(Section):
    """Kullback-Leibler divergence from the teacher's to the student's softened predictions."""

    weight: LossWeight = Field(default=1.0, description="Factor of this loss.")
    temperature: Annotated[Real, Field(gt=0)] = Field(
        default=1.0, description="Softening of both predictions."
    )


class HiddenLoss(Section):
    """Distance between hidden states of student layers and of the teacher layers they are mapped to."""

    weight: LossWeight = Field(default=1.0, description="Factor of this loss.")
    kind: Literal["mse", "cosine"] = Field(
        default="mse", description="Mean squared error, or one minus the cosine."
    )


class AttentionLoss(Section):
    """Distance between attention maps or relations of student and teacher."""

    weight: LossWeight = Field(default=1.0, description="Factor of this loss.")
    relation_heads: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None,
        description="Heads that queries, keys and values are regrouped to; absent: the model's own heads.",
    )


class Losses(Section):
    """What is imitated; each entry switches one loss on."""

    logits: LogitsLoss | None = Field(default=None, description="Imitate the predictions.")
    hidden: HiddenLoss | None = Field(default=None, description="Imitate the hidden states.")
    attention: AttentionLoss | None = Field(default=None, description="Imitate the attention.")


class Distillation(Section):
    """Adds to the task's loss what the student fails to imitate of a frozen teacher."""

    enabled: Flag = Field(default=False, description="Whether this block does anything.")
    teacher: str | None = Field(
        default=None,
        description="Path or hub name of the teacher; absent: the model passed to ds_compress.initialize.",
    )
    teacher_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="Precision of the teacher's weights; absent: as they are stored."
    )
    teacher_zero_stage: Annotated[Literal[0, 3], Choice] = Field(
        default=3,
        description="3: every process holds a share of the teacher; 0: every process holds all of it.",
    )
    layer_map: LayerIndices | None = Field(
        default=None,
        description="For each student layer, the teacher layer (from 0) that it imitates; absent: automatic.",
    )
    task_loss_weight: LossWeight = Field(default=1.0, description="Factor of the training script's own loss.")
    losses: Losses = Field(
        default_factory=lambda: Losses(logits=LogitsLoss()),
        description="What is imitated; absent: the logits.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.enabled and not any((self.losses.logits, self.losses.hidden, self.losses.attention)):
            yield Conflict(
                ("losses",), {}, 'at least one of "logits", "hidden" or "attention"', 'e.g. {"logits": {}}'
            )
