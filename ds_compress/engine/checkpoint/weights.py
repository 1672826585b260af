"""The fp32 weights of a checkpoint's folder, by name, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ds_compress.engine.checkpoint import pickles
from ds_compress.engine.checkpoint.tags import FOLDER
from ds_compress.errors import CheckpointError

ZERO = "zero"
"""The folder of a universal checkpoint that has one folder for each parameter."""
REST = "rest.safetensors"
"""In our folder of a universal checkpoint: what no optimizer steps, which DeepSpeed leaves out."""


def read(folder: Path, trusted: bool = False) -> Mapping[str, Any]:
    """Tensors, or lazy ones, which `contiguous()` makes; frozen parameters and buffers among them.

    Raises:
        CheckpointError: a file is missing or damaged, or holds more than data and is not `trusted`.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with pickles.only_data(folder, trusted):
            if (folder / ZERO).is_dir():
                rest = folder / FOLDER / REST
                return _OfUniversal(folder, load_file(rest) if rest.exists() else _of_modules(folder))
            if any(folder.glob("*zero*optim_states.pt")):
                root, tag = str(folder.parent), folder.name
                masters = get_fp32_state_dict_from_zero_checkpoint(root, tag=tag, lazy_mode=True)
                # Of stage 1 it has no frozen ones.
                has_all = any(folder.glob("mp_rank_00_model_states.pt"))
                return {**(_of_modules(folder) if has_all else {}), **masters}
            return _of_modules(folder)
    except CheckpointError:
        raise
    except Exception as error:  # a file that is missing shows in many ways
        raise CheckpointError(f"{folder} is incomplete or damaged: {error}") from error


def _of_modules(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise CheckpointError(f"{folder} has no model states")
    # Within `only_data` this is True all the same, unless the caller trusts the file.
    weights: dict[str, Any] = torch.load(files[0], map_location="cpu", weights_only=False)["module"]
    return weights


class _OfUniversal(Mapping[str, Any]):
    """Parameters from their folders; `others`: what has none, such as buffers."""

    def __init__(self, folder: Path, others: Mapping[str, Any]) -> None:
        self._files = {path.parent.name: path for path in (folder / ZERO).glob("*/fp32.pt")}
        self._others = {name: value for name, value in others.items() if name not in self._files}

    def __getitem__(self, name: str) -> Any:
        return _Lazy(self._files[name]) if name in self._files else self._others[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from self._others

    def __len__(self) -> int:
        return len(self._files) + len(self._others)


class _Lazy:
    def __init__(self, path: Path) -> None:
        self._path = path

    def contiguous(self) -> torch.Tensor:
        values: torch.Tensor = torch.load(self._path, map_location="cpu", weights_only=True)["param"]
        return values
