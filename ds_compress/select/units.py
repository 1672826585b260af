"""From weights to units and back: sums over the entries of each unit, and element masks from masks of units.

Both work on a fragment [start, start + numel) of a flattened tensor of `shape`. Along dimension `dim`, entries repeat
with the period shape[dim] * stride, where stride is the number of elements behind `dim`: padded to whole periods, a
fragment is a (periods, shape[dim], stride) array, whatever the dimension.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ds_compress.select.gumbel import LOG_OF_ZERO


def unit_sums(
    values: torch.Tensor,
    start: int,
    shape: Sequence[int],
    dim: int,
    index: torch.Tensor,
    of_experts: bool = False,
) -> torch.Tensor:
    """fp64 (units,): for each unit, the sum of the `values` (numel,) of the fragment that belong to it.

    index: int64 (units, width), the entries along `dim` of each unit; of_experts: those of (dimension 0, dim), see
    `CoupledSlice`. Sums are in fp64, so that the division of a tensor into fragments changes the last digits of a
    double only.
    """
    if of_experts:
        by_expert = _sums_of_experts(values, start, shape, dim).flatten()
        return by_expert[on_device(index, by_expert.device)].sum(1)
    stride = math.prod(shape[dim + 1 :])
    period = shape[dim] * stride
    before, periods = _periods(start, values.numel(), period)
    padded = values.new_zeros(periods * period)
    padded[before : before + values.numel()] = values
    by_entry = padded.view(periods, shape[dim], stride).sum((0, 2), dtype=torch.float64)
    return by_entry[on_device(index, by_entry.device)].sum(1)


def unit_mask(
    keep: torch.Tensor,
    start: int,
    numel: int,
    shape: Sequence[int],
    dim: int,
    index: torch.Tensor,
    of_experts: bool = False,
) -> torch.Tensor:
    """bool (numel,): False where the fragment's element belongs to a unit that `keep`, bool (units,), prunes."""
    if of_experts:
        return _mask_of_experts(keep, start, numel, shape, dim, index)
    stride = math.prod(shape[dim + 1 :])
    before, periods = _periods(start, numel, shape[dim] * stride)
    by_entry = torch.ones(shape[dim], dtype=torch.bool)
    by_entry[index[~keep].flatten()] = False
    return by_entry.view(1, -1, 1).expand(periods, shape[dim], stride).reshape(-1)[before : before + numel]


def _sums_of_experts(values: torch.Tensor, start: int, shape: Sequence[int], dim: int) -> torch.Tensor:
    """fp64 (experts, shape[dim]): sums over all other dimensions of the part that the fragment holds."""
    period = math.prod(shape[1:])
    first, (before, experts) = start // period, _periods(start, values.numel(), period)
    padded = values.new_zeros(experts * period)
    padded[before : before + values.numel()] = values
    own = padded.view(experts, math.prod(shape[1:dim]), shape[dim], -1).sum((1, 3), dtype=torch.float64)
    sums = own.new_zeros(shape[0], shape[dim])
    sums[first : first + experts] = own
    return sums


def _mask_of_experts(
    keep: torch.Tensor, start: int, numel: int, shape: Sequence[int], dim: int, index: torch.Tensor
) -> torch.Tensor:
    period = math.prod(shape[1:])
    first, (before, experts) = start // period, _periods(start, numel, period)
    by_entry = torch.ones(shape[0] * shape[dim], dtype=torch.bool)
    by_entry[index[~keep].flatten()] = False
    own = by_entry.view(shape[0], 1, shape[dim], 1)[first : first + experts]
    full = own.expand(experts, math.prod(shape[1:dim]), shape[dim], math.prod(shape[dim + 1 :]))
    return full.reshape(-1)[before : before + numel]


def on_device(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`index`, which never changes, on `device`: copied once, because every copy is a synchronization."""
    if index.device == device:
        return index
    copies = _copies.setdefault(index, {})
    if device not in copies:
        copies[device] = index.to(device)
    return copies[device]


_copies: MutableMapping[torch.Tensor, dict[torch.device, torch.Tensor]] = WeakTensorKeyDictionary()


def top_indices(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted int64 indices of the `count` largest of `scores` (units,); of equal ones those with the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def top_units(scores: torch.Tensor, count: int, parts: int = 1) -> torch.Tensor:
    """As `top_indices`; where the units (units,) are `parts` runs of equal length, of each run as many."""
    if parts == 1:
        return top_indices(scores, count)
    runs = scores.view(parts, -1)
    order = torch.sort(runs, dim=1, descending=True, stable=True).indices
    best = order[:, : count // parts].sort(dim=1).values
    return (best + torch.arange(parts, device=scores.device).unsqueeze(1) * runs.shape[1]).flatten()


def global_counts(
    scores: Sequence[torch.Tensor],
    total: int,
    multiples: int | Sequence[int],
    noise: Sequence[torch.Tensor] | None = None,
) -> list[int]:
    """How many units each group keeps when the units of all groups compete for `total` places.

    Scores are divided by the norm of their group first (Molchanov et al. 2017). Counts are rounded to the nearest
    multiple of `multiples`, that of all groups or of each, at least one and at most all, so that their sum may differ
    from `total` a little. noise: what is added to the logarithms of the divided scores, shaped like them.
    """
    lowest = torch.finfo(torch.float32).min
    normed = [_normed(s.double(), s.double() <= lowest) for s in scores]
    if noise is not None:
        normed = [_noisy_logs(s, z.to(s)) for s, z in zip(normed, noise, strict=True)]
    owner = torch.cat([torch.full((s.numel(),), i) for i, s in enumerate(normed)])
    wanted = torch.bincount(owner[top_indices(torch.cat(normed), total)], minlength=len(normed)).tolist()
    if isinstance(multiples, int):
        multiples = [multiples] * len(normed)
    return [
        min(s.numel(), multiple * max(1, (2 * want + multiple) // (2 * multiple)))
        for s, want, multiple in zip(normed, wanted, multiples, strict=True)
    ]


def _noisy_logs(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """fp64, as `GumbelNoise.perturbed`; -inf stays."""
    logs = (
        scores.clamp_min(torch.finfo(torch.float64).tiny).log().masked_fill(scores <= 0, LOG_OF_ZERO) + noise
    )
    return torch.where(scores.isneginf(), scores, logs)


def _normed(scores: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Scores divided by the norm of those that are not `gone`; the gone ones become -inf."""
    norm = scores.masked_fill(gone, 0.0).norm().clamp_min(torch.finfo(torch.float64).tiny)
    return (scores / norm).masked_fill(gone, -torch.inf)


def _periods(start: int, numel: int, period: int) -> tuple[int, int]:
    """(elements of the first period that lie before the fragment, periods that it touches)."""
    before = start % period if period else 0
    return before, -(-(before + numel) // period) if period else 0
