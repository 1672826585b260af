"""Which compression a model is under, from the moment that `compat.init_compression` or an engine prepared it.

The run is kept on the model itself, so that both go together; a copy of the model (deepcopy, pickle) has its masked
weights and its quantizers, but is not in training and has no run.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_compress.config.schema.compression_training import CompressionConfig, block_classes
from ds_compress.engine.run import CompressionRun
from ds_compress.errors import ROOT, ConfigError, Problem

_KEY = "_ds_compress_run"


class _Kept:
    """A run on its model; copies of the model get an empty one."""

    def __init__(self, run: CompressionRun | None = None) -> None:
        self.run = run

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def run_of(model: nn.Module) -> CompressionRun | None:
    """The run that `model`, or what `torch.compile` made of it, is under; None: it is not compressed."""
    kept = vars(getattr(model, "_orig_mod", model)).get(_KEY)
    return None if kept is None else kept.run


def keep(model: nn.Module, run: CompressionRun) -> None:
    """`model` is under `run` from now on, until that is over."""
    model.__dict__[_KEY] = _Kept(run)
    run.at_release.append(lambda: _forget(model, run))


def _forget(model: nn.Module, run: CompressionRun) -> None:
    if run_of(model) is run:
        model.__dict__.pop(_KEY, None)


def prepared_run(model: nn.Module, config: CompressionConfig) -> CompressionRun | None:
    """The run that waits on `model` for the engine that is being constructed; None when none does.

    Raises:
        ConfigError: it was prepared with another block, as a part of this model, or has been trained already.
    """
    run = run_of(model)
    if run is None:
        inner = next((name for name, module in model.named_modules() if run_of(module)), None)
        if inner is not None:
            allowed = "the very model that init_compression was given"
            raise ConfigError([Problem(ROOT, f"a model around it, which has it as {inner!r}", allowed)])
        return None
    if run.engine is not None:
        # A second engine around the same model, such as one after `engine.destroy()`.
        return None
    if not means_the_same(run.given, config):
        hint = "give both the same JSON"
        raise ConfigError(
            [Problem(ROOT, "another block than init_compression was given", "the same block", hint)]
        )
    if run.applied_steps:
        hint = "make the engine before the first step, or do without compression_scheduler"
        got = f"a model that was trained for {run.applied_steps} steps without an engine"
        raise ConfigError([Problem(ROOT, got, "an untrained one", hint)])
    return run


def means_the_same(one: CompressionConfig, other: CompressionConfig) -> bool:
    """Whether two configs mean the same: defaults may be written or not, disabled blocks be there or not."""
    return _meaning(one) == _meaning(other)


def _meaning(config: CompressionConfig) -> dict[str, Any]:
    enabled = config.enabled_blocks()
    settings = {key: value for key, value in config.model_dump().items() if key not in block_classes()}
    return {**settings, **{name: block.meaning() for name, block in enabled.items()}}
