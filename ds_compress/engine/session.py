"""One compressed training run: the JSON block, the plan, the stages, and the engine they are attached to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ds_compress.config import parse_config
from ds_compress.config.errors import ConfigError, Problem
from ds_compress.config.plan import Plan, TechniquePlan
from ds_compress.config.resolve import resolve
from ds_compress.config.schema import CompressionConfig
from ds_compress.engine import checkpoint, parameters, seams
from ds_compress.engine.shards import Shards
from ds_compress.engine.steps import StepHooks
from ds_compress.engine.support import refuse_unsupported
from ds_compress.engine.teacher import Teacher
from ds_compress.ops import KernelsUnavailable, Preference, prefer
from ds_compress.stages import STAGES
from ds_compress.stages.base import Stage
from ds_compress.stages.distillation import Distillation
from ds_compress.stages.layer_reduction import reduce_layers

logger = logging.getLogger("ds_compress")

_given_teacher: nn.Module | None = None


@contextlib.contextmanager
def teacher_given(teacher: nn.Module | None) -> Iterator[None]:
    """The engine constructed inside this block distils from `teacher` (`ds_compress.initialize(teacher=)`)."""
    global _given_teacher
    previous, _given_teacher = _given_teacher, teacher
    try:
        yield
    finally:
        _given_teacher = previous


class Compression:
    """What `engine.compression` is.

    Attributes:
        plan: which weight gets what.
        stages: the attached stages by block name.
        applied_steps: optimizer steps applied so far; what every schedule counts.
    """

    def __init__(
        self, config: CompressionConfig, plan: Plan, stages: dict[str, Stage], model: nn.Module
    ) -> None:
        self.config = config
        self.plan = plan
        self.stages = stages
        self.model = model

    @classmethod
    def prepare(cls, arguments: dict[str, Any], block: Mapping[str, Any], engine_class: str) -> Compression:
        """Checks everything and changes the model; runs before any optimizer exists.

        `arguments`: those of the engine's constructor, edited in place.

        Raises:
            ConfigError: with all problems of block, model and DeepSpeed config that can be known now.
        """
        model: nn.Module = arguments["model"]
        config = parse_config(block)
        refuse_unsupported(model, engine_class, arguments["config_class"])
        _choose_kernels(config)
        teacher = Teacher.of(config, _given_teacher, model)
        removed = reduce_layers(model, config, teacher.model if teacher else None, parameters.copy_parameters)
        plan = resolve(model, config)
        stages = {name: _stage(name, technique, config.seed) for name, technique in plan.techniques.items()}
        if teacher is not None and config.distillation is not None and config.distillation.enabled:
            stages[Distillation.name] = Distillation(
                config.distillation, model, teacher, config.layer_reduction
            )
        added: dict[str, nn.Parameter] = {}
        for stage in stages.values():
            added.update(stage.prepare(model, parameters.full_parameters))
        seams.reduce_in_autocast_dtype(arguments["config_class"], model)
        parameters.adopt_parameters(arguments, removed, list(added.values()))
        return cls(config, plan, stages, model)

    def attach(self, engine: Any) -> None:
        """Connects the stages to the constructed engine: fragments, step hooks, loss, checkpoints."""
        self.engine = engine
        engine.compression = self
        self._hooks = StepHooks(engine, list(self.stages.values()))
        self._map_fragments(check=True)
        distillation = self.stages.get(Distillation.name)
        if isinstance(distillation, Distillation):
            distillation.attach_engine(engine)
        checkpoint.wrap(engine, self)
        logger.info("ds_compress: %s", ", ".join(self.stages) or "no stage enabled")

    def _map_fragments(self, check: bool) -> None:
        self.shards = Shards.of_engine(self.engine, check=check)
        self._hooks.use(self.shards)
        for stage in self.stages.values():
            stage.attach(self.shards)

    @property
    def applied_steps(self) -> int:
        return self._hooks.applied_steps

    def metrics(self) -> dict[str, float]:
        """{"<stage>/<number>": value} of all stages."""
        return {
            f"{name}/{key}": v for name, stage in self.stages.items() for key, v in stage.metrics().items()
        }

    def detach(self) -> None:
        """Takes every hook and class swap away; masked weights stay zero, parameters stay the same objects."""
        self._hooks.remove()
        checkpoint.unwrap(self.engine)
        for stage in self.stages.values():
            stage.detach()
        del self.engine.compression

    # -- state, for checkpoints ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "applied_steps": self.applied_steps,
            "stages": {name: stage.state_dict() for name, stage in self.stages.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores counters and replicated state after the masters were loaded; fragments are mapped anew."""
        self._map_fragments(check=False)
        self._hooks.applied_steps = int(state["applied_steps"])
        for name, stage in self.stages.items():
            if name in state["stages"]:
                stage.load_state_dict(state["stages"][name])


def _choose_kernels(config: CompressionConfig) -> None:
    """Before any weight is touched, so that a wish that cannot be met costs nothing."""
    blocks = (config.sparse_pruning, config.weight_quantization, config.activation_quantization)
    if not any(block is not None and block.shared_parameters.enabled for block in blocks):
        return
    insists = config.insists_on_native
    try:
        prefer(Preference.NATIVE if insists else Preference(config.kernels))
    except KernelsUnavailable as error:
        path = f"compression_training.{insists or 'kernels'}"
        raise ConfigError([Problem(path, "native kernels", str(error))]) from error


def _stage(name: str, technique: TechniquePlan, seed: int) -> Stage:
    try:
        return STAGES[name](technique, seed)
    except ValueError as error:
        # What only the stage can judge, such as a grid that does not fit the shape of a weight.
        path = f"compression_training.{name}"
        raise ConfigError([Problem(path, "settings that do not fit this model", str(error))]) from error
