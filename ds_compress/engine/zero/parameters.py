"""Reading and writing whole parameters, wherever ZeRO keeps them, a few at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine.zero import groups, internals


@contextlib.contextmanager
def full_parameters(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Inside the block every parameter's `.data` is whole; with `write`, what rank 0 wrote is kept everywhere.

    Whole parameters are made of the shards, never of what a forward left whole, which may be rounded. A collective
    when any of them is partitioned: every process enters with the same parameters.
    """
    partitioned = [p for p in parameters if internals.is_zero3_parameter(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    internals.release(partitioned)
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


@torch.no_grad()
def copy_parameters(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """target <- source for each pair of equal shape, partitioned or not, one pair whole at a time at most."""
    for target, source in pairs:
        if _same_partition(target, source):
            target.ds_tensor.copy_(source.ds_tensor)  # type: ignore[attr-defined]
            continue
        with full_parameters([source]), full_parameters([target], write=True):
            target.data.copy_(source.data)


def _same_partition(target: Any, source: Any) -> bool:
    return (
        internals.is_zero3_parameter(target)
        and internals.is_zero3_parameter(source)
        and target.ds_process_group is source.ds_process_group
        and target.ds_tensor.shape == source.ds_tensor.shape
        and target.ds_tensor.device == source.ds_tensor.device
    )


def all_gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[rows, ...] of this process -> those of all processes, in order of rank, and where its own begin.

    Without a gradient; numbers of rows may differ. A collective.
    """
    rows = rows.detach().contiguous()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)]), sum(
        sizes[: dist.get_rank()]
    )


def release(gone: Iterable[nn.Parameter]) -> None:
    """Frees the values of parameters that no module has any more, whoever still holds the objects."""
    for parameter in gone:
        parameter.data = parameter.data.new_empty(0)
        if internals.is_zero3_parameter(parameter):
            shard: Any = parameter
            shard.ds_tensor.data = shard.ds_tensor.data.new_empty(0)


def adopt_parameters(
    arguments: dict[str, Any], removed: Iterable[nn.Parameter], added: Sequence[nn.Parameter]
) -> None:
    """Edits what the caller listed for the optimizer before we changed the model.

    `arguments` are those of the engine's constructor; `removed` parameters no longer belong to the model or train no
    longer, `added` are new ones (learned scales), which join without weight decay.
    """
    # A generator that the caller passed is read only now and may list the added ones already.
    elsewhere = {id(parameter) for parameter in (*removed, *added)}
    optimizer, listed = arguments["optimizer"], arguments["model_parameters"]
    if hasattr(optimizer, "param_groups"):
        schedulers = groups.Schedulers([optimizer], arguments["lr_scheduler"])
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in elsewhere]
        origin: list[int | None] = [*groups.drop_empty(optimizer)]
        if added:
            groups.add_scales(optimizer, added)
            origin.append(None)
        schedulers.follow(origin)
    listed = list(arguments["model"].parameters() if listed is None else listed)
    grouped = bool(listed) and isinstance(listed[0], dict)
    made: list[dict[str, Any]] = [dict(group) for group in listed] if grouped else [{"params": listed}]
    for group in made:
        group["params"] = [p for p in group["params"] if id(p) not in elsewhere]
    made = [group for group in made if group["params"]] or made[:1]
    if added:
        made = [*(group for group in made if group["params"]), {"params": list(added), "weight_decay": 0.0}]
    arguments["model_parameters"] = made if grouped or added else made[0]["params"]


def replace_parameters(
    arguments: dict[str, Any],
    client_groups: Sequence[Sequence[nn.Parameter]],
    made: Mapping[int, nn.Parameter | None],
) -> None:
    """Edits the constructor's arguments for a model whose parameters were replaced: `made[id of the old one]`.

    `client_groups`: the parameters that the caller's optimizer had in each group before ZeRO flattened them. Those
    that are not in `made` (learned scales), or whose layer went (None), are left out.
    """

    def replaced(listed: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        found = (made.get(id(parameter)) for parameter in listed)
        return [parameter for parameter in found if parameter is not None]

    listed = arguments["model_parameters"]
    if listed and isinstance(listed[0], dict):
        left = [{**group, "params": replaced(group["params"])} for group in listed]
        arguments["model_parameters"] = [group for group in left if group["params"]]
    elif listed is not None:
        arguments["model_parameters"] = replaced(listed)
    optimizer = arguments["optimizer"]
    if hasattr(optimizer, "param_groups"):
        optimizer.state.clear()
        for group, before in zip(optimizer.param_groups, client_groups, strict=True):
            group["params"] = replaced(before)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
