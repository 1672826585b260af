"""Which implementation the ops run on: the compiled library, or plain torch.

A preference is one of

    auto        native where it can be built and loaded, else reference with one log line that says why
    native      native, or an error
    reference   plain torch, nothing is compiled

and comes from the first of: `DS_COMPRESS_KERNELS` in the environment, which is how an operator compares the two without
editing a run's config; the innermost `kernel_preference` block that the call is made in; the default of the process,
set by `prefer`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache
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


class KernelsUnavailableError(RuntimeError):
    """Native kernels were asked for and cannot be had."""


KernelsUnavailable = KernelsUnavailableError
"""The name that it had first."""


_registrations = torch.library.Library(schemas.NAMESPACE, "IMPL")
_reference = SimpleNamespace()


def _implement(function: Callable[..., Any]) -> None:
    _registrations.impl(function.__name__, function, "CompositeExplicitAutograd")
    setattr(_reference, function.__name__, function)


for _function in IMPLEMENTATIONS.values():
    _implement(_function)


def register_op(function: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
    """`function`, in plain torch, becomes an op of `kernels()` and of `torch.ops.ds_compress`, under its own name.

    A compiled library may implement it for CPU and CUDA: `m.impl` of `csrc/bindings`, by the same name.

    Args:
        function: its signature, of tensors and plain values, is the op's (`torch.library.infer_schema`).
        fake: takes the same arguments, checks them, and returns empty tensors of the results' shapes and dtypes.
        mutates: names of arguments that it writes.
    """
    schemas.define(function, mutates)
    torch.library.register_fake(f"{schemas.NAMESPACE}::{function.__name__}", fake)
    _implement(function)


_native = getattr(torch.ops, schemas.NAMESPACE)
_loaded: Path | None = None
_reason: str | None = None
_refused: str | None = None
_default: Any = None
_in_block: Any = None
"""The ops of the innermost `kernel_preference` block; a plain global, which torch.compile can read."""


def kernels() -> Any:
    """The namespace whose functions are the ops of `schemas`, on the implementation that is preferred here and now.

    The first call may build or load the library (see `build`); later ones cost some 50 ns.

    Raises:
        KernelsUnavailableError: native was asked for and cannot be had.
        UnsafeLibraryError: others could have written the library (`library_file`).
        ValueError: the environment names no preference.
    """
    if _in_block is not None:
        return _in_block
    return _default if _default is not None else prefer(Preference.AUTO)


def in_use() -> Preference | None:
    """Native or reference: what the next op would run on; None where nothing was chosen or loaded so far."""
    ops = _in_block if _in_block is not None else _default
    if ops is None:
        return None
    return Preference.NATIVE if ops is _native else Preference.REFERENCE


def prefer(preference: Preference) -> Any:
    """Makes `preference` the default of this process, unless the environment says otherwise; returns its ops.

    Raises: as `kernels`.
    """
    global _default
    _default = _ops_of(preference)
    return _default


def prefer_unless_chosen(preference: Preference) -> None:
    """As `prefer`, where this process has no default yet."""
    if _default is None:
        prefer(preference)


class kernel_preference:
    """`with kernel_preference(Preference.NATIVE): ...` holds for the ops called in the block, not for the process.

    The library is found or built when the object is made, not at the first op; the object may then be entered any
    number of times, within itself too, at well under a microsecond. So two engines of one process can each have theirs.

    It holds for all threads, those too on which torch runs the backward of CUDA tensors. Both implementations give the
    same bits.

    Raises: as `kernels`, when it is made.
    """

    def __init__(self, preference: Preference) -> None:
        self._ops = _ops_of(preference)
        self._before: list[Any] = []

    def __enter__(self) -> Any:
        global _in_block
        self._before.append(_in_block)
        _in_block = self._ops
        return self._ops

    def __exit__(self, *error: object) -> None:
        global _in_block
        _in_block = self._before.pop()


def _ops_of(preference: Preference) -> Any:
    chosen = from_environment() or preference
    if chosen is not preference and preference is not Preference.AUTO:
        logger.info("ds_compress: %s=%s overrides kernels: %s of the JSON", VARIABLE, chosen, preference)
    if chosen is Preference.NATIVE:
        return native()
    return _native if chosen is Preference.AUTO and load() else _reference


def native() -> Any:
    """The ops with native kernels behind them.

    Raises:
        KernelsUnavailableError: the library can be neither found nor built.
    """
    if not load():
        raise KernelsUnavailableError(
            f"native kernels were asked for and cannot be had: {_reason}. "
            'Fix that, or set DS_COMPRESS_KERNELS or "kernels" to "auto" to run on plain torch.'
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


def load(may_compile: bool = True) -> bool:
    """Loads the library into torch, after building it if needed; False when that cannot be, with one warning.

    The library that came with the package is the first choice. Where it cannot be loaded (an older C library, say),
    one is compiled, with a line that says so.

    Args:
        may_compile: whether to build; without, a library that would have to be built is no failure for later calls.

    Raises:
        UnsafeLibraryError: others could have written it: no reason to go on as if nothing were.
    """
    global _loaded, _reason
    if _loaded is not None:
        return True
    if _reason is not None:
        return False
    try:
        path = _open_prebuilt()
        if path is None and may_compile:
            path = _open(build.ensure_built(wanted_build(), build.to_stderr))
        elif path is None:
            built = build.find_built(wanted_build())
            path = None if built is None else _open(built)
        _loaded = path
    except (ToolchainError, build.BuildError, OSError) as error:
        _reason = "; ".join([str(error.__cause__ or error), *filter(None, [_refused])])
        logger.warning("ds_compress: ops run on plain torch, not on native kernels: %s", _reason)
    return _loaded is not None


def find() -> Path | None:
    """The library that `load` would try first without compiling anything; None where it would have to be built.

    Raises:
        ToolchainError: it is not there, and could not be built.
        UnsafeLibraryError: as `load`.
    """
    return prebuilt() or build.find_built(wanted_build())


def prebuilt(say: Callable[[str], object] = lambda line: None) -> Path | None:
    """The library that came with the package, where it serves; None where there is none.

    One for the CPU alone serves where CUDA is wanted, too, unless CUDA kernels can be compiled here or
    `DS_COMPRESS_CUDA=1` insists on them.
    """
    found = build.find_prebuilt(wants_cuda(), say)
    if found is not None or not wants_cuda() or os.environ.get("DS_COMPRESS_CUDA") == "1":
        return found
    try:
        build.Build.for_this_machine(with_cuda=True)
    except ToolchainError as error:
        found = build.find_prebuilt(False, say)
        if found is not None:
            _warn_of_cuda(str(error))
    return found


def _open_prebuilt() -> Path | None:
    global _refused
    path = prebuilt(build.to_stderr)
    try:
        return None if path is None or _refused is not None else _open(path)
    except OSError as error:
        _refused = f"the library of the package cannot be loaded: {error.__cause__ or error}"
        logger.warning("ds_compress: %s", _refused)
        return None


def _open(path: Path) -> Path:
    torch.ops.load_library(str(path))
    return path


def has_kernel(name: str, key: str) -> bool:
    """Whether the op `name` has a compiled kernel for `key`, "CPU" or "CUDA", in this process."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{schemas.NAMESPACE}::{name}", key))


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
        _warn_of_cuda(str(error))
        return build.Build.for_this_machine(with_cuda=False)


@cache
def _warn_of_cuda(why: str) -> None:
    logger.warning("ds_compress: CUDA tensors run on plain torch, CPU tensors on native kernels: %s", why)


def loaded_library() -> Path | None:
    """The shared library in use, None before the first native op and where there is none."""
    return _loaded


def origin(path: Path) -> str:
    """Where a library is from, in words."""
    return "came with the package" if path.parent == build.PREBUILT else "built here"


def failure() -> str | None:
    """Why native kernels could not be had; None when they were not tried or work."""
    return _reason


def refused() -> str | None:
    """Why the library that came with the package was not loaded; None when it was not tried, is none, or works."""
    return _refused
