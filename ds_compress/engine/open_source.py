"""What an export reads: a plain model, a DeepSpeed engine, or the folder of a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine.gather import whole_modules
from ds_compress.engine.parameters import full_parameters
from ds_compress.engine.run_end import warn_if_unfinished
from ds_compress.engine.tensor_parallel import require_whole_layers
from ds_compress.export.errors import ExportError
from ds_compress.export.source import Trained, of_module


def opened(source: Any, model: nn.Module | None = None) -> Trained:
    """`source` as an export reads it; `model` is for checkpoints of models that transformers does not know.

    Raises:
        ExportError: it is none of these, or an incomplete checkpoint.
    """
    if isinstance(source, str | PathLike):
        from ds_compress.engine.checkpoint_source import from_checkpoint

        return from_checkpoint(source, model)
    if isinstance(source, nn.Module) and not hasattr(source, "module"):
        return of_module(source)
    if isinstance(getattr(source, "module", None), nn.Module):
        return _of_engine(source)
    raise ExportError(f"export takes an engine, an nn.Module or a checkpoint's path, got a {type(source).__name__}")


def _of_engine(engine: Any) -> Trained:
    try:
        require_whole_layers(engine, "export")
    except ValueError as error:
        raise ExportError(str(error)) from error
    session = getattr(engine, "compression", None)
    if session is not None:
        warn_if_unfinished(session)
    cuts = session.cuts() if session is not None and session.structured else None
    alone = not dist.is_initialized()
    return Trained(
        engine.module,
        modules=lambda: whole_modules(engine.module),
        writes=alone or dist.get_rank() == 0,
        cuts=cuts if cuts is not None and cuts.active() else None,
        agree=_agree,
        changed=lambda values: _changed(engine.module, values),
        steps=None if session is None else session.applied_steps,
        export_to=None if session is None else session.config.export_to,
        description=f"engine on ZeRO stage {engine.zero_optimization_stage()}",
    )


def _agree(failure: BaseException | None) -> None:
    """The writing process' failure, or anybody's own, is raised everywhere."""
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return
    told: list[str | None] = [None if failure is None else str(failure)]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise ExportError(told[0])


@contextlib.contextmanager
def _changed(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    names: list[Any] = [list(values)]
    if dist.is_initialized():
        dist.broadcast_object_list(names, src=0)
    before: dict[str, torch.Tensor] = {}
    for name in names[0]:
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
