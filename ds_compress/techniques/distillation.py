"""`distillation`: the student also learns to imitate a frozen teacher.

    "distillation": {"enabled": true, "teacher": "path/to/finetuned", "task_loss_weight": 0.5,
                     "losses": {"logits": {"weight": 1.0, "temperature": 2.0}, "hidden": {"weight": 1.0}}}

The training loop does not change. Each training forward of the student is preceded by one of the teacher on
the same inputs, and `engine.backward(loss)` becomes the backward of

    task_loss_weight * loss + sum over the losses of weight * loss_k

so the loss that the script sees, computed by the model or by itself, stays the task's own. Student layer i
imitates teacher layer `layer_map[i]`; by default they are evenly spaced, the last one included. Logits of language
models exist a chunk at a time only: see `distill.lazy_logits`.

The teacher is another model (`teacher`, or an object given to `ds_compress.initialize`), the model itself
(`self_teacher`), or a folder of stored logits (`teacher_cache`). With `task_loss_weight` 0 no labels are needed:
the loss that the model returns then is the imitation.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.config.schema import distillation as schema
from ds_compress.config.schema.layer_reduction import LayerReductionConfig
from ds_compress.distill.activation_capture import ActivationCapture, CapturedActivations
from ds_compress.distill.attention_scores import expose_scores, hide_scores
from ds_compress.distill.compatibility import check_captured, check_pair, common_heads, hidden_widths
from ds_compress.distill.lazy_head import LazyHead
from ds_compress.distill.lm_head import lazy_head
from ds_compress.distill.losses import LOSSES, DistillationLoss, ModelPair
from ds_compress.distill.losses.logits import LogitsDistillation
from ds_compress.distill.router_logits import routers_of
from ds_compress.errors import ConfigError, Problem, shown
from ds_compress.modelinfo.auxiliary import AUXILIARY
from ds_compress.modelinfo.layers import find_layers
from ds_compress.techniques.base import Technique, TechniqueContext
from ds_compress.techniques.layer_reduction import uniform_map

if TYPE_CHECKING:
    from ds_compress.distill.teacher import Teacher
    from ds_compress.techniques.training_engine import TrainingEngine

_PATH = "compression_training.distillation"
_ANOTHER_TEACHER = (
    "distillation: the teacher is not the one that the checkpoint was trained with, so losses differ from those of an "
    'unbroken run. Give it the same one; self_teacher.weights "initial" is what the model was built with'
)

logger = logging.getLogger("ds_compress")


class Distillation(Technique):
    name = "distillation"
    survives_shrink = True

    @classmethod
    def of(cls, context: TechniqueContext) -> Distillation | None:
        block = context.config.distillation
        if block is None or not block.enabled or context.teacher is None:
            return None
        reduction = context.config.layer_reduction
        return cls(block, context.model, context.teacher, reduction, context.all_gather_rows)

    def __init__(
        self,
        config: schema.DistillationConfig,
        student: nn.Module,
        teacher: Teacher,
        layer_reduction: LayerReductionConfig | None = None,
        gather: Callable[[torch.Tensor], tuple[torch.Tensor, int]] | None = None,
    ) -> None:
        """`gather`: [rows, ...] of this process -> those of all, and where its own begin."""
        self.config = config
        self.teacher = teacher
        self._student = student
        check_pair(config, student, teacher.model)
        pair = ModelPair(hidden_widths(student, teacher.model), common_heads(student, teacher.model))
        if gather is not None:
            pair = ModelPair(pair.widths, pair.heads, gather)
        self.losses: dict[str, DistillationLoss] = {
            name: LOSSES[name](loss, pair) for name, loss in config.losses.active().items()
        }
        self._prefix = (
            layer_reduction.module_name_prefix if layer_reduction and layer_reduction.enabled else None
        )
        self._stack = ""
        self._mapped: tuple[int, ...] = ()
        self._step = 0
        self._identity: str | None = None
        self._teacher_is_known = False
        self._theirs: CapturedActivations | None = None
        self._pending: list[tuple[bool, Callable[[], torch.Tensor]]] = []
        self._last: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._heads: tuple[LazyHead, ...] = ()
        self._restore_backward: Callable[[], None] = lambda: None

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        learned = nn.ModuleDict(
            {n: loss.module for n, loss in self.losses.items() if loss.module is not None}
        )
        if not learned:
            return {}
        learned.to(dtype=next(model.parameters()).dtype, device=next(model.parameters()).device)
        model.add_module(AUXILIARY, learned)
        added = {f"{AUXILIARY}.{name}": parameter for name, parameter in learned.named_parameters()}
        if getattr(model, "_keys_to_ignore_on_save", self) is not self:
            # What transformers saves is the model, as others load it.
            model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *added}  # type: ignore[assignment, misc]
        return added

    def attach_engine(self, engine: TrainingEngine) -> None:
        """Hooks the student's forward and the engine's backward."""
        self._record_layers()
        logits = self.config.losses.logits
        if logits is not None and logits.chunk_tokens != 0:
            heads = (
                lazy_head(self._student, logits.chunk_tokens),
                lazy_head(self.teacher.model, logits.chunk_tokens),
            )
            self._heads = tuple(head for head in heads if head is not None)
            if len(self._heads) < 2 and self.teacher.model is not None:
                self._heads = ()
        self._parameters = inspect.signature(self._student.forward).parameters
        before = self._student.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        after = self._student.register_forward_hook(self._after_forward, with_kwargs=True)
        last = self._student.register_forward_hook(self._end_forward, always_call=True)
        self._handles += [before, after, last]
        self._restore_backward = engine.transform_loss(self._total)

    def _record_layers(self) -> None:
        wanted = {record for loss in self.losses.values() for record in loss.captures} - {"logits"}
        self._student_capture = self._teacher_capture = ActivationCapture([], [], ())
        if not wanted:
            return
        assert self.teacher.model is not None
        self._stack, own = find_layers(self._student, self._prefix)
        theirs = find_layers(self.teacher.model, self._prefix)[1]
        if not self._mapped:
            self._mapped = self._layer_map(len(own), len(theirs))
        if "routers" in wanted and not any(
            routers_of(layer) and routers_of(theirs[place])
            for layer, place in zip(own, self._mapped, strict=True)
        ):
            got = "models of which no two mapped layers are mixtures of experts"
            raise ConfigError(
                [Problem(f"{_PATH}.losses.router", got, "mixtures of experts", "remove the loss")]
            )
        if "maps" in wanted:
            expose_scores(self._student)
            expose_scores(self.teacher.model)
        self._student_capture = ActivationCapture(list(own), range(len(own)), wanted)
        self._teacher_capture = ActivationCapture(list(theirs), self._mapped, wanted)

    def drop_layers(self, names: Collection[str]) -> None:
        """The student loses these of its layers: each of the others goes on imitating the layer that it did."""
        stays = [f"{self._stack}.{index}" not in names for index in range(len(self._mapped))]
        self._mapped = tuple(compress(self._mapped, stays))

    def detach(self) -> None:
        """What was learned beside the model stays with it until `forget`."""
        for handle in self._handles:
            handle.remove()
        self._student_capture.remove()
        self._teacher_capture.remove()
        for head in self._heads:
            head.remove()
        self._handles, self._heads = [], ()
        for model in (self._student, self.teacher.model):
            if model is not None:
                hide_scores(model)
        self._restore_backward()

    def forget(self) -> None:
        """Training is over: the model loses what was learned beside it."""
        self._student._modules.pop(AUXILIARY, None)

    def without_engine(self) -> Iterator[Problem]:
        hint = "deepspeed.initialize takes a prepared model over, also on ZeRO-0 with one process"
        yield Problem(_PATH, "enabled, in a training loop of its own", "a DeepSpeed engine", hint)

    def _layer_map(self, students: int, depth: int) -> tuple[int, ...]:
        chosen = self.config.layer_map or uniform_map(students, depth)
        if len(chosen) != students or max(chosen) >= depth:
            allowed = f"{students} layer numbers from 0 to {depth - 1}"
            raise ConfigError([Problem(f"{_PATH}.layer_map", shown(list(chosen)), allowed)])
        return tuple(chosen)

    # -- forward and backward ----------------------------------------------------------------------------

    @property
    def _is_label_free(self) -> bool:
        return self.config.task_loss_weight == 0

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        unlabelled = _without_labels(self._parameters, args, kwargs)
        self._theirs = self._teacher_activations(*unlabelled)
        self._theirs.token_mask = _token_mask(self._parameters, args, kwargs)
        if self._heads:
            loss = self.losses["logits"]
            assert isinstance(loss, LogitsDistillation)
            self._heads[0].pending_loss = loss.pending_loss(self._theirs, self._theirs.token_mask)
            self._heads[0].is_on = True
        self._student_capture.start()
        return unlabelled if self._is_label_free else None

    def _teacher_activations(self, args: Any, kwargs: Mapping[str, Any]) -> CapturedActivations:
        """What the teacher says, and shows, of the same inputs."""
        self._teacher_capture.start()
        if len(self._heads) > 1:
            self._heads[1].is_on = True
        try:
            output = self.teacher.forward(*args, **kwargs)
        finally:
            if len(self._heads) > 1:
                self._heads[1].is_on = False
        record = self._teacher_capture.finish()
        record.logits = _logits(output, has_labels=False) if "logits" in self.losses else None
        return record

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        own, theirs = self._student_capture.finish(), self._theirs
        assert theirs is not None
        own.token_mask = theirs.token_mask
        if "logits" in self.losses:
            own.logits = _logits(output, _named(self._parameters, args, kwargs).get("labels") is not None)
        if self._heads:
            own.pending_loss = self._heads[0].pending_loss
            self._close_head()
        check_captured(own, theirs)
        total = self._total_of(own, theirs)
        # An evaluation outside torch.no_grad() leaves a loss that nobody will ask for.
        self._pending = [(trained, earlier) for trained, earlier in self._pending if trained]
        self._pending.append((module.training, total))
        return _with_loss(output, total()) if self._is_label_free else None

    def _end_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """After every forward; one that raised leaves nothing to the evaluation that may follow it."""
        if not torch.is_grad_enabled():
            return
        self._theirs = None
        self._student_capture.finish()
        self._close_head()

    def _close_head(self) -> None:
        if self._heads:
            self._heads[0].pending_loss = None
            self._heads[0].is_on = False

    def _total_of(self, own: CapturedActivations, theirs: CapturedActivations) -> Callable[[], torch.Tensor]:
        """The weighted sum of the losses; that of lazy logits waits, for the script's cross entropy may join it."""
        early = {
            name: self._value(name, own, theirs)
            for name in self.losses
            if name != "logits" or not self._heads
        }
        late = [name for name in self.losses if name not in early]

        @functools.cache
        def total() -> torch.Tensor:
            values = [*early.values(), *(self._value(name, own, theirs) for name in late)]
            return torch.stack(values).sum()

        return total

    def _value(self, name: str, own: CapturedActivations, theirs: CapturedActivations) -> torch.Tensor:
        loss = self.losses[name]
        value = loss(own, theirs).float()
        self._last[name] = value.detach()
        return loss.weight_at(self._step) * value

    def _total(self, loss: torch.Tensor) -> torch.Tensor:
        pending, self._pending = self._pending, []
        imitation = sum((total() for _, total in pending), torch.zeros((), device=loss.device))
        if self._is_label_free:
            return imitation if pending else loss
        return self.config.task_loss_weight * loss + imitation

    # -- steps -------------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        if any(trained for trained, _ in self._pending):
            raise RuntimeError(
                "distillation: a training forward was never followed by engine.backward(loss); "
                "loss.backward() bypasses the teacher, and forwards that train nothing belong under torch.no_grad()"
            )

    def after_step(self, step: int) -> None:
        self._step = step
        self.teacher.follow(self._student)

    def state_dict(self) -> dict[str, Any]:
        losses = {name: loss.state_dict() for name, loss in self.losses.items()}
        return {"step": self._step, "losses": losses, "teacher": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state.get("step", 0))
        if self._identity is not None and state.get("teacher") not in (None, self._identity):
            logger.warning("ds_compress: %s", _ANOTHER_TEACHER)
        for name, remembered in state.get("losses", {}).items():
            if remembered and name in self.losses:
                self.losses[name].load_state_dict(remembered)

    def fragment_state(self) -> dict[str, dict[str, torch.Tensor]]:
        return self.teacher.fragment_state(self._fragments)

    def load_fragment_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.teacher.load_fragment_state(self._fragments, state)

    def attach(self, shards: Any) -> None:
        self._fragments = shards
        self.teacher.place(self._student, shards)
        if not self._teacher_is_known:
            self._identity, self._teacher_is_known = self.teacher.identity(), True

    def metrics(self) -> dict[str, float]:
        """The last value of each loss, unweighted."""
        return {name: float(value) for name, value in self._last.items()}

    def history(self, step: int) -> Mapping[str, float | torch.Tensor]:
        return self._last


def _named(parameters: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the call by name, however they were passed."""
    return {**dict(zip(parameters, args, strict=False)), **kwargs}


def _without_labels(
    parameters: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the same call, but for `labels`."""
    names = [*parameters][: len(args)]
    positional = tuple(
        None if name == "labels" else value for name, value in zip(names, args, strict=False)
    ) + tuple(args[len(names) :])
    return positional, {name: value for name, value in kwargs.items() if name != "labels"}


def _token_mask(parameters: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """bool (batch, tokens) from the call's `attention_mask`, however it was passed."""
    mask = _named(parameters, args, kwargs).get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _logits(output: Any, has_labels: bool) -> Any:
    """The prediction in what a model returned: an output with `.logits`, a tuple, or a tensor."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        return output["logits"] if isinstance(output, Mapping) else output.logits
    return output[1] if has_labels else output[0]


def _with_loss(output: Any, loss: torch.Tensor) -> Any:
    """What a model returned without labels, now with a loss, as it would be with labels."""
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]
        return output
    return (loss, *output) if isinstance(output, tuple) else output
