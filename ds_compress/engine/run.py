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
from ds_compress.config.report.plan import Plan, TechniquePlan
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.resolve.structures import KIND_OF_BLOCK, StructurePlan
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.enabled import idle_lines
from ds_compress.engine import registry, run_end
from ds_compress.engine.admission import refuse_unsupported
from ds_compress.engine.checkpoint import origin, state
from ds_compress.engine.comm.gradient_reduction import GradientReduction
from ds_compress.engine.comm.limits import refuse_unsupported_reductions, traffic_blocks
from ds_compress.engine.comm.parameter_traffic import ParameterTraffic
from ds_compress.engine.resize import grow, shrink
from ds_compress.engine.step import raw_reads
from ds_compress.engine.step.hooks import StepHooks
from ds_compress.engine.step.loop import LoopHooks
from ds_compress.engine.teachers.cached import cached_teacher
from ds_compress.engine.teachers.self_teacher import self_teacher
from ds_compress.engine.teachers.sharded import Teacher
from ds_compress.engine.zero import copies, frozen, internals, parameters, tensor_parallel
from ds_compress.engine.zero.shards import Shards
from ds_compress.errors import ROOT, ConfigError, Problem
from ds_compress.export import compatibility
from ds_compress.ops import KernelsUnavailable, Preference, prefer
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.techniques import TECHNIQUES
from ds_compress.techniques.base import Technique
from ds_compress.techniques.distillation import Distillation
from ds_compress.techniques.layer_reduction import reduce_layers
from ds_compress.techniques.structured_pruning import StructuredPruning

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


