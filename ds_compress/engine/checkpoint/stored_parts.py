"""The parts of fragments that the processes of a checkpoint have stored, of which each process takes those of its own.

A process opens the file that a process in its place has written, and those next to it, until they hold all that it
owns: with as many processes as before that is one file, with thousands of them, too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.errors import CheckpointError
from ds_compress.ops import bitmask

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun
    from ds_compress.sharding.fragment import Fragment

_OPEN_AT_ONCE = 16
Part = tuple[Path, Mapping[str, Any]]
"""A file, and an entry of its index: key, stage, kind, parameter, start, numel, is_mask."""


class StoredParts:
    """Those that this process needs, from `files`; a collective.

    Raises:
        CheckpointError: in every process, when one of them finds parts of a weight that the model has not, or no file.
    """

    def __init__(self, files: Sequence[Path], run: CompressionRun, processes: Processes) -> None:
        self._run = run
        # A header of tens of thousands of entries is not parsed anew for each of them.
        self._open = lru_cache(_OPEN_AT_ONCE)(partial(safe_open, framework="pt"))
        self._parts: dict[tuple[str, str], dict[str, list[Part]]] = {}
        self.opened: list[Path] = []
        """What this process has read parts of."""
        problem = None
        try:
            problem = self._read(files, processes)
        except CheckpointError as error:
            problem = str(error)
        told = processes.gather((problem, sorted(self._parts)))
        problems = [words for words, _ in told if words is not None]
        if problems:
            raise CheckpointError(problems[0])
        # A technique may load what is there by a collective: every process has to know all kinds.
        for _, kinds in told:
            for kind in kinds:
                self._parts.setdefault(kind, {})

    def _read(self, files: Sequence[Path], processes: Processes) -> str | None:
        """What is wrong with the files that this process looks at."""
        lacking = {name: fragment.numel for name, fragment in self._run.shards.fragments.items()}
        names, looked_at = {name for name, _ in self._run.model.named_parameters()}, set[Path]()
        for path in _nearest_first(files, processes):
            if not lacking:
                break
            index, layout = self._add(path)
            looked_at.add(path)
            if problem := _unknown(index, names):
                return problem
            for name, (start, numel) in layout.items():
                if name in lacking:
                    lacking[name] -= _common(self._run.shards.fragments[name], start, numel)
                    if lacking[name] <= 0:
                        del lacking[name]
        # Together the processes look at all files, also at those that none of them needs.
        for path in files[processes.rank % max(1, len(files)) :: processes.count]:
            if path not in looked_at:
                with _opened(path) as file:
                    if problem := _unknown(_index_of(file), names):
                        return problem
        return None

    def _add(self, path: Path) -> tuple[list[dict[str, Any]], dict[str, tuple[int, int]]]:
        """The index of a file, and what its writer owned; nothing where it does not say so."""
        self.opened.append(path)
        with _opened(path) as file:
            index, layout = _index_of(file), json.loads(file.metadata().get("layout", "{}"))
        for part in index:
            by_parameter = self._parts.setdefault((part["stage"], part["kind"]), {})
            by_parameter.setdefault(part["parameter"], []).append((path, part))
        return index, layout

    def of_technique(self, technique: str) -> dict[str, dict[str, torch.Tensor]]:
        """{kind: {parameter: values of this process' fragment}}.

        Raises:
            CheckpointError: the stored parts do not cover a fragment.
        """
        fragments = self._run.shards.fragments
        return {
            kind: {
                name: self._join(fragment, by_parameter[name])
                for name, fragment in fragments.items()
                if name in by_parameter
            }
            for (owner, kind), by_parameter in self._parts.items()
            if owner == technique
        }

    def _join(self, fragment: Fragment, parts: Sequence[Part]) -> torch.Tensor:
        """The values (numel,) of a fragment, bool for a mask and else fp32, from `parts` that cover it.

        Raises:
            CheckpointError: they do not.
        """
        dtype = torch.bool if parts[0][1]["is_mask"] else torch.float32
        joined = torch.empty(fragment.numel, dtype=dtype, device=fragment.values.device)
        covered = 0
        for path, part in parts:
            low = max(fragment.start, part["start"])
            high = min(fragment.start + fragment.numel, part["start"] + part["numel"])
            if low >= high:
                continue
            values = self._open(path).get_tensor(part["key"])
            if part["is_mask"]:
                values = bitmask.unpack(values, part["numel"])
            joined[low - fragment.start : high - fragment.start] = values[
                low - part["start"] : high - part["start"]
            ]
            covered += high - low
        if covered != fragment.numel:
            raise CheckpointError(
                f"{fragment.name}: the stored parts cover {covered} of the {fragment.numel} elements "
                f"from {fragment.start} on; the checkpoint is incomplete"
            )
        return joined


def _nearest_first(files: Sequence[Path], processes: Processes) -> list[Path]:
    """From the file of a process that owned about the same: all cut the same weights in the order of ranks."""
    place = processes.rank * len(files) // processes.count
    return [files[i] for i in sorted(range(len(files)), key=lambda i: (abs(i - place), i))]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}: the checkpoint is incomplete") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _index_of(file: Any) -> list[dict[str, Any]]:
    index: list[dict[str, Any]] = json.loads(file.metadata()["index"])
    return index


def _common(fragment: Fragment, start: int, numel: int) -> int:
    """Elements of a fragment that lie in [start, start + numel)."""
    return max(0, min(fragment.start + fragment.numel, start + numel) - max(fragment.start, start))


def _unknown(index: Sequence[Mapping[str, Any]], names: set[str]) -> str | None:
    for part in index:
        if part["parameter"] not in names:
            return f"{part['stage']}: the checkpoint has {part['kind']} of {part['parameter']}, the model has not"
    return None
