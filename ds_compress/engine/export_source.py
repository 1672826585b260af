"""What an export reads: a plain model, a DeepSpeed engine, or the folder of a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine import record
from ds_compress.engine.admission import require_full_layers
from ds_compress.engine.checkpoint import origin
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.engine.checkpoint.source import from_checkpoint
from ds_compress.engine.gather import full_modules
from ds_compress.engine.registry import run_of
from ds_compress.engine.run_end import warn_if_unfinished
from ds_compress.engine.zero.parameters import full_parameters
from ds_compress.errors import ExportError
from ds_compress.export.source import ExportSource, of_module
from ds_compress.quant import layers


def load_source(source: Any, model: nn.Module | None = None, trust_pickle: bool = False) -> ExportSource:
    """`source` as an export reads it; the rest is for checkpoints, see `from_checkpoint`.

    Raises:
        ExportError: it is none of these, or an incomplete checkpoint.
    """
    if isinstance(source, str | PathLike):
        return from_checkpoint(source, model, trust_pickle)
    if hasattr(source, "model_wrapped") and hasattr(source, "accelerator"):
        return _of_trainer(source)
    if isinstance(source, nn.Module) and not hasattr(source, "module"):
        return _of_model(source)
    if isinstance(getattr(source, "module", None), nn.Module):
        return _of_engine(source)
    got = type(source).__name__
    raise ExportError(f"export takes an engine, a Trainer, an nn.Module or a checkpoint's path, got a {got}")


def _of_trainer(trainer: Any) -> ExportSource:
    engine = getattr(trainer, "deepspeed", None) or trainer.model_wrapped
    trained = _of_engine(engine) if hasattr(engine, "compression") else _of_model(trainer.model)
    tokenizer = getattr(trainer, "processing_class", None)
    trained.tokenizer = tokenizer if hasattr(tokenizer, "save_pretrained") else None
    return trained


def _of_model(model: nn.Module) -> ExportSource:
    """A model; of one that is in training, what its engine or its loop knows."""
    run = run_of(model)
    if run is not None and run.engine is not None:
        return _of_engine(run.engine)
    trained = of_module(model)
    trained.parameters = origin.began_with(model)
    trained.metrics = origin.last_metrics(model) if run is None else run.metrics()
    trained.commitments = origin.last_commitments(model) if run is None else run.commitments
    trained.run_record = origin.last_record(model) if run is None else record.of(run)
    if run is not None and run.prunable_groups:
        pruning_plan = run.pruning_plan()
        trained.pruning_plan = pruning_plan if pruning_plan.active() else None
        return trained
    has_quantizers = any(
        layers.quantized_parameters(m) or layers.input_quantizers_of(m) for m in model.modules()
    )
    lost = [name for name in origin.unfinished(model) if not (name in origin.QUANTIZERS and has_quantizers)]
    if run is None and lost:
        raise ExportError(origin.without(lost))
    return trained


def _of_engine(engine: Any) -> ExportSource:
    try:
        require_full_layers(engine, "export")
    except ValueError as error:
        raise ExportError(str(error)) from error
    run = getattr(engine, "compression", None)
    if run is not None:
        warn_if_unfinished(run)
    pruning_plan = run.pruning_plan() if run is not None and run.prunable_groups else None
    alone = not dist.is_initialized()
    return ExportSource(
        engine.module,
        modules=lambda: full_modules(engine.module),
        writes=alone or dist.get_rank() == 0,
        pruning_plan=pruning_plan if pruning_plan is not None and pruning_plan.active() else None,
        broadcast_error=_agree,
        changed=lambda values: _changed(engine.module, values),
        steps=None if run is None else run.applied_steps,
        export_to=None if run is None else run.config.export_to,
        parameters=origin.began_with(engine.module),
        metrics={} if run is None else run.metrics(),
        commitments={} if run is None else run.commitments,
        run_record=None if run is None else record.of(run),
        share=_share,
        description=f"engine on ZeRO stage {engine.zero_optimization_stage()}",
    )


def _agree(failure: BaseException | None) -> None:
    """The writing process' failure, or anybody's own, is raised everywhere."""
    told = Processes.of().from_first(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if told is not None:
        raise ExportError(told)


def _share(value: Any) -> Any:
    return Processes.of().from_first(value)


@contextlib.contextmanager
def _changed(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    before: dict[str, torch.Tensor] = {}
    for name in _share(list(values)):
        before[name] = _write(model.get_parameter(name), values.get(name))
    try:
        yield
    finally:
        for name, old in before.items():
            _write(model.get_parameter(name), old)


def _write(parameter: nn.Parameter, value: torch.Tensor | None) -> torch.Tensor:
    """Returns what was there; `value` is that of the writing process, sent to the others."""
    with full_parameters([parameter], write=True):
        before = parameter.detach().clone()
        new = before.clone() if value is None else value.to(before.device, before.dtype)
        if dist.is_initialized():
            dist.broadcast(new, src=0)
        parameter.data.copy_(new)
    return before
