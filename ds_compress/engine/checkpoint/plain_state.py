"""Nested state as one file of safetensors: tensors, and the JSON that says where they belong. Nothing is pickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ds_compress.errors import CheckpointError
from ds_compress.files import atomic_write, write_tensors

_TENSOR = "tensor"
"""The key of a dictionary that stands for a tensor; its value is the tensor's name in the file."""


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Appears only when complete.

    state: dictionaries with names as keys, lists, tensors, None, bool, int, float, str; tuples become lists.

    Raises:
        TypeError: there is something else in it.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_without_tensors(state, tensors))
    atomic_write(path, partial(write_tensors, tensors=tensors, metadata={"state": text}))


def read(path: Path) -> dict[str, Any]:
    """What `write` was given, tensors on the CPU.

    Raises:
        CheckpointError: it is no such file, or damaged.
    """
    with opened(path) as state:
        return cast(dict[str, Any], _loaded(state))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, Any]]:
    """As `read`, but every tensor is a function that reads it, inside of the block.

    Raises:
        CheckpointError: it is no such file, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["state"]
            yield _with_tensors(json.loads(text), file)
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A copy: no two tensors of a file may share memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value) or set(value) == {_TENSOR}:
            raise TypeError(f"a checkpoint holds no dictionary with the keys {list(value)[:3]}")
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds no {type(value).__name__}")


def _with_tensors(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return partial(file.get_tensor, value[_TENSOR])
        return {key: _with_tensors(item, file) for key, item in value.items()}
    return [_with_tensors(item, file) for item in value] if isinstance(value, list) else value


def _loaded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _loaded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_loaded(item) for item in value]
    return value() if isinstance(value, partial) else value
