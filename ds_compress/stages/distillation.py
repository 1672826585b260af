"""`distillation`: the student also learns to imitate a frozen teacher.

    "distillation": {"enabled": true, "teacher": "path/to/finetuned", "task_loss_weight": 0.5,
                     "losses": {"logits": {"weight": 1.0, "temperature": 2.0}, "hidden": {"weight": 1.0}}}

The training loop does not change. Each training forward of the student is followed by one of the teacher on
the same inputs, and `engine.backward(loss)` becomes the backward of

    task_loss_weight * loss + sum over the losses of weight * loss_k

so the loss that the script sees, computed by the model or by itself, stays the task's own. Student layer i
imitates teacher layer `layer_map[i]`; by default they are evenly spaced, the last one included.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Collection, Mapping
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.config import distillation as schema
from ds_compress.config.errors import ConfigError, Problem, shown
from ds_compress.config.layer_reduction import LayerReduction
from ds_compress.config.layers import find_layers
from ds_compress.distill.losses import (
    AttentionDistillation,
    DistillationLoss,
    HiddenDistillation,
    LogitsDistillation,
)
from ds_compress.distill.record import Record, Recorder
from ds_compress.stages.base import Stage
from ds_compress.stages.layer_reduction import uniform_map

if TYPE_CHECKING:
    from ds_compress.engine.teacher import Teacher

_PATH = "compression_training.distillation"
# Vocabularies are padded to multiples of up to this many rows; a larger difference is another vocabulary.
_LARGEST_PADDING = 512


class Distillation(Stage):
    name = "distillation"

    def __init__(
        self,
        config: schema.Distillation,
        student: nn.Module,
        teacher: Teacher,
        layer_reduction: LayerReduction | None = None,
    ) -> None:
        self.config = config
        self.teacher = teacher
        _check_pair(config, student, teacher.model)
        losses = config.losses
        self.losses: list[DistillationLoss] = []
        if losses.logits is not None:
            self.losses.append(LogitsDistillation(losses.logits))
        if losses.hidden is not None:
            self.losses.append(HiddenDistillation(losses.hidden))
        if losses.attention is not None:
            self.losses.append(AttentionDistillation(losses.attention, _common_heads(student, teacher.model)))
        self._student = student
        self._prefix = (
            layer_reduction.module_name_prefix if layer_reduction and layer_reduction.enabled else None
        )
        self._stack = ""
        self._mapped: tuple[int, ...] = ()
        self._pending: list[tuple[bool, torch.Tensor]] = []
        self._last: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def attach_engine(self, engine: Any) -> None:
        """Hooks the student's forward and the engine's backward."""
        wants_hidden = self.config.losses.hidden is not None
        wants_relations = self.config.losses.attention is not None
        self._student_records = self._teacher_records = Recorder([], False, False)
        if wants_hidden or wants_relations:
            self._stack, own = find_layers(self._student, self._prefix)
            theirs = find_layers(self.teacher.model, self._prefix)[1]
            if not self._mapped:
                self._mapped = self._layer_map(len(own), len(theirs))
            mapped = [theirs[index] for index in self._mapped]
            self._student_records = Recorder(list(own), wants_hidden, wants_relations)
            self._teacher_records = Recorder(mapped, wants_hidden, wants_relations)
        self._parameters = inspect.signature(self._student.forward).parameters
        self._handles.append(self._student.register_forward_pre_hook(self._before_forward))
        self._handles.append(self._student.register_forward_hook(self._after_forward, with_kwargs=True))
        self._engine = engine
        original = engine.backward

        @functools.wraps(original)
        def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return original(self._total(loss), *args, **kwargs)

        engine.backward = backward

    def drop_layers(self, names: Collection[str]) -> None:
        """The student loses these of its layers: each of the others goes on imitating the layer that it did."""
        stays = [f"{self._stack}.{index}" not in names for index in range(len(self._mapped))]
        self._mapped = tuple(compress(self._mapped, stays))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._student_records.remove()
        self._teacher_records.remove()
        del self._engine.backward

    def _layer_map(self, students: int, depth: int) -> tuple[int, ...]:
        chosen = self.config.layer_map or uniform_map(students, depth)
        if len(chosen) != students or max(chosen) >= depth:
            allowed = f"{students} layer numbers from 0 to {depth - 1}"
            raise ConfigError([Problem(f"{_PATH}.layer_map", shown(list(chosen)), allowed)])
        return tuple(chosen)

    # -- forward and backward ----------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._student_records.start()

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        own = self._student_records.finish()
        self._teacher_records.start()
        imitated = self.teacher.forward(*args, **{k: v for k, v in kwargs.items() if k != "labels"})
        theirs = self._teacher_records.finish()
        own.token_mask = _token_mask(self._parameters, args, kwargs)
        own.logits = _logits(output, has_labels=kwargs.get("labels") is not None)
        theirs.logits = _logits(imitated, has_labels=False)
        _check_records(own, theirs, self.config)
        total = torch.zeros((), device=own.logits.device)
        for loss in self.losses:
            value = loss(own, theirs)
            self._last[loss.name] = value.detach()
            total = total + loss.weight * value
        # An evaluation outside torch.no_grad() leaves a loss that nobody will ask for.
        self._pending = [(trained, earlier) for trained, earlier in self._pending if trained]
        self._pending.append((module.training, total))

    def _total(self, loss: torch.Tensor) -> torch.Tensor:
        imitation, self._pending = self._pending, []
        return self.config.task_loss_weight * loss + sum(total for _, total in imitation)

    def before_step(self, step: int) -> None:
        if any(trained for trained, _ in self._pending):
            raise RuntimeError(
                "distillation: a training forward was never followed by engine.backward(loss); "
                "loss.backward() bypasses the teacher, and forwards that train nothing belong under torch.no_grad()"
            )

    def metrics(self) -> dict[str, float]:
        """The last value of each loss, unweighted."""
        return {name: float(value) for name, value in self._last.items()}


def _token_mask(parameters: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """bool (batch, tokens) from the call's `attention_mask`, however it was passed."""
    mask = {**dict(zip(parameters, args, strict=False)), **kwargs}.get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _logits(output: Any, has_labels: bool) -> torch.Tensor:
    """The prediction in what a model returned: an output with `.logits`, a tuple, or a tensor."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        logits = output["logits"] if isinstance(output, Mapping) else output.logits
    else:
        logits = output[1] if has_labels else output[0]
    return logits


def _check_records(own: Record, theirs: Record, config: schema.Distillation) -> None:
    if any(
        not hidden.requires_grad for hidden in (*own.hidden, *(q for layer in own.relations for q in layer))
    ):
        raise RuntimeError(
            "distillation: the student's hidden states carry no gradient; "
            "use gradient checkpointing with use_reentrant=False"
        )
    for mine, other in zip(own.hidden, theirs.hidden, strict=True):
        if mine.shape != other.shape:
            raise ConfigError(
                [
                    Problem(
                        f"{_PATH}.losses.hidden",
                        f"hidden states {tuple(mine.shape)} and {tuple(other.shape)}",
                        "a teacher with the student's hidden size",
                        "remove the hidden loss; logits and attention work across widths",
                    )
                ]
            )


def _check_pair(config: schema.Distillation, student: nn.Module, teacher: nn.Module) -> None:
    """Raises ConfigError for a teacher that this student cannot imitate, as far as their configs tell."""
    if teacher is student:
        raise ConfigError([Problem(f"{_PATH}.teacher", "the student itself", "another model object")])
    own, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    problems = []
    widths = getattr(own, "hidden_size", None), getattr(theirs, "hidden_size", None)
    if config.losses.hidden is not None and None not in widths and widths[0] != widths[1]:
        problems.append(
            Problem(
                f"{_PATH}.losses.hidden",
                f"a student of hidden size {widths[0]} and a teacher of {widths[1]}",
                "equal hidden sizes",
                "remove the hidden loss; logits and attention work across widths",
            )
        )
    labels = getattr(own, "num_labels", None), getattr(theirs, "num_labels", None)
    if _classifies(student) and None not in labels and labels[0] != labels[1]:
        problems.append(
            Problem(
                f"{_PATH}.teacher",
                f"a teacher of {labels[1]} classes",
                f"{labels[0]} classes, as the student",
            )
        )
    vocabularies: Any = getattr(own, "vocab_size", None), getattr(theirs, "vocab_size", None)
    if None not in vocabularies and abs(vocabularies[0] - vocabularies[1]) > _LARGEST_PADDING:
        problems.append(
            Problem(
                f"{_PATH}.teacher",
                f"a teacher with a vocabulary of {vocabularies[1]}",
                f"{vocabularies[0]}, as the student (padding of up to {_LARGEST_PADDING} rows is cut)",
                "teacher and student must read the same token ids",
            )
        )
    if problems:
        raise ConfigError(problems)


def _classifies(model: nn.Module) -> bool:
    return "Classification" in type(model).__name__


def _common_heads(student: nn.Module, teacher: nn.Module) -> int:
    """The largest number of heads that divides every query, key and value of both models."""
    counts = []
    for model in (student, teacher):
        config: Any = getattr(model, "config", None)
        counts += [getattr(config, key, 0) or 0 for key in ("num_attention_heads", "num_key_value_heads")]
    return math.gcd(*counts) or 1
