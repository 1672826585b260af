"""Universal checkpoints: a run goes on in another number of processes, or on another ZeRO stage.

    <out>/<tag>_universal/zero/<parameter>/fp32.pt, ...       by DeepSpeed's converter: masters and moments, whole
    <out>/<tag>_universal/ds_compress/...                     our state as it was saved, which knows no layout
    <out>/<tag>_universal/ds_compress/rest.safetensors        what no optimizer steps, which the converter leaves out
    <out>/<tag>_universal/ds_compress_manifest.json
    <out>/latest_universal                                    what DeepSpeed reads under "load_universal"

`universal_load` does the other half, when an engine loads such a folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ds_compress.engine.checkpoint import pickles, state, tags, weights
from ds_compress.engine.checkpoint.universal_load import GLOBAL
from ds_compress.engine.checkpoint.weights import REST, ZERO
from ds_compress.errors import CheckpointError
from ds_compress.files import UnfinishedFolder, atomic_write, write_tensors
from ds_compress.manifest import Manifest

SUFFIX = "_universal"
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What the converter carries of an optimizer's state."""
_SHARDED = ("fp32_flat_groups", "ds_zero_partition_groups")
"""Shards of the first process in a global state of stage 3, as large as its part of the model; nobody reads them."""


def to_universal(
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    *,
    workers: int = 1,
    trust_pickle: bool = False,
) -> Path:
    """Converts a checkpoint of ZeRO 1 to 3 to one that any number of processes loads.

    Load it with `"checkpoint": {"load_universal": true}` in DeepSpeed's JSON and `engine.load_checkpoint(out)`.

    Args:
        checkpoint: what `engine.save_checkpoint` was given, or the folder of one tag in it.
        out: folder that gets `<tag>_universal` and `latest_universal`; may be the one of the checkpoint.
        workers: processes that convert at a time; each holds a shard.
        trust_pickle: read pickles that hold more than data, which can run any code.

    Returns:
        The folder of the new tag. It appears when it is complete; one of the same name is replaced then.

    Raises:
        CheckpointError: the checkpoint is damaged, or DeepSpeed cannot convert it; the message says why.
    """
    folder = tags.verified_folder(Path(checkpoint))
    _refuse(folder, trust_pickle)
    target = Path(out) / f"{folder.name}{SUFFIX}"
    with UnfinishedFolder(target) as unfinished:
        _convert(folder, unfinished.path, workers, trust_pickle)
        _complete_global_state(unfinished.path)
        _complete_model_states(unfinished.path)
        if (folder / tags.FOLDER).is_dir():
            shutil.copytree(folder / tags.FOLDER, unfinished.path / tags.FOLDER)
        _write_rest(folder, unfinished.path, trust_pickle)
        _write_manifest(folder, unfinished.path)
        unfinished.finish()
    atomic_write(target.parent / tags.LATEST_UNIVERSAL, target.name)
    return target


def _refuse(folder: Path, trusted: bool) -> None:
    """What the converter would do wrong, or end at without a word that helps."""
    if (folder / ZERO).is_dir():
        raise CheckpointError(f"{folder} is universal already")
    optimizers = sorted(folder.glob("*optim_states.pt"))
    if not optimizers:
        raise CheckpointError(
            f"{folder} has no optimizer states of ZeRO 1 to 3: a checkpoint of stage 0 is the same for any number of "
            "processes, and loads as it is"
        )
    with pickles.only_data(folder, trusted):
        saved = torch.load(optimizers[0], map_location="cpu", mmap=True)
    config = saved.get("ds_config") or {}
    if isinstance(config, Mapping) and (config.get("zero_optimization") or {}).get("round_robin_gradients"):
        raise CheckpointError(
            f"{folder} was saved under zero_optimization.round_robin_gradients, where DeepSpeed notes wrong places for "
            "its parameters: load it with as many processes, set the key to false, and save it again"
        )
    optimizer = saved["optimizer_state_dict"]
    stored = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict")) or {}
    kinds = {
        key for entry in _entries(stored.get("state")) for key, value in entry.items() if _is_large(value)
    }
    if kinds != set(_MOMENTS):
        raise CheckpointError(
            f"{folder}: the optimizer keeps {sorted(kinds) or 'nothing'}, and DeepSpeed converts {list(_MOMENTS)} only"
        )


