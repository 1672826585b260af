"""Scenarios: saves in which one process fails, and loads of checkpoints of which a part is damaged."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_compress.engine.checkpoint import state
from ds_compress.errors import CheckpointError
from ds_compress.files import UnfinishedFolder
from ds_compress.manifest import FILE_NAME, Manifest
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, pruning_block, train

STAGES = (0, 1, 2, 3)
FAILURES = (
    "its own part of DeepSpeed's state",
    "our fragments",
    "the shared state",
    "the folder",
    "the name",
)
DAMAGES = ("model states", "optimizer states", "fragments", "manifest", "latest", "whole tag")
# Stage 0 has no optimizer states beside the model's.
DAMAGED = [(stage, what) for stage in (0, 3) for what in DAMAGES if (stage, what) != (0, "optimizer states")]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@contextlib.contextmanager
def failing(engine: Any, what: str) -> Iterator[None]:
    """One process cannot write: the last one where all write, else the one that does."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    places: dict[str, tuple[int, Any, str]] = {
        "its own part of DeepSpeed's state": (last, engine.checkpoint_engine, "save"),
        "our fragments": (last, state, "_write_fragments"),
        "the shared state": (0, state.model_file, "write"),
        "the folder": (0, UnfinishedFolder, "__enter__"),
        "the name": (0, UnfinishedFolder, "finish"),
    }
    if engine.zero_optimization_stage() == 0:  # where process 0 writes for all
        places |= {name: (0, *places[name][1:]) for name in FAILURES[:2]}
    who, target, name = places[what]
    if rank != who:
        yield
        return
    original: Callable[..., Any] = getattr(target, name)
    setattr(target, name, no_space)
    try:
        yield
    finally:
        setattr(target, name, original)


def _raised(call: Callable[[], object]) -> str | None:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


def _config(stage: int) -> dict[str, Any]:
    return ds_config(stage, pruning_block("topk"))


def _state(engine: Any) -> dict[str, Any]:
    return {"weights": full_weights(engine.module), "steps": engine.compression.applied_steps}


def failures(folder: str) -> dict[Any, Any]:
    """{(stage, what failed): the error, names in the folder afterwards, what is loaded, what was saved before}."""
    results: dict[Any, Any] = {}
    for stage in STAGES:
        root = Path(folder) / str(stage)
        with engine_of(tiny_bert(0), _config(stage)) as engine:
            train(engine, batches(2))
            engine.save_checkpoint(str(root), tag="same")
            before, inode = _state(engine), (root / "same" / FILE_NAME).stat().st_ino
            dist.barrier()
            for what in FAILURES:
                train(engine, batches(1))
                with failing(engine, what):
                    error = _raised(partial(engine.save_checkpoint, str(root), tag="same"))
                dist.barrier()
                results[stage, what] = {
                    "error": error,
                    "hidden": [path.name for path in root.glob(".*")],
                    "kept": (root / "same" / FILE_NAME).stat().st_ino == inode,
                }
                dist.barrier()
        with engine_of(tiny_bert(3), _config(stage)) as engine:
            engine.load_checkpoint(str(root))
            results[stage] = {"before": before, "loaded": _state(engine)}
            train(engine, batches(1))
            # After all failures a save to the same tag goes through.
            engine.save_checkpoint(str(root), tag="same")
            results[stage]["later"] = Manifest.read(root / "same")
    return results


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _damage(root: Path, what: str) -> None:
    tag = root / "global_step3"
    if what == "latest":
        (root / "latest").write_text("")
    elif what == "whole tag":
        tag.rename(root / "elsewhere")
        (root / "elsewhere" / FILE_NAME).unlink()
    else:
        pattern = {
            "model states": "*model_states.pt",
            "optimizer states": "*optim_states.pt",
            "fragments": "ds_compress/fragments_*",
            "manifest": FILE_NAME,
        }[what]
        path = sorted(tag.glob(pattern))[-1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)


def damages(folder: str) -> dict[Any, Any]:
    """{(stage, what is damaged): the error when that tag is asked for, steps and warning when none is}."""
    results: dict[Any, Any] = {}
    lines = _Lines()
    logging.getLogger("ds_compress").addHandler(lines)
    for stage, what in DAMAGED:
        root = Path(folder) / f"{stage} {what}"
        with engine_of(tiny_bert(0), _config(stage)) as engine:
            train(engine, batches(2))
            engine.save_checkpoint(str(root))
            older = _state(engine)
            train(engine, batches(1))
            engine.save_checkpoint(str(root))
            newer = _state(engine)
        if dist.get_rank() == 0:
            _damage(root, what)
        dist.barrier()
        lines.lines.clear()
        with engine_of(tiny_bert(5), _config(stage)) as engine:
            asked = _raised(partial(engine.load_checkpoint, str(root), tag="global_step3"))
            untouched = engine.compression.applied_steps
        with engine_of(tiny_bert(5), _config(stage)) as engine:
            engine.load_checkpoint(str(root))
            results[stage, what] = {
                "asked": asked,
                "untouched": untouched,
                "loaded": _state(engine),
                "older": older,
                "newer": newer,
                "warnings": [line for line in lines.lines if "whole" in line],
            }
    return results


def on_machines(folder: str) -> dict[Any, Any]:
    """Each process on a machine of its own: {stage: what is written there, what was saved, what is loaded}."""
    results: dict[Any, Any] = {}
    root = Path(folder) / f"machine-{dist.get_rank()}"
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for stage in STAGES:
        config = _config(stage) | {"checkpoint": {"use_node_local_storage": True}}
        with engine_of(tiny_bert(0), config) as engine:
            train(engine, batches(3))
            engine.save_checkpoint(str(root), tag=f"stage{stage}")
            saved = _state(engine)
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        with engine_of(tiny_bert(4), config) as engine:
            engine.load_checkpoint(str(root))
            results[stage] = {"files": files, "saved": saved, "loaded": _state(engine)}
            results[stage]["metrics"] = engine.compression.metrics()
    return results
