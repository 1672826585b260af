"""Compression state beside a DeepSpeed checkpoint, in global parameter coordinates.

    <save_dir>/<tag>/ds_compress/fragments_00000.safetensors    one per process: masks (1 bit), scores, latent weights
    <save_dir>/<tag>/ds_compress/process_00000.pt               what only that process has: error feedback
    <save_dir>/<tag>/ds_compress/model.json                     class, config and block: see `checkpoint_model`
    <save_dir>/<tag>/ds_compress/state.pt                       counters, bits, ranges; written last, lists the files

Every tensor is stored with the parameter it belongs to and the element it starts at, so a run with another
layout can cut and join what it needs. Files appear under their final name only when complete, and all of
them before DeepSpeed moves its `latest` pointer: a kill at any moment leaves the previous checkpoint whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from ds_compress.engine.checkpoint import model_file
from ds_compress.engine.resize import grow, shrink
from ds_compress.engine.run_end import warn_if_unfinished
from ds_compress.files import atomic_write, inside, write_tensors
from ds_compress.ops import bitmask

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

logger = logging.getLogger("ds_compress")

FOLDER = "ds_compress"
STATE = "state.pt"


class CheckpointError(RuntimeError):
    """The compression state of a checkpoint is incomplete or does not fit the model."""


def join_checkpoints(engine: Any, run: CompressionRun) -> None:
    """`engine.save_checkpoint` and `engine.load_checkpoint` carry the state of `run` while it is attached."""

    def save_checkpoint(save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        warn_if_unfinished(run)
        save(Path(save_dir) / tag / FOLDER, run)
        return original_save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        units = _shrunk_units(Path(load_dir), tag)
        # Where the weights that were saved have another shape: become that model first, then load into it.
        if units is not None and run.shrunk_units and not _same_units(units, run.shrunk_units):
            grow.grow(engine)
            return engine.load_checkpoint(load_dir, tag, *args, **kwargs)
        if units and not run.shrunk_units:
            shrink.shrink_to(run, units)
            return engine.load_checkpoint(load_dir, tag, *args, **kwargs)
        before = run.applied_steps
        path, client_state = original_load(load_dir, tag, *args, **kwargs)
        if path is not None and not kwargs.get("load_module_only", False):
            load(_folder(Path(load_dir), tag), run)
            if run.applied_steps < before:
                warn_if_unfinished(run)
        return path, client_state

    original_save = run.patches.install(engine, "save_checkpoint", save_checkpoint)
    original_load = run.patches.install(engine, "load_checkpoint", load_checkpoint)


def save(folder: Path, run: CompressionRun) -> None:
    """Writes the compression state; a collective."""
    run.refresh_weights()
    rank, world_size = _rank_and_world_size()
    writers = range(world_size) if run.shards.is_sharded else range(1)
    if rank in writers:
        folder.mkdir(parents=True, exist_ok=True)
        _write_fragments(folder / _file_name(rank), run)
    folder.mkdir(parents=True, exist_ok=True)
    _write_process_state(folder / _process_file(rank), run)
    _barrier()
    if rank == 0:
        model_file.write(folder, run)
        state = {"format": 1, "files": [_file_name(writer) for writer in writers]}
        state |= {"world_size": world_size, **run.state_dict()}
        atomic_write(folder / STATE, partial(torch.save, state))
    _barrier()


def load(folder: Path, run: CompressionRun) -> None:
    """Restores what `save` wrote; every process reads the parts of its own fragments.

    Raises:
        CheckpointError: when a file is missing, or the stored parts do not cover a fragment.
    """
    if not (folder / STATE).exists():
        logger.warning(
            "ds_compress: %s has no compression state; compression starts from step 0", folder.parent
        )
        run.begin_anew()
        return
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    stored = _StoredParts(files_of(folder, state))
    run.load_state_dict(state)
    for name, technique in run.techniques.items():
        technique.load_fragment_state(stored.of_technique(name, run))
    run.mask_frozen_weights()
    _load_process_state(folder, state.get("world_size"), run)


def _write_process_state(path: Path, run: CompressionRun) -> None:
    own = {name: state for name, technique in run.techniques.items() if (state := technique.process_state())}
    if not own:
        path.unlink(missing_ok=True)
        return
    atomic_write(path, partial(torch.save, own))


def _load_process_state(folder: Path, stored_world_size: int | None, run: CompressionRun) -> None:
    rank, world_size = _rank_and_world_size()
    path = folder / _process_file(rank)
    own: dict[str, Any] = {}
    if stored_world_size == world_size and path.exists():
        own = torch.load(path, map_location="cpu", weights_only=True)
    elif stored_world_size != world_size and next(folder.glob("process_*.pt"), None) is not None:
        logger.warning(
            "ds_compress: %s was stored by %s processes, there are %s now; error feedback, worker momenta and who "
            "stood out begin anew",
            folder.parent,
            stored_world_size,
            world_size,
        )
    for name, technique in run.techniques.items():
        technique.load_process_state(own.get(name))


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
    atomic_write(path, partial(write_tensors, tensors=tensors, metadata={"index": json.dumps(index)}))


def _parts(run: CompressionRun) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    if not run.shards.is_first_copy and run.shards.is_sharded:
        return
    for technique_name, technique in run.techniques.items():
        for kind, by_parameter in technique.fragment_state().items():
            for parameter, values in by_parameter.items():
                yield technique_name, kind, parameter, values


class _StoredParts:
    """The parts that all processes stored, indexed by what they belong to."""

    def __init__(self, files: list[Path]) -> None:
        self._parts: dict[tuple[str, str], dict[str, list[tuple[Path, dict[str, Any]]]]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for part in json.loads(file.metadata()["index"]):
                    by_parameter = self._parts.setdefault((part["stage"], part["kind"]), {})
                    by_parameter.setdefault(part["parameter"], []).append((path, part))

    def of_technique(self, technique: str, run: CompressionRun) -> dict[str, dict[str, torch.Tensor]]:
        """{kind: {parameter: values of this process' fragment}}."""
        result: dict[str, dict[str, torch.Tensor]] = {}
        for (owner, kind), by_parameter in self._parts.items():
            if owner != technique:
                continue
            unknown = set(by_parameter) - {name for name, _ in run.model.named_parameters()}
            if unknown:
                raise CheckpointError(
                    f"{technique}: the checkpoint has {kind} of {sorted(unknown)[:3]}, the model has not"
                )
            result[kind] = {
                name: self._join(fragment, by_parameter[name])
                for name, fragment in run.shards.fragments.items()
                if name in by_parameter
            }
        return result

    @staticmethod
    def _join(fragment: Any, parts: list[tuple[Path, dict[str, Any]]]) -> torch.Tensor:
        dtype = torch.bool if parts[0][1]["is_mask"] else torch.float32
        joined = torch.empty(fragment.numel, dtype=dtype, device=fragment.values.device)
        covered = 0
        for path, part in parts:
            low = max(fragment.start, part["start"])
            high = min(fragment.start + fragment.numel, part["start"] + part["numel"])
            if low >= high:
                continue
            with safe_open(path, framework="pt") as file:
                values = file.get_tensor(part["key"])
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


def files_of(folder: Path, state: Mapping[str, Any]) -> list[Path]:
    """The files of fragments that a `state.pt` in `folder` lists.

    Raises:
        CheckpointError: one is missing, or named outside of the folder.
    """
    try:
        files = [inside(folder, name) for name in state["files"]]
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE}: {error}") from error
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: the checkpoint is incomplete")
    return files


def latest(root: Path) -> Path:
    """The folder of the tag that the file `latest` in `root` names.

    Raises:
        CheckpointError: it is outside of `root`.
    """
    try:
        return inside(root, (root / "latest").read_text().strip())
    except ValueError as error:
        raise CheckpointError(f"{root / 'latest'}: {error}") from error


def _folder(load_dir: Path, tag: str | None) -> Path:
    return (latest(load_dir) if tag is None else load_dir / str(tag)) / FOLDER


def _shrunk_units(load_dir: Path, tag: str | None) -> dict[str, torch.Tensor] | None:
    """The units that a run had kept when it removed the others; empty when it had not, None where nothing is said."""
    if tag is None and not (load_dir / "latest").exists():
        return None
    path = _folder(load_dir, tag) / STATE
    return (
        torch.load(path, map_location="cpu", weights_only=True).get("shrunk_units", {})
        if path.exists()
        else None
    )


def _same_units(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(units, other[name]) for name, units in one.items())


def _file_name(rank: int) -> str:
    return f"fragments_{rank:05d}.safetensors"


def _process_file(rank: int) -> str:
    return f"process_{rank:05d}.pt"


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
