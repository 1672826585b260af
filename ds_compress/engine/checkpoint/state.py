"""Compression state beside a DeepSpeed checkpoint, in global parameter coordinates.

    <save_dir>/<tag>/ds_compress/fragments_00000.safetensors    one per process: masks (1 bit), scores, latent weights
    <save_dir>/<tag>/ds_compress/process_00000.safetensors      what only that process has: error feedback
    <save_dir>/<tag>/ds_compress/model.json                     class, config and block: see `model_file`
    <save_dir>/<tag>/ds_compress/run.json                       history and facts of the run: see `engine.record`
    <save_dir>/<tag>/ds_compress/state.safetensors              counters, bits, ranges; lists the files

Every tensor is stored with the parameter it belongs to and the element it starts at, so a run with another
layout can cut and join what it needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_compress.engine import record
from ds_compress.engine.checkpoint import model_file, plain_state
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.engine.checkpoint.stored_parts import StoredParts
from ds_compress.errors import CheckpointError
from ds_compress.files import atomic_write, inside, write_tensors
from ds_compress.ops import bitmask

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

logger = logging.getLogger("ds_compress")

STATE = "state.safetensors"
_FORMAT = 2


def save(
    folder: Path,
    run: CompressionRun,
    processes: Processes,
    attempt: Callable[[Callable[[], object]], None],
) -> None:
    """Writes the compression state; a collective.

    attempt: called with every write; what fails there must not keep this process from the collectives.
    """
    run.refresh_weights()
    is_writer = run.shards.is_sharded or processes.leads
    everyone = processes.gather((is_writer, processes.leader))
    writers = [rank for rank, told in enumerate(everyone) if told == (True, processes.leader)]
    attempt(lambda: folder.mkdir(parents=True, exist_ok=True))
    if is_writer:
        attempt(lambda: _write_fragments(folder / _file_name(processes.rank), run))
    own = {name: state for name, technique in run.techniques.items() if (state := technique.process_state())}
    if own:
        attempt(lambda: plain_state.write(folder / _process_file(processes.rank), own))
    if processes.rank == 0:
        attempt(lambda: record.write(folder, run))
    if processes.leads:
        state = {
            "format": _FORMAT,
            "files": [_file_name(writer) for writer in writers],
            "world_size": processes.count,
            **run.state_dict(),
        }
        attempt(lambda: model_file.write(folder, run))
        attempt(lambda: plain_state.write(folder / STATE, state))


def load(folder: Path, run: CompressionRun) -> None:
    """Restores what `save` wrote; every process reads the parts of its own fragments.

    Raises:
        CheckpointError: when a file is missing, or the stored parts do not cover a fragment.
    """
    state = read(folder)
    if state is None:
        logger.warning(
            "ds_compress: %s has no compression state; compression starts from step 0", folder.parent
        )
        run.begin_anew()
        return
    processes = Processes.of()
    stored = StoredParts(_names_of(folder, state), run, processes)
    run.load_state_dict(state)
    for name, technique in run.techniques.items():
        technique.load_fragment_state(stored.of_technique(name))
    if processes.rank == 0:
        record.restore(folder, run)
    run.mask_frozen_weights()
    _load_process_state(folder, state["world_size"], run)


def read(folder: Path) -> dict[str, Any] | None:
    """The state that all processes share; None for a checkpoint of plain DeepSpeed, which has none.

    Raises:
        CheckpointError: it is damaged, missing beside its fragments, or of another version.
    """
    path = folder / STATE
    if not path.exists():
        if not folder.exists():
            return None
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
    state = plain_state.read(path)
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, this version reads {_FORMAT}")
    return state


def _load_process_state(folder: Path, stored_world_size: int, run: CompressionRun) -> None:
    processes = Processes.of()
    path = folder / _process_file(processes.rank)
    own: dict[str, Any] = {}
    if stored_world_size == processes.count:
        own = plain_state.read(path) if path.exists() else {}
    else:
        files = [folder / _process_file(rank) for rank in range(stored_world_size)]
        own = _merged_process_state([path for path in files if path.exists()], processes.count, run)
    for name, technique in run.techniques.items():
        technique.load_process_state(own.get(name))


def _merged_process_state(files: list[Path], count: int, run: CompressionRun) -> dict[str, Any]:
    """What each of `count` processes goes on with, of what other processes have stored."""
    if not files:
        return {}
    with contextlib.ExitStack() as stack:
        states = [stack.enter_context(plain_state.opened(path)) for path in files]
        merged = {
            name: technique.merge_process_states([state.get(name, {}) for state in states])
            for name, technique in run.techniques.items()
        }
        if not any(map(_has_tensors, states)):
            return {}
    logger.warning(
        "ds_compress: %s was stored by %d processes, there are %d now: each goes on with the mean of their error "
        "feedback and of their worker momenta; errors of sums, and who stood out, begin anew",
        files[0].parent.parent,
        len(files),
        count,
    )
    return {name: state for name, state in merged.items() if state}


def _has_tensors(value: Any) -> bool:
    """Whether there is one in the state of a process: alone, a process has nothing to remember of others."""
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    return any(map(_has_tensors, value)) if isinstance(value, list) else callable(value)


def _write_fragments(path: Path, run: CompressionRun) -> None:
    tensors: dict[str, torch.Tensor] = {}
    index: list[dict[str, Any]] = []
    for technique, kind, parameter, values in _parts(run):
        key = str(len(index))
        is_mask = values.dtype is torch.bool
        tensors[key] = (bitmask.pack(values) if is_mask else values.detach()).cpu().contiguous()
        start = run.shards.fragments[parameter].start
        index.append(
            {"key": key, "stage": technique, "kind": kind, "parameter": parameter, "start": start}
            | {"numel": values.numel(), "is_mask": is_mask}
        )
    layout = {name: [f.start, f.numel] for name, f in run.shards.fragments.items()} if _stores(run) else {}
    metadata = {"index": json.dumps(index), "layout": json.dumps(layout)}
    atomic_write(path, partial(write_tensors, tensors=tensors, metadata=metadata))


def _stores(run: CompressionRun) -> bool:
    """Whether no other process stores the same."""
    return run.shards.is_first_copy or not run.shards.is_sharded


def _parts(run: CompressionRun) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    if not _stores(run):
        return
    for technique_name, technique in run.techniques.items():
        for kind, by_parameter in technique.fragment_state().items():
            for parameter, values in by_parameter.items():
                yield technique_name, kind, parameter, values


def files_of(folder: Path, state: Mapping[str, Any]) -> list[Path]:
    """The files of fragments that the state in `folder` lists.

    Raises:
        CheckpointError: one is missing, or named outside of the folder.
    """
    files = _names_of(folder, state)
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: the checkpoint is incomplete")
    return files


def _names_of(folder: Path, state: Mapping[str, Any]) -> list[Path]:
    """The files that the state lists, which may not be there."""
    try:
        return [inside(folder, name) for name in state["files"]]
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE}: {error}") from error


def _file_name(rank: int) -> str:
    return f"fragments_{rank:05d}.safetensors"


def _process_file(rank: int) -> str:
    return f"process_{rank:05d}.safetensors"
