"""Which implementation the ops run on: the compiled library, or plain torch.

`DS_COMPRESS_KERNELS` (in the environment) and `compression_training.kernels` (in the JSON) say what is wished:

    auto        native where it can be built and loaded, else reference with one log line that says why
    native      native, or an error
    reference   plain torch, nothing is compiled

The environment wins over the JSON: it is how an operator compares the two without editing a run's config.
"""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ds_compress.ops import build, schemas
from ds_compress.ops.reference import IMPLEMENTATIONS
from ds_compress.ops.toolchain import ToolchainError

logger = logging.getLogger("ds_compress")

VARIABLE = "DS_COMPRESS_KERNELS"


class Preference(StrEnum):
    """See the module."""

    AUTO = "auto"
    NATIVE = "native"
    REFERENCE = "reference"


class KernelsUnavailable(RuntimeError):
    """Native kernels were asked for and cannot be had."""


_registrations = torch.library.Library(schemas.NAMESPACE, "IMPL")
for _name, _function in IMPLEMENTATIONS.items():
    _registrations.impl(_name, _function, "CompositeExplicitAutograd")

_reference = SimpleNamespace(**IMPLEMENTATIONS)
_native = getattr(torch.ops, schemas.NAMESPACE)
_loaded: Path | None = None
_reason: str | None = None
_chosen: Any = None


def kernels() -> Any:
    """The namespace whose functions are the ops of `schemas`, on the implementation that is preferred now.

    The first call builds or loads the library (see `build`); later ones cost nothing.

    Raises:
        KernelsUnavailable: native was asked for and cannot be had.
        ValueError: the environment names no preference.
    """
    return _chosen if _chosen is not None else prefer(Preference.AUTO)


def prefer(wish: Preference) -> Any:
    """Makes `wish` hold in this process from now on, unless the environment says otherwise; returns `kernels()`."""
    global _chosen
    in_force = from_environment() or wish
    if in_force is not wish and wish is not Preference.AUTO:
        logger.info("ds_compress: %s=%s overrides kernels: %s of the JSON", VARIABLE, in_force, wish)
    if in_force is Preference.REFERENCE:
        _chosen = _reference
    elif in_force is Preference.NATIVE or load():
        _chosen = native()
    else:
        _chosen = _reference
    return _chosen


def native() -> Any:
    """The ops with native kernels behind them.

    Raises:
        KernelsUnavailable: the library can be neither found nor built.
    """
    if not load():
        raise KernelsUnavailable(
            f"native kernels were asked for and cannot be had: {_reason}. "
            'Mend that, or set DS_COMPRESS_KERNELS or "kernels" to "auto" to run on plain torch.'
        )
    return _native


def from_environment() -> Preference | None:
    """What `DS_COMPRESS_KERNELS` says, None when it is not set; raises ValueError for another word."""
    word = os.environ.get(VARIABLE)
    if not word:
        return None
    try:
        return Preference(word)
    except ValueError:
        allowed = ", ".join(Preference)
        raise ValueError(f"{VARIABLE}={word}: allowed are {allowed}") from None


def load() -> bool:
    """Builds the library if needed and loads it into torch; False when that cannot be, with one warning."""
    global _loaded, _reason
    if _loaded is not None:
        return True
    if _reason is not None:
        return False
    try:
        path = build.find_prebuilt(wants_cuda()) or build.ensure_built(wanted_build(), build.to_stderr)
        torch.ops.load_library(str(path))
        _loaded = path
    except (ToolchainError, build.BuildError, OSError) as error:
        _reason = str(error.__cause__ or error)
        logger.warning("ds_compress: ops run on plain torch, not on native kernels: %s", _reason)
        return False
    return True


def wants_cuda() -> bool:
    """Where torch has CUDA, unless `DS_COMPRESS_CUDA` says 1 or 0."""
    insists = os.environ.get("DS_COMPRESS_CUDA")
    return insists == "1" or (insists != "0" and torch.version.cuda is not None)


def wanted_build() -> build.Build:
    """With CUDA kernels where they are wanted and nvcc is found.

    Raises:
        ToolchainError: no compiler; or no nvcc, and `DS_COMPRESS_CUDA=1` insists.
    """
    with_cuda = wants_cuda()
    try:
        return build.Build.for_this_machine(with_cuda)
    except ToolchainError as error:
        if os.environ.get("DS_COMPRESS_CUDA") == "1" or not with_cuda:
            raise
        logger.warning(
            "ds_compress: CUDA tensors run on plain torch, CPU tensors on native kernels: %s", error
        )
        return build.Build.for_this_machine(with_cuda=False)


def loaded_library() -> Path | None:
    """The shared library in use, None before the first native op and where there is none."""
    return _loaded


def failure() -> str | None:
    """Why native kernels could not be had; None when they were not tried or work."""
    return _reason
