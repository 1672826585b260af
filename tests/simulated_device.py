"""A second device without hardware: tensors that say they are on "gpu", compute on the CPU, and refuse to mix with it.

What a GPU would not allow is an error here too, and what it would wait for is counted:

- an op over tensors of both devices (but for a CPU scalar of no dimension), an index on the CPU aside;
- `.numpy()` and anything else that wants the memory of a tensor that is not on the CPU;
- dividing by a number multiplies by its rounded reciprocal, as torch's CUDA kernel does;
- `waits`: reads of a number by the host (`.item()`, `bool`, `nonzero` and masks as an index) and copies from one
  device to the other.

Registers a backend of this name in torch: a process that does so should do nothing else.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "gpu"
_setup_privateuseone_for_python_backend(NAME)
# Where torch.autocast asks.
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
DEVICE = torch.device(NAME, 0)
_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
}
_READS |= {
    _aten.masked_select.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.bincount.default,
}
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}

_DIVISIONS = {_aten.div.Tensor: _aten.mul.Tensor, _aten.div_.Tensor: _aten.mul_.Tensor}

waits: Counter[str] = Counter()
"""{op: how often the host waited in it}, since the last `clear`."""


class OnDevice(torch.Tensor):
    """A tensor on `DEVICE`; `inner` is the one on the CPU that holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _run(func, tuple(args), dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """`torch.zeros(3, device="gpu")` and the like, which take no tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_ours(kwargs.get("device")) or any(isinstance(x, OnDevice) for x in _tensors((args, kwargs))):
            return _run(func, tuple(args), kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Inside, `torch.device("gpu")` works; yields it."""
    with _Factories():
        yield DEVICE


@contextlib.contextmanager
def without_it() -> Iterator[None]:
    """As outside of `simulated_device`, where an op of the CPU is not looked at: it is faster."""
    with _disable_current_modes():
        yield


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


# What an op takes and gives are tensors, and lists, tuples and dictionaries of them: pytree, which knows more, took
# most of the time of these tests.


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _map(function: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    """The same, with `function` of each tensor."""
    if isinstance(values, torch.Tensor):
        return function(values)
    if isinstance(values, list | tuple):
        mapped = [_map(function, value) for value in values]
        return mapped if isinstance(values, list) else tuple(mapped)
    if isinstance(values, dict):
        return {key: _map(function, value) for key, value in values.items()}
    return values


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = list(_tensors((args, kwargs)))
    ours = [x for x in leaves if isinstance(x, OnDevice)]
    asked = kwargs.get("device")
    to_ours = _is_ours(asked) or (asked is None and bool(ours))
    if func in _COPIES:
        to_ours = isinstance(args[0], OnDevice) if func is _aten.copy_.default else to_ours
        if len({isinstance(x, OnDevice) for x in leaves} | {to_ours}) > 1:
            _wait(func)
    else:
        _refuse_mixtures(func, args, leaves, ours)
        if func in _READS or (
            func in _INDEXED and any(x.dtype in (torch.bool, torch.uint8) for x in _indices(args))
        ):
            _wait(func)
    if ours and func in _DIVISIONS and not isinstance(args[1], OnDevice) and args[0].is_floating_point():
        return _run(_DIVISIONS[func], (args[0], _reciprocal(args[0], args[1])), kwargs)
    inner_args, inner_kwargs = _map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    if "device" in inner_kwargs and inner_kwargs["device"] is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    known = {id(x.inner): x for x in ours}

    def wrapped(value: torch.Tensor) -> torch.Tensor:
        if id(value) in known:
            return known[id(value)]
        return OnDevice(value) if to_ours else value

    out = _map(wrapped, result)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and to_ours else out


def _reciprocal(values: torch.Tensor, number: Any) -> float:
    """1 / number in the precision that a kernel computes in: fp64 for fp64, else fp32."""
    dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
    return float(torch.tensor(1.0, dtype=dtype) / torch.tensor(float(number), dtype=dtype))


def _indices(args: Sequence[Any]) -> list[torch.Tensor]:
    return [x for x in args[1] if isinstance(x, torch.Tensor)]


def _refuse_mixtures(
    func: Any, args: Sequence[Any], leaves: Sequence[torch.Tensor], ours: Sequence[OnDevice]
) -> None:
    others = [x for x in leaves if not isinstance(x, OnDevice)]
    if not ours or not others:
        return
    if func in _INDEXED and isinstance(args[0], OnDevice):
        # torch takes indices on the CPU: it copies them.
        others = [x for x in others if not any(x is i for i in _indices(args))]
        _wait(func)
    # A scalar goes along with the others, but not as what is written to.
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    first = args[0] if args else None
    is_written = (
        bool(written) and func._schema.arguments[0].name in written and not isinstance(first, OnDevice)
    )
    if any(x.dim() for x in others) or is_written:
        raise RuntimeError(
            f"{func}: tensors of two devices: {[(tuple(x.shape), str(x.device)) for x in leaves]}"
        )


def _wait(func: Any) -> None:
    waits[str(func)] += 1
