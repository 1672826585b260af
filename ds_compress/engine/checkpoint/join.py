"""`engine.save_checkpoint` and `engine.load_checkpoint`, with the state of the compression."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_compress.engine.checkpoint import (
    pickles,
    recipe,
    signatures,
    state,
    tags,
    transaction,
    universal_load,
)
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.engine.outcome import Place
from ds_compress.engine.resize import grow, shrink
from ds_compress.engine.run import CompressionRun
from ds_compress.engine.run_end import warn_if_unfinished
from ds_compress.secure import required


def join_checkpoints(engine: Any, run: CompressionRun) -> None:
    """Both methods carry the state of `run` while it is attached.

    A save is a transaction, see `transaction`; a load takes a checkpoint that is whole, see `tags`.
    """

    def save_checkpoint(
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        warn_if_unfinished(run)
        original = partial(
            original_save,
            client_state=dict(client_state or {}),
            exclude_frozen_parameters=exclude_frozen_parameters,
        )
        transaction.save(engine, run, original, Path(save_dir), tag, save_latest)
        run.outcome.place = Place(str(Path(save_dir) / tag), run.applied_steps)
        return True

    def load_checkpoint(load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        root = Path(load_dir)
        pointer = tags.LATEST_UNIVERSAL if engine.load_universal_checkpoint() else tags.LATEST
        processes = Processes.of(engine)
        tag = signatures.signed_tag(root, tag, run.given, processes, pointer)
        tag = tags.tag_to_load(root, tag, processes, pointer)
        if tag is None:
            return original_load(load_dir, tag, *args, **kwargs)
        recipe.refuse_newer_version(root / tag / tags.FOLDER, run.given.applied_recipe)
        saved = state.read(root / tag / tags.FOLDER)
        units: dict[str, torch.Tensor] | None = None if saved is None else saved["shrunk_units"]
        # Where the weights that were saved have another shape: become that model first, then load into it.
        if units is not None and run.shrunk_units and not _same_units(units, run.shrunk_units):
            grow.grow(engine)
            return engine.load_checkpoint(load_dir, tag, *args, **kwargs)
        if units and not run.shrunk_units:
            shrink.shrink_to(run, units)
            return engine.load_checkpoint(load_dir, tag, *args, **kwargs)
        before = run.applied_steps
        if engine.load_universal_checkpoint():
            universal_load.refuse(engine, root / tag)
        with pickles.only_data(root / tag, required.trusts_pickle(run.given)):
            path, client_state = original_load(load_dir, tag, *args, **kwargs)
        if engine.load_universal_checkpoint():
            moments = kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False)
            universal_load.complete(engine, root / tag, moments)
        if path is not None and not kwargs.get("load_module_only", False):
            state.load(root / tag / tags.FOLDER, run)
            run.outcome.read(Place(str(root / tag), run.applied_steps), is_start=before == 0)
            if run.applied_steps < before:
                warn_if_unfinished(run)
        return path, client_state

    original_save = run.patches.install(engine, "save_checkpoint", save_checkpoint)
    original_load = run.patches.install(engine, "load_checkpoint", load_checkpoint)


def _same_units(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(units, other[name]) for name, units in one.items())