def _entries(stored: Any) -> list[Mapping[str, Any]]:
    return list(stored.values() if isinstance(stored, Mapping) else stored or ())


def _is_large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _convert(folder: Path, made: Path, workers: int, trusted: bool) -> None:
    from deepspeed.checkpoint import ds_to_universal

    # It writes `latest_universal` beside its output: into the unfinished folder, from where it is dropped.
    output = made / "converted" / folder.name
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(output),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            pickles.only_data(folder, trusted),
        ):
            ds_to_universal.main(arguments)
    except CheckpointError:
        raise
    except Exception as error:
        last = said.getvalue().strip().splitlines()[-1:]
        raise CheckpointError(
            f"DeepSpeed cannot convert {folder}: {type(error).__name__}: {error} (after: {''.join(last)})"
        ) from error
    for path in output.iterdir():
        path.rename(made / path.name)
    shutil.rmtree(made / "converted")


def _complete_global_state(made: Path) -> None:
    """What either kind of stage looks for in the state that the other kind wrote."""
    from deepspeed import __version__

    path = made / ZERO / GLOBAL
    with pickles.only_data(made):
        common = torch.load(path, map_location="cpu")
    for key in _SHARDED:
        common.pop(key, None)
    # Of stage 3, in two places: stages 1 and 2 have a step beside each parameter, which all of them share.
    nested = common.get("optimizer_state_dict") or {}
    steps = {path.parent: torch.load(path, weights_only=True) for path in (made / ZERO).glob("*/step.pt")}
    step = next((entry["step"] for entry in _entries(nested.get("state"))), next(iter(steps.values()), None))
    common["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": common["param_groups"]}
    common.setdefault("ds_version", __version__)
    torch.save(common, path)
    for parameter in (made / ZERO).glob("*/exp_avg.pt"):
        if parameter.parent not in steps and step is not None:
            torch.save(step, parameter.with_name("step.pt"))


def _complete_model_states(made: Path) -> None:
    """Counters and schedules, under the name that the other kind of stage looks for; weights are in folders."""
    full, sharded = made / "mp_rank_00_model_states.pt", made / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    if full.exists() != sharded.exists() and not any(made.glob("*mp_rank_01_model_states.pt")):
        with pickles.only_data(made):
            saved = torch.load(full if full.exists() else sharded, map_location="cpu")
        if sharded.exists():
            _shape_states(made, saved["param_shapes"])
        torch.save({**saved, "module": {}}, sharded if full.exists() else full)


def _shape_states(made: Path, groups: list[Mapping[str, Any]]) -> None:
    """Of stage 3 they are flat tensors; as stages 1 and 2 have them, all stages read them."""
    for name, shape in (item for group in groups for item in group.items()):
        for path in (made / ZERO / name / f"{kind}.pt" for kind in ("fp32", *_MOMENTS)):
            values = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(values, torch.Tensor):
                torch.save({"param": values.view(shape)}, path)


def _write_rest(folder: Path, made: Path, trusted: bool) -> None:
    """Frozen parameters and buffers."""
    stepped = {path.parent.name for path in (made / ZERO).glob("*/exp_avg.pt")}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        saved = weights.read(folder, trusted)
        rest = {name: saved[name].contiguous() for name in saved if name not in stepped}
    rest = {name: values for name, values in rest.items() if values is not None}
    (made / tags.FOLDER).mkdir(exist_ok=True)
    write_tensors(made / tags.FOLDER / REST, {name: values.clone() for name, values in rest.items()})


def _write_manifest(folder: Path, made: Path) -> None:
    before = Manifest.read(folder)
    about = {} if before is None else dict(before.about)
    saved = state.read(made / tags.FOLDER) if (made / tags.FOLDER / state.STATE).exists() else None
    about |= {"saved": datetime.now(UTC).isoformat(), "universal": True, "of": folder.name}
    if saved is not None:
        about["applied_steps"] = saved["applied_steps"]
    Manifest.of(made, about).write(made)
