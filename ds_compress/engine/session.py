"""One compressed training run: the JSON block, the plan, the stages, and the engine they are attached to."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.config import parse_config
from ds_compress.config.enabled import idle_lines
from ds_compress.config.errors import ROOT, ConfigError, Problem
from ds_compress.config.plan import Plan, TechniquePlan
from ds_compress.config.resolve import resolve
from ds_compress.config.schema import CompressionConfig
from ds_compress.config.structures import KIND_OF_BLOCK, StructurePlan
from ds_compress.engine import (
    checkpoint,
    copies,
    frozen,
    grow,
    origin,
    parameters,
    raw_reads,
    run_end,
    seams,
    sessions,
    shrink,
    tensor_parallel,
)
from ds_compress.engine.cached_teacher import cached_teacher
from ds_compress.engine.loop import LoopHooks
from ds_compress.engine.parameter_traffic import ParameterTraffic
from ds_compress.engine.reduction import GradientReduction
from ds_compress.engine.reduction_limits import refuse_unsupported_reductions, traffic_blocks
from ds_compress.engine.self_teacher import self_teacher
from ds_compress.engine.shards import Shards
from ds_compress.engine.steps import StepHooks
from ds_compress.engine.support import refuse_unsupported
from ds_compress.engine.teacher import Teacher
from ds_compress.export import suits
from ds_compress.ops import KernelsUnavailable, Preference, prefer
from ds_compress.stages import STAGES
from ds_compress.stages.base import Stage
from ds_compress.stages.distillation import Distillation
from ds_compress.stages.layer_reduction import reduce_layers
from ds_compress.stages.structured_pruning import StructuredPruning
from ds_compress.structure.cut import Cuts

logger = logging.getLogger("ds_compress")

_QUANTIZERS = ("weight_quantization", "activation_quantization")
_DONE_WHEN_SHRUNK = (*KIND_OF_BLOCK, "layer_reduction", "distillation")

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
    """What `engine.compression` is; without an engine, what drives the stages in a plain training loop.

    Attributes:
        plan: which weight gets what.
        stages: the attached stages by block name.
        applied_steps: optimizer steps applied so far; what every schedule counts.
        shrunk_units: what is left of the structures that a shrink removed, by name; empty before.
        removed, added: parameters that preparing the model took away, and new ones that an optimizer has to train.
    """

    def __init__(
        self,
        block: Mapping[str, Any],
        plan: Plan,
        stages: dict[str, Stage],
        model: nn.Module,
        teacher: Teacher | None = None,
    ) -> None:
        self.block = block
        self.plan = plan
        self.stages = stages
        self.model = model
        self.teacher = teacher
        self.shrunk_units: dict[str, torch.Tensor] = {}
        self.removed: list[nn.Parameter] = []
        self.added: list[nn.Parameter] = []
        self.said_unfinished_at = self.said_result_at = -1
        self._ended_metrics: dict[str, float] = {}
        self.engine: Any = None
        self._hooks: StepHooks | LoopHooks | None = None
        self._is_released = False
        self._stop_watching: Callable[[], None] = lambda: None
        self.construction: dict[str, Any] = {}
        self.uncut: grow.Uncut | None = None
        self._at_start: dict[str, Any] = {}

    @property
    def config(self) -> CompressionConfig:
        return self.plan.config

    @classmethod
    def prepare(cls, arguments: dict[str, Any], block: Mapping[str, Any], engine_class: str) -> Compression:
        """Checks everything and changes the model; runs before any optimizer exists.

        `arguments`: those of the engine's constructor, edited in place.

        Raises:
            ConfigError: with all problems of block, model and DeepSpeed config that can be known now.
        """
        model: nn.Module = arguments["model"]
        config = parse_config(block)
        refuse_unsupported(model, engine_class, arguments["config_class"], config)
        refuse_unsupported_reductions(config, arguments["config_class"])
        for line in idle_lines(config, block):
            logger.warning("%s", line)
        session = sessions.taken_over(model, block) or cls.of_model(model, block, _given_teacher)
        tensor_parallel.refuse_unsupported(
            session, arguments["config_class"].tensor_parallel_config.autotp_size
        )
        session._enter(arguments)
        return session

    @classmethod
    def of_model(
        cls, model: nn.Module, block: Mapping[str, Any], given_teacher: nn.Module | None = None
    ) -> Compression:
        """What can be done to `model` without an engine: layers cut or filled, classes swapped, nothing attached.

        Raises:
            ConfigError: with all problems of block and model.
        """
        config = parse_config(block)
        _choose_kernels(config)
        origin.remember(model)
        teacher = (
            Teacher.of(config, given_teacher, model)
            or cached_teacher(config, model)
            or self_teacher(config, model, before=True)
        )
        removed = reduce_layers(model, config, teacher.model if teacher else None, parameters.copy_parameters)
        teacher = teacher or self_teacher(config, model, before=False)
        distillation = None
        if teacher is not None and config.distillation is not None and config.distillation.enabled:
            distillation = Distillation(
                config.distillation, model, teacher, config.layer_reduction, parameters.rows_of_all
            )
        session = cls._with_stages(model, block, config, distillation)
        session.removed, session.teacher = removed, teacher
        return session

    @classmethod
    def _with_stages(
        cls,
        model: nn.Module,
        block: Mapping[str, Any],
        config: CompressionConfig,
        distillation: Distillation | None = None,
    ) -> Compression:
        plan = resolve(model, config)
        suits.refuse_unfit(plan, model)
        blocks: dict[str, TechniquePlan | StructurePlan] = {**plan.structures, **plan.techniques}
        stages = {name: _stage(name, technique, config.seed) for name, technique in blocks.items()}
        for traffic in (GradientReduction.of(config), ParameterTraffic.of(config)):
            if traffic is not None:
                stages[traffic.name] = traffic
        if distillation is not None:
            stages[Distillation.name] = distillation
        session = cls(block, plan, stages, model)
        for stage in stages.values():
            session.added += stage.prepare(model, parameters.full_parameters).values()
        origin.mark(model, session.unfinished)
        return session

    @property
    def unfinished(self) -> list[str]:
        """Blocks whose result a plain copy of the weights would lack: quantizers, and units that are only masked."""
        masked = [s.name for s in self.structured if any(u.removable for u in s.structures.values())]
        return [*(name for name in self.stages if name in _QUANTIZERS), *masked]

    def _enter(self, arguments: dict[str, Any]) -> None:
        """Edits the constructor's arguments for the model that this session has prepared."""
        seams.reduce_in_autocast_dtype(arguments["config_class"], self.model)
        seams.tag_parameters(arguments["config_class"], self.model, self.added)
        parameters.adopt_parameters(arguments, self.removed, self.added)

    def construct(self, engine: Any, arguments: Mapping[str, Any], constructor: Callable[..., None]) -> None:
        """Runs DeepSpeed's own constructor on `engine` and attaches; `rebuild` does it again on a smaller model."""
        optimizer, listed = arguments["optimizer"], arguments["model_parameters"]
        if listed and isinstance(listed[0], dict):
            # The optimizer takes these dictionaries for its own, and ZeRO then puts flat tensors into them.
            listed = [{**group, "params": list(group["params"])} for group in listed]
        self.construction = {
            "arguments": {**arguments, "model_parameters": listed},
            "constructor": constructor,
            "client_groups": [list(group["params"]) for group in getattr(optimizer, "param_groups", ())],
        }
        with seams.groups_of_replaced_optimizers():
            constructor(engine, **arguments)
        self.attach(engine)

    def attach(self, engine: Any) -> None:
        """Connects the stages to the constructed engine: fragments, step hooks, loss, checkpoints."""
        if self._hooks is not None:
            self._hooks.remove()
        self._is_released = False
        self._at_start = copy.deepcopy({name: stage.state_dict() for name, stage in self.stages.items()})
        self.engine = engine
        engine.compression = self
        sessions.keep(self.model, self)
        self._hooks = StepHooks(engine, list(self.stages.values()))
        self._map_fragments(check=True)
        distillation = self.stages.get(Distillation.name)
        if isinstance(distillation, Distillation):
            distillation.attach_engine(engine)
        for stage in self.stages.values():
            if isinstance(stage, GradientReduction | ParameterTraffic):
                stage.attach_engine(engine)
        run_end.watch(engine, self)
        self._stop_watching()
        self._stop_watching = raw_reads.watch(engine)
        checkpoint.wrap(engine, self)
        if any(stage.shrinks for stage in self.structured):
            shrink.at_end_of_schedule(engine, self)

    def attach_to_loop(self) -> None:
        """Connects the stages to a training loop without an engine, which calls `end_step` after each step.

        Raises:
            ConfigError: for what only an engine can do.
        """
        if self._hooks is not None:
            return
        _refuse_what_needs_an_engine(self)
        steps = [name for name in self.stages if name not in _QUANTIZERS]
        self._hooks = LoopHooks(list(self.stages.values()), needs_gradients=bool(steps))
        self._map_fragments(check=False)

    @property
    def is_attached(self) -> bool:
        """Whether an engine or a loop drives the stages; before, the model is only prepared."""
        return self._hooks is not None

    def end_step(self) -> None:
        """In a loop without an engine: the optimizer has stepped. With one, which counts by itself, nothing."""
        if isinstance(self._hooks, LoopHooks) and self.engine is None:
            self._hooks.end_step()

    def _map_fragments(self, check: bool) -> None:
        assert self._hooks is not None
        self.shards = Shards.of_model(self.model) if self.engine is None else self._shards_of_engine(check)
        frozen.refuse_learning(self.stages.values(), [fragment.name for fragment in self.shards.unstepped])
        self._hooks.use(self.shards)
        for stage in self.stages.values():
            stage.attach(self.shards)

    def _shards_of_engine(self, check: bool) -> Shards:
        sharded = tensor_parallel.TensorParallel.of_engine(self.engine)
        if sharded is not None:
            # A model may also say it, by `deepspeed.tp_model_init`, where the JSON does not.
            tensor_parallel.refuse_unsupported(self, self.engine.autotp_size())
            tensor_parallel.refuse_replicated(self, sharded)
        return Shards.of_engine(self.engine, check, sharded)

    @property
    def applied_steps(self) -> int:
        return 0 if self._hooks is None else self._hooks.applied_steps

    @property
    def structured(self) -> list[StructuredPruning]:
        """The stages that will remove structures."""
        return [stage for stage in self.stages.values() if isinstance(stage, StructuredPruning)]

    @property
    def structures_are_final(self) -> bool:
        """No mask of a structure will be made any more, and the last ones are in force."""
        return all(stage.is_over and stage.is_applied for stage in self.structured)

    def cuts(self) -> Cuts:
        """What the masks that are in force now will remove from the model."""
        structures = [structure for stage in self.structured for structure in stage.structures.values()]
        return Cuts.of(
            structures, {name: kept for stage in self.structured for name, kept in stage.kept.items()}
        )

    def shrink_to(self, units: Mapping[str, torch.Tensor]) -> None:
        """Shrinks now, to these units, whatever the schedules say; for a checkpoint of a run that had shrunk.

        Raises ValueError when the units are of other structures than those of the JSON.
        """
        known = {name: stage for stage in self.structured for name in stage.structures}
        if set(known) != set(units):
            unknown = sorted(set(known) ^ set(units))
            raise ValueError(
                f"the checkpoint was shrunk in other structures than the JSON has: {unknown[:3]}"
            )
        for name, stage in known.items():
            stage.kept[name] = units[name].clone()
        shrink.shrink(self.engine)

    def refresh_weights(self) -> None:
        """Every weight becomes its rounded fp32 master, for those who are about to read it; a collective."""
        for stage in self.stages.values():
            if isinstance(stage, ParameterTraffic):
                stage.refresh()
        if self.engine is not None:
            copies.refresh(self.engine)

    def metrics(self) -> dict[str, float]:
        """{"<stage>/<number>": value} of all stages; of those that a shrink has ended, the last values."""
        numbers = {
            f"{name}/{key}": v for name, stage in self.stages.items() for key, v in stage.metrics().items()
        }
        return {**self._ended_metrics, **numbers}

    def detach(self) -> None:
        """Takes every hook and class swap away; masked weights stay zero, parameters stay the same objects."""
        self.make_way()
        self._forget_distillation()

    def make_way(self) -> None:
        """As `detach`, for `rebuild` to go on: what distillation learned beside the model stays with it."""
        self._release()
        for stage in self.stages.values():
            stage.detach()
        origin.mark(self.model, [name for name in self.unfinished if name not in _QUANTIZERS])

    def end(self) -> None:
        """Training is over: as `detach`, but quantizers stay on the modules, for those who store what they say."""
        run_end.warn_if_unfinished(self)
        self._release()
        for name, stage in self.stages.items():
            if name not in _QUANTIZERS:
                stage.detach()
        self._forget_distillation()

    def _release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
        if self._hooks is not None:
            self._hooks.remove()
        if sessions.session_of(self.model) is self:
            sessions.forget(self.model)
        self._stop_watching()
        if self.engine is not None:
            checkpoint.unwrap(self.engine)
            run_end.unwatch(self.engine, self)
            vars(self.engine).pop("step", None)
            del self.engine.compression

    def _forget_distillation(self) -> None:
        distillation = self.stages.get(Distillation.name)
        if isinstance(distillation, Distillation):
            distillation.forget()

    def rebuild(self, engine: Any, made: Mapping[int, nn.Parameter | None], cuts: Cuts) -> Compression:
        """The session of the model after `cuts`, attached to `engine`, which is constructed here.

        `made`: the new parameter for the id of each old one. Structured blocks and layer reduction are done; the
        other stages start with the replicated state that they have here.
        """
        arguments = {**self.construction["arguments"], "training_data": None}
        parameters.replace_parameters(arguments, self.construction["client_groups"], made)
        block = {key: value for key, value in self.block.items() if key not in _DONE_WHEN_SHRUNK}
        successor = self._with_stages(arguments["model"], block, parse_config(block))
        successor._enter(arguments)
        successor.block, successor.teacher = self.block, self.teacher
        successor.shrunk_units = {
            name: units for stage in self.structured for name, units in stage.kept.items()
        }
        distillation = self.stages.get(Distillation.name)
        if isinstance(distillation, Distillation):
            for structured in self.structured:
                for name, structure in structured.structures.items():
                    if structure.layers and name in structured.kept:
                        units = structured.kept[name].tolist()
                        distillation.drop_layers(set(structure.layers) - {structure.layers[u] for u in units})
            successor.stages[Distillation.name] = distillation
        successor._ended_metrics = self.metrics()
        successor.construct(engine, arguments, self.construction["constructor"])
        successor._start_at(self.applied_steps)
        for name, stage in successor.stages.items():
            stage.load_state_dict(self.stages[name].renamed_state(_renamed_modules(cuts)))
        return successor

    def rebuild_whole(self, engine: Any, uncut: grow.Uncut) -> Compression:
        """The session of the model that a shrink has cut and that is whole again, attached to `engine`."""
        arguments = {**self.construction["arguments"], "training_data": None}
        model: nn.Module = arguments["model"]
        uncut.into(arguments, model)
        config, distillation = parse_config(self.block), None
        if Distillation.name in self.stages and self.teacher is not None and config.distillation is not None:
            distillation = Distillation(
                config.distillation, model, self.teacher, config.layer_reduction, parameters.rows_of_all
            )
        successor = self._with_stages(model, self.block, config, distillation)
        successor._enter(arguments)
        successor.teacher = self.teacher
        successor.construct(engine, arguments, self.construction["constructor"])
        return successor

    def begin_anew(self) -> None:
        """As after `attach`: nothing is masked, scored or counted yet. For weights that come without our state."""
        self.load_state_dict({"applied_steps": 0, "stages": copy.deepcopy(self._at_start)})
        for stage in self.stages.values():
            stage.load_fragment_state({})
            stage.load_process_state(None)

    def mask_frozen_weights(self) -> None:
        """Puts the masks into weights that no optimizer steps, which a checkpoint may have brought back dense."""
        assert self._hooks is not None
        self._hooks.mask_frozen_weights()

    def _start_at(self, step: int) -> None:
        assert self._hooks is not None
        self._hooks.applied_steps = step

    # -- state, for checkpoints ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "applied_steps": self.applied_steps,
            "shrunk_units": self.shrunk_units,
            "stages": {name: stage.state_dict() for name, stage in self.stages.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores counters and replicated state after the masters were loaded; fragments are mapped anew."""
        self._map_fragments(check=False)
        self._start_at(int(state["applied_steps"]))
        for name, stage in self.stages.items():
            if name in state["stages"]:
                stage.load_state_dict(state["stages"][name])


def _renamed_modules(cuts: Cuts) -> Callable[[str], str | None]:
    def renamed(module: str) -> str | None:
        parameter = cuts.renamed(f"{module}.weight")
        return None if parameter is None else parameter.removesuffix(".weight")

    return renamed


def _refuse_what_needs_an_engine(session: Compression) -> None:
    problems = []
    hint = "deepspeed.initialize takes a prepared model over, also on ZeRO-0 with one process"
    if Distillation.name in session.stages:
        got = "enabled, in a training loop of its own"
        problems.append(Problem(f"{ROOT}.{Distillation.name}", got, "a DeepSpeed engine", hint))
    for block in traffic_blocks(session.config):
        problems.append(Problem(f"{ROOT}.{block}.enabled", "true", "false without a DeepSpeed engine", hint))
    for stage in session.structured:
        if stage.shrinks:
            path = f"{ROOT}.{stage.name}.shared_parameters.shrink_at_end_of_schedule"
            problems.append(Problem(path, "true", "false without a DeepSpeed engine", hint))
    if any(seams.is_zero3_parameter(parameter) for parameter in session.model.parameters()):
        problems.append(Problem(ROOT, "a model under zero.Init", "whole parameters, or an engine", hint))
    if problems:
        raise ConfigError(problems)


def _choose_kernels(config: CompressionConfig) -> None:
    """Before any weight is touched, so that a wish that cannot be met costs nothing."""
    blocks = (config.sparse_pruning, config.weight_quantization, config.activation_quantization)
    structured = (getattr(config, key) for key in KIND_OF_BLOCK)
    wires = (config.gradient_compression, config.parameter_compression)
    if (
        not any(block is not None and block.shared_parameters.enabled for block in blocks)
        and not any(block is not None and block.shared.enabled for block in structured)
        and not any(wire is not None and wire.enabled for wire in wires)
    ):
        return
    insists = config.insists_on_native
    try:
        prefer(Preference.NATIVE if insists else Preference(config.kernels))
    except KernelsUnavailable as error:
        path = f"compression_training.{insists or 'kernels'}"
        raise ConfigError([Problem(path, "native kernels", str(error))]) from error


def _stage(name: str, technique: TechniquePlan | StructurePlan, seed: int) -> Stage:
    try:
        return STAGES[name](technique, seed)
    except ValueError as error:
        # What only the stage can judge, such as a grid that does not fit the shape of a weight.
        path = f"compression_training.{name}"
        raise ConfigError([Problem(path, "settings that do not fit this model", str(error))]) from error
