"""Compress a model while it trains, where it trains: pruning, quantization-aware training and layer reduction
with distillation, switched on by a `compression_training` block in the DeepSpeed JSON, on ZeRO 0 to 3.

Importing this package is all that a training script needs; the rest is for those who want to look or steer:

    plan(model, config)           what would happen to which weight, and the predicted bytes; trains nothing
    recipe(name, **overrides)     a named preset of the block, as a dict: what `"recipe": name` in the JSON means
    initialize(..., teacher=m)    deepspeed.initialize with a teacher object for distillation
    engine.compression            the attached run: .plan, .techniques, .applied_steps, .metrics(), .detach()
    export(engine, folder)        the result on disk: smaller, in integers, checked by loading it in a fresh process
    from_pretrained(folder)       what format="torch" stores, on the int8 kernels; transformers' own loads it, too
    distill_layers(engine, ...)   post-training quantization: each layer learns to be what it was, without labels
    load_verified(folder, key)    a signed model, encrypted or not; `ds_compress.secure` has the rest of it
    cache_teacher(model, ...)     what a teacher says of a data set, stored once
    finalize(engine)              the smaller model that structured pruning leaves
    to_universal(folder, out)     a checkpoint for another number of processes, or another ZeRO stage
    export_state_dict(engine)     the whole compressed model's weights, on process 0
    CompressionCallback, DistillationTrainer      for Hugging Face's Trainer: see `ds_compress.hf`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_compress.imports import is_command_line
from ds_compress.version import __version__

if TYPE_CHECKING:
    from ds_compress.hf import CompressionCallback, DistillationTrainer
    from ds_compress.public import (
        CheckpointError,
        ConfigError,
        ExportError,
        Plan,
        cache_teacher,
        distill_layers,
        export,
        export_state_dict,
        finalize,
        from_pretrained,
        initialize,
        load_verified,
        parse_config,
        plan,
        recipe,
        redundancy_clean,
        register,
        to_universal,
        unregister,
    )

__all__ = [
    "CheckpointError",
    "CompressionCallback",
    "ConfigError",
    "DistillationTrainer",
    "ExportError",
    "Plan",
    "__version__",
    "cache_teacher",
    "distill_layers",
    "export",
    "export_state_dict",
    "finalize",
    "from_pretrained",
    "initialize",
    "load_verified",
    "parse_config",
    "plan",
    "recipe",
    "redundancy_clean",
    "register",
    "to_universal",
    "unregister",
]


_LAZY_MODULES = ("compat", "hf", "run")
"""Packages that cost an import of their own and that docs and messages name as attributes of this one."""


def __getattr__(name: str) -> Any:
    if name in ("CompressionCallback", "DistillationTrainer"):
        return getattr(importlib.import_module("ds_compress.hf"), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"ds_compress.{name}")
    if name in __all__:
        complete()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})


def complete() -> None:
    """Brings the public names and teaches DeepSpeed the block, where that has waited; idempotent."""
    if "register" in globals():
        return
    public = importlib.import_module("ds_compress.public")
    # By hand, because submodules set attributes of their own names: `ds_compress.export` is the function.
    globals().update({name: getattr(public, name) for name in public.__all__})


if not is_command_line():
    complete()
