"""Every group in every format, on every batch of the calibration set.

A layer is rounded by `techniques.WeightQuantization`, the very code that trains and that an export takes its numbers
from. Batches are the outer loop: the outputs of the model as it is are computed once for each batch and not kept.
Of several processes each takes its share of the batches. Sums of batches are added in the order of the batches, so
that the number of processes changes no bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.config.targets import Target, TechniquePlan
from ds_compress.modelinfo.evaluating import evaluating
from ds_compress.sensitivity.calibration import Batch
from ds_compress.sensitivity.formats import Format
from ds_compress.sensitivity.groups import BLOCK, LayerGroup, targets_in
from ds_compress.sensitivity.increase import increase, metric_for, reference
from ds_compress.sensitivity.table import GroupSensitivity, Sensitivity
from ds_compress.techniques.weight_quantization import WeightQuantization

_Cell = tuple[str, str]
"""Names of a group and of a format."""


@torch.no_grad()
def measure(
    model: Any,
    batches: Sequence[Batch],
    formats: Sequence[Format],
    groups: Sequence[LayerGroup],
    *,
    wants_loss: bool = False,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Sensitivity:
    """The table, the same in every process. A collective where torch.distributed is initialized.

    Args:
        model: of transformers, whole in each process, on the device that is to compute; left as it was.
        batches: `input_ids` and `attention_mask` int64 [examples, tokens], `labels` int64 [examples] for the loss of a
            classifier; all of them in every process.
        wants_loss: the growth of the cross-entropy instead of the divergence from the model as it is.
        facts: stored with the table.
        progress: called with how many groups in a format this process has passed a batch through, and of how many.

    Raises:
        ValueError: no batch, no format that fits a layer, labels that are missing, outputs that are not finite.
        ConfigError: a layer that a format cannot be used for.
    """
    if not batches:
        raise ValueError("no batch to measure on")
    cells, shared = _cells(model, formats, groups)
    if not cells:
        raise ValueError(
            f"none of the formats {', '.join(f.name for f in formats)} fits a layer of this model"
        )
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums: dict[int, list[float]] = {}
    failure: ValueError | None = None
    with evaluating(model):
        try:
            metric = metric_for(_forward(model, _on_device(model, batches[0])), model, wants_loss)
            own = range(rank, len(batches), world)
            for number in own:
                batch = _on_device(model, batches[number])
                original = reference(_forward(model, batch), batch, metric)
                sums[number] = [original.weight]
                for (_, format), targets in cells.items():
                    with rounded(model, shared[format], targets):
                        sums[number].append(increase(_forward(model, batch), batch, original))
                    progress(sum(map(len, sums.values())) - len(sums), len(own) * len(cells))
        except ValueError as error:
            failure = error  # told to the others, which would wait for this process
    together = _gathered(sums, failure)
    # In the order of the batches, and not by math.fsum, which raises for Inf.
    totals = [sum(column) for column in zip(*(together[number] for number in sorted(together)), strict=True)]
    weight, parts = totals[0], dict(zip(cells, totals[1:], strict=True))
    if not weight:
        raise ValueError(
            "the calibration set has nothing to predict: texts of one token, or outputs that are zero"
        )
    made = {
        group.name: GroupSensitivity(
            group.modules,
            group.parameters,
            {
                format.name: _finite(parts[group.name, format.name] / weight)
                for format in formats
                if (group.name, format.name) in parts
            },
        )
        for group in groups
    }
    examples = sum(len(batch["input_ids"]) for batch in batches)
    return Sensitivity(
        type(model).__name__,
        metric,
        tuple(format.name for format in formats),
        made,
        examples,
        examples if metric.is_relative else round(weight),
        facts or {},
    )


@contextlib.contextmanager
def rounded(model: nn.Module, shared: Any, targets: tuple[Target, ...]) -> Iterator[None]:
    """Inside, forward of the model reads these weights as training with the block would."""
    technique = WeightQuantization(TechniquePlan(BLOCK, shared, targets), 0)
    technique.prepare(model)
    try:
        yield
    finally:
        technique.detach()


def _cells(
    model: nn.Module, formats: Sequence[Format], groups: Sequence[LayerGroup]
) -> tuple[dict[_Cell, tuple[Target, ...]], dict[str, Any]]:
    """Targets of each group in each format that fits it, and the settings of the block by format."""
    cells: dict[_Cell, tuple[Target, ...]] = {}
    shared = {}
    for format in formats:
        shared[format.name], found = targets_in(model, groups, format)
        cells.update({(name, format.name): targets for name, targets in found.items()})
    return cells, shared


def _forward(model: Any, batch: Batch) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _on_device(model: Any, batch: Batch) -> Batch:
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _gathered(own: dict[int, list[float]], failure: ValueError | None) -> dict[int, list[float]]:
    """Sums of all batches by number; raises ValueError in every process where one of them failed."""
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return own
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (own, None if failure is None else str(failure)))
    for rank, (_, message) in enumerate(parts):
        if message is not None:
            raise ValueError(f"process {rank}: {message}") from failure
    return {number: sums for part, _ in parts for number, sums in part.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
