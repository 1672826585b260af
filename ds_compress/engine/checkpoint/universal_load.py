"""What DeepSpeed's load of a universal checkpoint leaves out, or does wrong, with more than one group of parameters.

- Stage 3 gives every parameter group the settings of the first one: learned scales, which do not decay, would.
- It also gives all groups one step counter, the same tensor, which then counts a step once for every group.
- Frozen parameters and buffers are not loaded on any stage.
- On stage 0 nothing is loaded at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ds_compress.engine.checkpoint import pickles
from ds_compress.engine.checkpoint.tags import FOLDER
from ds_compress.engine.checkpoint.weights import REST, ZERO
from ds_compress.engine.zero import internals
from ds_compress.engine.zero.parameters import full_parameters
from ds_compress.errors import CheckpointError

GLOBAL = "optimizer_state.pt"


def refuse(engine: Any, folder: Path) -> None:
    """Before a load with `load_universal`.

    Raises:
        CheckpointError: the engine would load nothing, or a folder that is not universal.
    """
    if not engine.zero_optimization():
        raise CheckpointError(
            '"checkpoint": {"load_universal": true} loads nothing on ZeRO stage 0: set zero_optimization.stage to 1'
        )
    if not (folder / ZERO).is_dir():
        raise CheckpointError(
            f"{folder} is no universal checkpoint: make one with `ds_compress universal {folder} OUT`, or leave "
            "load_universal out"
        )


def complete(engine: Any, folder: Path, with_optimizer: bool) -> None:
    """After DeepSpeed has loaded the universal checkpoint in `folder`; a collective.

    with_optimizer: whether it has loaded the optimizer's state, too.

    Raises:
        CheckpointError: it has another number of parameter groups than the optimizer.
    """
    if with_optimizer and internals.is_zero3(engine.optimizer):
        with pickles.only_data(folder):
            saved = torch.load(folder / ZERO / GLOBAL, map_location="cpu")["param_groups"]
        for optimizer in internals.torch_optimizers(engine):
            _restore_groups(optimizer, saved, folder)
    if (folder / FOLDER / REST).exists():
        _load_rest(engine.module, folder / FOLDER / REST)


def _restore_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]], folder: Path) -> None:
    if len(saved) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{folder} has {len(saved)} parameter groups, the optimizer has {len(optimizer.param_groups)}"
        )
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@torch.no_grad()
def _load_rest(model: torch.nn.Module, path: Path) -> None:
    """One tensor at a time."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name, buffer in model.named_buffers():
            if name in names:
                buffer.copy_(file.get_tensor(name).view(buffer.shape))
        for name, parameter in model.named_parameters():
            if name in names:
                with full_parameters([parameter], write=True):
                    parameter.data.copy_(file.get_tensor(name).view(parameter.shape))
