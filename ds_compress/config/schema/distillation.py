"""`distillation`: the teacher, and what of it the student is asked to imitate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ds_compress.config.schema.block import Block
from ds_compress.config.schema.fields import (
    Choice,
    Conflict,
    Step,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictModel,
)
from ds_compress.config.schema.layer_reduction import LayerIndices
from ds_compress.errors import listed

LossWeight = Annotated[StrictFloat, Field(ge=0)]
Temperature = Annotated[StrictFloat, Field(gt=0)]
Pooling = Literal["mean", "first", "last"]
_OF_A_MODEL = ("teacher_dtype", "teacher_zero_stage")
_NEEDS_HIDDEN = ("hidden", "attention", "router", "embedding", "contrastive")
_BY_LAYER = ("hidden", "attention", "router")


class Loss(StrictModel):
    """What every loss has: a factor that may change while training."""

    weight: LossWeight = Field(default=1.0, description="Factor of this loss.")
    final_weight: LossWeight | None = Field(
        default=None, description="Factor at schedule_offset_end and after; absent: weight throughout."
    )
    schedule_offset: Step = Field(
        default=0, description="Applied steps before the factor starts to move, linearly, from weight."
    )
    schedule_offset_end: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Applied steps after which the factor is final_weight."
    )

    def weight_at(self, step: int) -> float:
        """The factor at `step` applied steps."""
        if self.final_weight is None or self.schedule_offset_end is None:
            return self.weight
        passed = (step - self.schedule_offset) / (self.schedule_offset_end - self.schedule_offset)
        return self.weight + (self.final_weight - self.weight) * min(1.0, max(0.0, passed))

    def conflicts(self) -> Iterator[Conflict]:
        if (self.final_weight is None) != (self.schedule_offset_end is None):
            missing = "final_weight" if self.final_weight is None else "schedule_offset_end"
            yield Conflict((missing,), None, "a value: final_weight and schedule_offset_end belong together")
        elif self.schedule_offset_end is not None and self.schedule_offset_end <= self.schedule_offset:
            yield Conflict(
                ("schedule_offset_end",),
                self.schedule_offset_end,
                f"more than schedule_offset ({self.schedule_offset})",
            )
        elif self.final_weight is None and self.schedule_offset:
            yield Conflict(
                ("schedule_offset",),
                self.schedule_offset,
                "final_weight beside it: there is nothing to move to",
            )


class LogitsLoss(Loss):
    """A divergence between the softened predictions of teacher and student."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl",
        description="forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); jsd: between both.",
    )
    temperature: Temperature = Field(default=1.0, description="Softening of both predictions.")
    beta: Annotated[StrictFloat, Field(gt=0, lt=1)] = Field(
        default=0.5, description="jsd: share of the teacher in the mixture that both are compared with."
    )
    top_k: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Compare the teacher's k likeliest tokens, and all others together as one; absent: all.",
    )
    chunk_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None,
        description="Tokens whose logits exist at a time; 0: those of the whole batch; absent: as many as fit 64 MiB.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.given("beta") and self.kind != "jsd":
            yield Conflict(("beta",), self.beta, 'kind "jsd" beside it', "remove it, or change kind")


class HiddenLoss(Loss):
    """Distance between hidden states of student layers and of the teacher layers they are mapped to."""

    kind: Literal["mse", "cosine"] = Field(
        default="mse", description="Mean squared error, or one minus the cosine."
    )


class AttentionLoss(Loss):
    """Distance between attention maps or relations of student and teacher."""

    kind: Literal["relation", "maps"] = Field(
        default="relation",
        description=(
            "relation: KL between the self-relations of queries, keys and values (MiniLMv2); maps: mean squared error "
            "between attention scores (TinyBERT), for models with equal numbers of heads."
        ),
    )
    relation_heads: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Heads that queries, keys and values are regrouped to; absent: the model's own heads.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.relation_heads is not None and self.kind != "relation":
            yield Conflict(("relation_heads",), self.relation_heads, 'kind "relation" beside it', "remove it")


class RouterLoss(Loss):
    """Divergence between the routing of mapped layers: which experts of a mixture a token would go to."""

    temperature: Temperature = Field(default=1.0, description="Softening of both.")


class EmbeddingLoss(Loss):
    """Distance between what student and teacher give to their first layers."""

    kind: Literal["mse", "cosine"] = Field(
        default="mse", description="Mean squared error, or one minus the cosine."
    )


