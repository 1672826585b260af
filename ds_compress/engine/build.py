"""From a config and a model to a run: layers reduced, techniques made, classes swapped; nothing is attached yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ds_compress.config.report.plan import Plan
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.distill.teacher import Teacher
from ds_compress.engine.checkpoint import origin
from ds_compress.engine.run import CompressionRun
from ds_compress.engine.teachers.cached import cached_teacher
from ds_compress.engine.teachers.self_teacher import self_teacher
from ds_compress.engine.teachers.sharded import ShardedTeacher
from ds_compress.engine.zero import parameters
from ds_compress.engine.zero.lists_of_experts import keep_lists_together
from ds_compress.errors import ConfigError, Problem, dotted
from ds_compress.export import compatibility
from ds_compress.ops.library import (
    KernelsUnavailableError,
    Preference,
    kernel_preference,
    prefer_unless_chosen,
)
from ds_compress.techniques import TECHNIQUES
from ds_compress.techniques.base import Technique, TechniqueContext
from ds_compress.techniques.layer_reduction import reduce_layers

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


def given_teacher() -> nn.Module | None:
    """The model of the `teacher_given` around this call; None outside of one."""
    return _given_teacher


def prepare_model(
    model: nn.Module, config: CompressionConfig, teacher: nn.Module | None = None
) -> CompressionRun:
    """All that can be done to `model` without an engine: layers cut or filled, classes swapped.

    Raises:
        ConfigError: with all problems of config and model.
    """
    kernels = _kernels_of(config)
    origin.remember(model)
    known: Teacher | None = (
        ShardedTeacher.of(config, teacher, model)
        or cached_teacher(config, model)
        or self_teacher(config, model, before=True)
    )
    removed = reduce_layers(model, config, known.model if known else None, parameters.copy_parameters)
    with kernels:
        run = with_techniques(model, config, config, known or self_teacher(config, model, before=False))
    run.removed, run.kernels = removed, kernels
    return run


def with_techniques(
    model: nn.Module, given: CompressionConfig, config: CompressionConfig, teacher: Teacher | None
) -> CompressionRun:
    """The run of a model whose layers are reduced already.

    given: what the JSON says. config: what of it is still to be done.
    """
    plan = resolve(model, config)
    compatibility.refuse_unfit(plan, model)
    run = CompressionRun(given, plan, make_techniques(model, plan, teacher), model, teacher)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for technique in run.techniques.values():
        run.added += technique.prepare(model, parameters.full_parameters).values()
    run.at_release += [handle.remove for handle in keep_lists_together(model)]
    left = {id(parameter) for parameter in model.parameters()}
    parameters.release(parameter for parameter, _ in before if id(parameter) not in left)
    run.frozen = [p for p, trained in before if id(p) not in left or (trained and not p.requires_grad)]
    origin.mark(model, run.unfinished)
    return run


def make_techniques(model: nn.Module, plan: Plan, teacher: Teacher | None = None) -> dict[str, Technique]:
    """The techniques of a plan by name, not prepared; without a teacher there is none that needs one.

    Raises:
        ConfigError: what only a technique can judge.
    """
    context = TechniqueContext(plan.config, plan, model, teacher, parameters.all_gather_rows)
    made = (_make(cls, context) for cls in TECHNIQUES.values())
    return {technique.name: technique for technique in made if technique is not None}


def _make(cls: type[Technique], context: TechniqueContext) -> Technique | None:
    try:
        return cls.of(context)
    except ConfigError:
        raise
    except ValueError as error:
        # What only the technique can judge, such as a grid that does not fit the shape of a weight.
        problem = Problem(dotted(cls.name), "settings that do not fit this model", str(error))
        raise ConfigError([problem]) from error


def _kernels_of(config: CompressionConfig) -> contextlib.AbstractContextManager[Any]:
    """The block of code in which ops are as the JSON says; made before any weight is touched, so that a preference
    that cannot be met costs nothing. Where no block uses kernels, none are built.
    """
    if not any(block.uses_kernels for block in config.enabled_blocks().values()):
        return contextlib.nullcontext()
    insists = config.insists_on_native
    preference = Preference.NATIVE if insists else Preference(config.kernels)
    try:
        # What is called outside of the engine's own steps, such as an export, goes by the first run of the process.
        prefer_unless_chosen(preference)
        return kernel_preference(preference)
    except KernelsUnavailableError as error:
        problem = Problem(dotted(*(insists or "kernels").split(".")), "native kernels", str(error))
        raise ConfigError([problem]) from error
