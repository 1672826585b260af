"""A run and what drives it: an engine of DeepSpeed, or a training loop without one."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.enabled import idle_lines
from ds_compress.engine import admission, build, registry, run_end
from ds_compress.engine.checkpoint.join import join_checkpoints
from ds_compress.engine.construction import adopt
from ds_compress.engine.resize import shrink
from ds_compress.engine.run import CompressionRun
from ds_compress.engine.step import raw_reads
from ds_compress.engine.step.hooks import StepHooks
from ds_compress.engine.step.loop import LoopHooks
from ds_compress.engine.training_engine import DeepSpeedTraining
from ds_compress.engine.zero.shards import shards_of
from ds_compress.engine.zero.tensor_parallel import layer_shards
from ds_compress.sharding.shards import Shards

logger = logging.getLogger("ds_compress")


def prepare(arguments: dict[str, Any], config: CompressionConfig, engine_class: str) -> CompressionRun:
    """Checks everything and changes the model; runs before any optimizer exists.

    `arguments`: those of the engine's constructor, edited in place.

    Raises:
        ConfigError: with all problems of block, model and DeepSpeed config that can be known now.
    """
    model: nn.Module = arguments["model"]
    ds_config = arguments["config_class"]
    admission.refuse_unsupported(model, engine_class, ds_config, config)
    for line in idle_lines(config):
        logger.warning("%s", line)
    run = registry.prepared_run(model, config) or build.prepare_model(model, config, build.given_teacher())
    admission.refuse_tensor_parallel(run.config, run.techniques, ds_config.tensor_parallel_config.autotp_size)
    adopt(run, arguments)
    return run


def attach(run: CompressionRun, engine: Any) -> None:
    """Connects the techniques to the constructed engine: fragments, step hooks, loss, checkpoints. A collective."""
    is_first = True

    def find_shards() -> Shards:
        nonlocal is_first
        checks, is_first = is_first, False
        layers = layer_shards(engine)
        if layers is not None:
            # A model may also say it, by `deepspeed.tp_model_init`, where the JSON does not.
            admission.refuse_tensor_parallel(run.config, run.techniques, engine.autotp_size())
            admission.refuse_replicated(run.plan.weights, run.techniques, layers)
        return shards_of(engine, checks, layers)

    engine.compression = run
    registry.keep(run.model, run)
    training = DeepSpeedTraining(engine)
    with run.kernels:
        run.connect(engine, StepHooks(engine, list(run.techniques.values())), find_shards)
        for technique in run.techniques.values():
            technique.attach_engine(training)
    _use_kernels(engine, run)
    run.loss.watch(engine, run.patches)
    run_end.watch(engine, run)
    raw_reads.watch(engine, run.patches)
    join_checkpoints(engine, run)
    if any(technique.shrinks for technique in run.techniques.values()):
        shrink.at_end_of_schedule(engine, run)


def _use_kernels(engine: Any, run: CompressionRun) -> None:
    """Whatever the engine's own steps call runs on this run's kernels, whatever other engines prefer."""

    def replace(name: str) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            with run.kernels:
                return original(*args, **kwargs)

        original = run.patches.install(engine, name, call)

    for name in ("forward", "backward", "step"):
        replace(name)


def attach_to_loop(run: CompressionRun) -> None:
    """Connects the techniques to a training loop without an engine, which calls `run.end_step` after each step.

    Raises:
        ConfigError: for what only an engine can do.
    """
    if run.is_attached:
        return
    admission.refuse_what_needs_an_engine(run.model, run.techniques)
    at_steps = any(not technique.is_in_forward for technique in run.techniques.values())
    hooks = LoopHooks(list(run.techniques.values()), needs_gradients=at_steps)
    run.connect(None, hooks, lambda: Shards.of_model(run.model))