class ContrastiveLoss(Loss):
    """An example's representation should be nearer to the teacher's of the same example than to any other."""

    kind: Literal["infonce", "crd"] = Field(
        default="infonce",
        description=(
            "infonce: the right one among all (van den Oord et al. 2018); crd: right or not, one by one (Tian et al. "
            "2020)."
        ),
    )
    temperature: Temperature = Field(default=0.07, description="Divides the cosines.")
    dimension: Annotated[StrictInt, Field(ge=1)] = Field(
        default=128, description="Width that both representations are projected to, by learned matrices."
    )
    queue: Annotated[StrictInt, Field(ge=0)] = Field(
        default=1024,
        description="The teacher's representations of so many earlier examples are negatives too.",
    )
    pooling: Pooling = Field(
        default="mean",
        description="Tokens that represent an example: the mean of all, the first or the last.",
    )
    examples: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="crd: how many examples the training data has."
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if (self.examples is not None) != (self.kind == "crd"):
            allowed = "the number of training examples" if self.kind == "crd" else 'kind "crd" beside it'
            yield Conflict(("examples",), self.examples, allowed)


class Losses(StrictModel):
    """What is imitated; each entry switches one loss on."""

    logits: LogitsLoss | None = Field(default=None, description="Imitate the predictions.")
    hidden: HiddenLoss | None = Field(default=None, description="Imitate the hidden states.")
    attention: AttentionLoss | None = Field(default=None, description="Imitate the attention.")
    router: RouterLoss | None = Field(
        default=None,
        description="Imitate the routers of mixtures of experts; of removed experts nothing is left.",
    )
    embedding: EmbeddingLoss | None = Field(default=None, description="Imitate the input of the first layer.")
    contrastive: ContrastiveLoss | None = Field(
        default=None, description="Tell examples apart as the teacher does."
    )

    def active(self) -> dict[str, Loss]:
        """The losses that are switched on, by key."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if value is not None}


class SelfTeacher(StrictModel):
    """The model teaches itself: no second model is loaded."""

    weights: Literal["initial", "ema", "current"] = Field(
        description=(
            "initial: a sharded copy of the model before any compression, all its layers included; ema: a sharded "
            "moving average of the student; current: the student itself, its quantizers off."
        )
    )
    decay: Annotated[StrictFloat, Field(ge=0, lt=1)] = Field(
        default=0.999, description="ema: what stays of the average at each applied step."
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.given("decay") and self.weights != "ema":
            yield Conflict(("decay",), self.decay, 'weights "ema" beside it', "remove it")


class DistillationConfig(Block):
    """Adds to the task's loss what the student fails to imitate of a frozen teacher."""

    key = "distillation"
    done_after_shrink = True

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    teacher: str | None = Field(
        default=None,
        description="Path or hub name of the teacher; absent: the model passed to ds_compress.initialize.",
    )
    teacher_cache: str | None = Field(
        default=None,
        description="Folder that `ds_compress cache-teacher` wrote: its logits replace the teacher.",
    )
    self_teacher: SelfTeacher | None = Field(
        default=None, description="The model is its own teacher, instead of another one."
    )
    teacher_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="Precision of the teacher's weights; absent: as they are stored."
    )
    teacher_zero_stage: Annotated[Literal[0, 3], Choice] = Field(
        default=3,
        description="3: every process holds a share of the teacher; 0: every process holds all of it.",
    )
    teacher_offload: Literal["none", "cpu"] = Field(
        default="none",
        description="Where a sharded teacher waits: cpu: in host memory, layer by layer on the device.",
    )
    layer_map: LayerIndices | None = Field(
        default=None,
        description="For each student layer, the teacher layer (from 0) that it imitates; absent: automatic.",
    )
    task_loss_weight: LossWeight = Field(
        default=1.0,
        description=(
            "Factor of the training script's own loss; 0: no labels are needed, and those there are unused. Absent "
            'beside quantization and self_teacher "initial" (QAD): 0.'
        ),
    )
    losses: Losses = Field(
        default_factory=lambda: Losses(logits=LogitsLoss()),
        description="What is imitated; absent: the logits.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if not self.enabled:
            return
        if not self.losses.active():
            names = ", ".join(f'"{name}"' for name in type(self.losses).model_fields)
            yield Conflict(("losses",), {}, f"at least one of {names}", 'e.g. {"logits": {}}')
        sources = [
            key for key in ("teacher", "teacher_cache", "self_teacher") if getattr(self, key) is not None
        ]
        if len(sources) > 1:
            yield Conflict(
                (sources[1],), getattr(self, sources[1]), f'no "{sources[0]}" beside it', "keep one"
            )
        if self.teacher_cache is not None:
            yield from self._beyond_a_cache()
        if self.teacher_offload == "cpu" and self.teacher_zero_stage != 3:
            yield Conflict(("teacher_offload",), "cpu", "teacher_zero_stage 3 beside it")
        yield from self._without_effect()
        if self.layer_map is not None:
            yield from self._nothing_to_map()

    def _nothing_to_map(self) -> Iterator[Conflict]:
        if self.self_teacher is not None and self.self_teacher.weights == "current":
            reason, fix = "every layer imitates itself", "remove it"
        elif all(getattr(self.losses, name) is None for name in _BY_LAYER):
            reason, fix = "no loss is by layer", f"remove it, or add {listed(_BY_LAYER, 'or')} to losses"
        else:
            return
        yield Conflict(("layer_map",), self.layer_map, f"nothing: {reason}", fix)

    def _without_effect(self) -> Iterator[Conflict]:
        """Settings of a teacher model that the chosen teacher does not have."""
        weights = self.self_teacher.weights if self.self_teacher is not None else None
        if self.teacher_cache is not None or weights == "current":
            keys: tuple[str, ...] = (*_OF_A_MODEL, "teacher_offload")
            what = "nothing: this teacher is no model of its own"
        elif weights == "ema":
            what, keys = "nothing: the average is in fp32 and sharded as the student is", _OF_A_MODEL
        else:
            return
        for key in keys:
            if self.given(key):
                yield Conflict((key,), getattr(self, key), what, "remove it")

    def _beyond_a_cache(self) -> Iterator[Conflict]:
        for name in _NEEDS_HIDDEN:
            if getattr(self.losses, name) is not None:
                yield Conflict(
                    ("losses", name), {}, "no such loss: a cache holds logits only", "name a teacher"
                )
        if self.losses.logits is not None and self.losses.logits.top_k is not None:
            yield Conflict(
                ("losses", "logits", "top_k"),
                self.losses.logits.top_k,
                "nothing: the cache fixed it",
                "remove it",
            )

    def conflicts_beside(self, enabled: Mapping[str, Block]) -> Iterator[Conflict]:
        weights = self.self_teacher.weights if self.self_teacher else None
        where = (self.key, "self_teacher", "weights")
        if weights == "current" and not any(block.is_in_forward for block in enabled.values()):
            yield Conflict(
                where,
                weights,
                "an enabled weight_quantization or activation_quantization beside it: the teacher is the model "
                "without its quantizers",
                'for a pruned model use "initial" or "ema"',
            )
        quantization = getattr(enabled.get("weight_quantization"), "settings", None)
        if weights == "current" and getattr(quantization, "frozen_weights", "full") == "packed":
            yield Conflict(
                where, weights, '"initial" where frozen_weights is "packed": there are no other weights'
            )
        if weights in ("ema", "current") and any(block.shrinks for block in enabled.values()):
            allowed = '"initial" where shrink_at_end_of_schedule is true: the average has the shape of the whole model'
            yield Conflict(where, weights, allowed)
        if any(getattr(block, "narrows_hidden_states", False) for block in enabled.values()):
            for name in ("hidden", "embedding", "contrastive"):
                if getattr(self.losses, name) is not None:
                    yield Conflict(
                        (self.key, "losses", name),
                        {},
                        "no such loss while hidden_pruning shrinks the width that it compares",
                        "set shrink_at_end_of_schedule to false, or use logits and attention",
                    )
        kept = getattr(enabled.get("layer_reduction"), "kept", None)
        if self.layer_map is not None and kept is not None and len(self.layer_map) != kept:
            allowed = f"{kept} entries, one for each layer that layer_reduction keeps"
            yield Conflict((self.key, "layer_map"), self.layer_map, allowed)

    def describe(self, plan: Any = None) -> str:
        losses = [f"task x {self.task_loss_weight:g}"]
        for name, loss in self.losses.active().items():
            end = "" if loss.final_weight is None else f" to {loss.final_weight:g}"
            kind = getattr(loss, "kind", None)
            losses.append(f"{name} x {loss.weight:g}{end}" + (f" ({kind})" if kind else ""))
        return f"{self._describe_teacher()}; loss = {' + '.join(losses)}"

    def _describe_teacher(self) -> str:
        if self.self_teacher is not None:
            return f"teacher: the model itself ({self.self_teacher.weights})"
        if self.teacher_cache is not None:
            return f"teacher: what {self.teacher_cache} stores"
        teacher = self.teacher or "the model passed to ds_compress.initialize"
        dtype = f" in {self.teacher_dtype}" if self.teacher_dtype else ""
        return f"teacher {teacher}{dtype} at ZeRO stage {self.teacher_zero_stage}"