class CompressionRun:
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
        techniques: dict[str, Technique],
        model: nn.Module,
        teacher: Teacher | None = None,
    ) -> None:
        self.block = block
        self.plan = plan
        self.techniques = techniques
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
    def prepare(
        cls, arguments: dict[str, Any], block: Mapping[str, Any], engine_class: str
    ) -> CompressionRun:
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
        run = registry.prepared_run(model, block) or cls.of_model(model, block, _given_teacher)
        tensor_parallel.refuse_unsupported(run, arguments["config_class"].tensor_parallel_config.autotp_size)
        run._enter(arguments)
        return run

    @classmethod
    def of_model(
        cls, model: nn.Module, block: Mapping[str, Any], given_teacher: nn.Module | None = None
    ) -> CompressionRun:
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
                config.distillation, model, teacher, config.layer_reduction, parameters.all_gather_rows
            )
        run = cls._with_techniques(model, block, config, distillation)
        run.removed, run.teacher = removed, teacher
        return run

    @classmethod
    def _with_techniques(
        cls,
        model: nn.Module,
        block: Mapping[str, Any],
        config: CompressionConfig,
        distillation: Distillation | None = None,
    ) -> CompressionRun:
        plan = resolve(model, config)
        compatibility.refuse_unfit(plan, model)
        blocks: dict[str, TechniquePlan | StructurePlan] = {**plan.structures, **plan.techniques}
        techniques = {name: _technique(name, technique, config.seed) for name, technique in blocks.items()}
        for traffic in (GradientReduction.of(config), ParameterTraffic.of(config)):
            if traffic is not None:
                techniques[traffic.name] = traffic
        if distillation is not None:
            techniques[Distillation.name] = distillation
        run = cls(block, plan, techniques, model)
        for technique in techniques.values():
            run.added += technique.prepare(model, parameters.full_parameters).values()
        origin.mark(model, run.unfinished)
        return run

    @property
    def unfinished(self) -> list[str]:
        """Blocks whose result a plain copy of the weights would lack: quantizers, and units that are only masked."""
        masked = [s.name for s in self.structured if any(u.removable for u in s.structures.values())]
        return [*(name for name in self.techniques if name in _QUANTIZERS), *masked]

    def _enter(self, arguments: dict[str, Any]) -> None:
        """Edits the constructor's arguments for the model that this session has prepared."""
        internals.reduce_in_autocast_dtype(arguments["config_class"], self.model)
        internals.tag_parameters(arguments["config_class"], self.model, self.added)
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
        with internals.groups_of_replaced_optimizers():
            constructor(engine, **arguments)
        self.attach(engine)

    def attach(self, engine: Any) -> None:
        """Connects the stages to the constructed engine: fragments, step hooks, loss, checkpoints."""
        if self._hooks is not None:
            self._hooks.remove()
        self._is_released = False
        self._at_start = copy.deepcopy(
            {name: technique.state_dict() for name, technique in self.techniques.items()}
        )
        self.engine = engine
        engine.compression = self
        registry.keep(self.model, self)
        self._hooks = StepHooks(engine, list(self.techniques.values()))
        self._map_fragments(check=True)
        distillation = self.techniques.get(Distillation.name)
        if isinstance(distillation, Distillation):
            distillation.attach_engine(engine)
        for technique in self.techniques.values():
            if isinstance(technique, GradientReduction | ParameterTraffic):
                technique.attach_engine(engine)
        run_end.watch(engine, self)
        self._stop_watching()
        self._stop_watching = raw_reads.watch(engine)
        state.wrap(engine, self)
        if any(technique.shrinks for technique in self.structured):
            shrink.at_end_of_schedule(engine, self)

    def attach_to_loop(self) -> None:
        """Connects the stages to a training loop without an engine, which calls `end_step` after each step.

        Raises:
            ConfigError: for what only an engine can do.
        """
        if self._hooks is not None:
            return
        _refuse_what_needs_an_engine(self)
        steps = [name for name in self.techniques if name not in _QUANTIZERS]
        self._hooks = LoopHooks(list(self.techniques.values()), needs_gradients=bool(steps))
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
        frozen.refuse_learning(self.techniques.values(), [fragment.name for fragment in self.shards.frozen])
        self._hooks.use(self.shards)
        for technique in self.techniques.values():
            technique.attach(self.shards)

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
        return [
            technique for technique in self.techniques.values() if isinstance(technique, StructuredPruning)
        ]

    @property
    def structures_are_final(self) -> bool:
        """No mask of a structure will be made any more, and the last ones are in force."""
        return all(technique.is_over and technique.is_applied for technique in self.structured)

    def pruning_plan(self) -> PruningPlan:
        """What the masks that are in force now will remove from the model."""
        structures = [
            structure for technique in self.structured for structure in technique.structures.values()
        ]
        return PruningPlan.of(
            structures, {name: kept for technique in self.structured for name, kept in technique.kept.items()}
        )

    def shrink_to(self, units: Mapping[str, torch.Tensor]) -> None:
        """Shrinks now, to these units, whatever the schedules say; for a checkpoint of a run that had shrunk.

        Raises ValueError when the units are of other structures than those of the JSON.
        """
        known = {name: technique for technique in self.structured for name in technique.structures}
        if set(known) != set(units):
            unknown = sorted(set(known) ^ set(units))
            raise ValueError(
                f"the checkpoint was shrunk in other structures than the JSON has: {unknown[:3]}"
            )
        for name, technique in known.items():
            technique.kept[name] = units[name].clone()
        shrink.shrink(self.engine)

    def refresh_weights(self) -> None:
        """Every weight becomes its rounded fp32 master, for those who are about to read it; a collective."""
        for technique in self.techniques.values():
            if isinstance(technique, ParameterTraffic):
                technique.refresh()
        if self.engine is not None:
            copies.refresh(self.engine)

    def metrics(self) -> dict[str, float]:
        """{"<stage>/<number>": value} of all stages; of those that a shrink has ended, the last values."""
        numbers = {
            f"{name}/{key}": v
            for name, technique in self.techniques.items()
            for key, v in technique.metrics().items()
        }
        return {**self._ended_metrics, **numbers}

    def detach(self) -> None:
        """Takes every hook and class swap away; masked weights stay zero, parameters stay the same objects."""
        self.make_way()
        self._forget_distillation()

    def make_way(self) -> None:
        """As `detach`, for `rebuild` to go on: what distillation learned beside the model stays with it."""
        self._release()
        for technique in self.techniques.values():
            technique.detach()
        origin.mark(self.model, [name for name in self.unfinished if name not in _QUANTIZERS])

    def end(self) -> None:
        """Training is over: as `detach`, but quantizers stay on the modules, for those who store what they say."""
        run_end.warn_if_unfinished(self)
        self._release()
        for name, technique in self.techniques.items():
            if name not in _QUANTIZERS:
                technique.detach()
        self._forget_distillation()

    def _release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
        if self._hooks is not None:
            self._hooks.remove()
        if registry.run_of(self.model) is self:
            registry.forget(self.model)
        self._stop_watching()
        if self.engine is not None:
            state.unwrap(self.engine)
            run_end.unwatch(self.engine, self)
            vars(self.engine).pop("step", None)
            del self.engine.compression

    def _forget_distillation(self) -> None:
        distillation = self.techniques.get(Distillation.name)
        if isinstance(distillation, Distillation):
            distillation.forget()

    def rebuild(
        self, engine: Any, made: Mapping[int, nn.Parameter | None], pruning_plan: PruningPlan
    ) -> CompressionRun:
        """The session of the model after `pruning_plan`, attached to `engine`, which is constructed here.

        `made`: the new parameter for the id of each old one. Structured blocks and layer reduction are done; the
        other stages start with the replicated state that they have here.
        """
        arguments = {**self.construction["arguments"], "training_data": None}
        parameters.replace_parameters(arguments, self.construction["client_groups"], made)
        block = {key: value for key, value in self.block.items() if key not in _DONE_WHEN_SHRUNK}
        successor = self._with_techniques(arguments["model"], block, parse_config(block))
        successor._enter(arguments)
        successor.block, successor.teacher = self.block, self.teacher
        successor.shrunk_units = {
            name: units for technique in self.structured for name, units in technique.kept.items()
        }
        distillation = self.techniques.get(Distillation.name)
        if isinstance(distillation, Distillation):
            for structured in self.structured:
                for name, structure in structured.structures.items():
                    if structure.layers and name in structured.kept:
                        units = structured.kept[name].tolist()
                        distillation.drop_layers(set(structure.layers) - {structure.layers[u] for u in units})
            successor.techniques[Distillation.name] = distillation
        successor._ended_metrics = self.metrics()
        successor.construct(engine, arguments, self.construction["constructor"])
        successor._start_at(self.applied_steps)
        for name, technique in successor.techniques.items():
            technique.load_state_dict(self.techniques[name].renamed_state(_renamed_modules(pruning_plan)))
        return successor

    def rebuild_whole(self, engine: Any, uncut: grow.Uncut) -> CompressionRun:
        """The session of the model that a shrink has cut and that is whole again, attached to `engine`."""
        arguments = {**self.construction["arguments"], "training_data": None}
        model: nn.Module = arguments["model"]
        uncut.into(arguments, model)
        config, distillation = parse_config(self.block), None
        if (
            Distillation.name in self.techniques
            and self.teacher is not None
            and config.distillation is not None
        ):
            distillation = Distillation(
                config.distillation, model, self.teacher, config.layer_reduction, parameters.all_gather_rows
            )
        successor = self._with_techniques(model, self.block, config, distillation)
        successor._enter(arguments)
        successor.teacher = self.teacher
        successor.construct(engine, arguments, self.construction["constructor"])
        return successor

    def begin_anew(self) -> None:
        """As after `attach`: nothing is masked, scored or counted yet. For weights that come without our state."""
        self.load_state_dict({"applied_steps": 0, "stages": copy.deepcopy(self._at_start)})
        for technique in self.techniques.values():
            technique.load_fragment_state({})
            technique.load_process_state(None)

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
            "stages": {name: technique.state_dict() for name, technique in self.techniques.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores counters and replicated state after the masters were loaded; fragments are mapped anew."""
        self._map_fragments(check=False)
        self._start_at(int(state["applied_steps"]))
        for name, technique in self.techniques.items():
            if name in state["stages"]:
                technique.load_state_dict(state["stages"][name])


def _renamed_modules(pruning_plan: PruningPlan) -> Callable[[str], str | None]:
    def renamed(module: str) -> str | None:
        parameter = pruning_plan.renamed(f"{module}.weight")
        return None if parameter is None else parameter.removesuffix(".weight")

    return renamed


def _refuse_what_needs_an_engine(run: CompressionRun) -> None:
    problems = []
    hint = "deepspeed.initialize takes a prepared model over, also on ZeRO-0 with one process"
    if Distillation.name in run.techniques:
        got = "enabled, in a training loop of its own"
        problems.append(Problem(f"{ROOT}.{Distillation.name}", got, "a DeepSpeed engine", hint))
    for block in traffic_blocks(run.config):
        problems.append(Problem(f"{ROOT}.{block}.enabled", "true", "false without a DeepSpeed engine", hint))
    for technique in run.structured:
        if technique.shrinks:
            path = f"{ROOT}.{technique.name}.shared_parameters.shrink_at_end_of_schedule"
            problems.append(Problem(path, "true", "false without a DeepSpeed engine", hint))
    if any(internals.is_zero3_parameter(parameter) for parameter in run.model.parameters()):
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


def _technique(name: str, technique: TechniquePlan | StructurePlan, seed: int) -> Technique:
    try:
        return TECHNIQUES[name](technique, seed)
    except ValueError as error:
        # What only the stage can judge, such as a grid that does not fit the shape of a weight.
        path = f"compression_training.{name}"
        raise ConfigError([Problem(path, "settings that do not fit this model", str(error))]) from error
