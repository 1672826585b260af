"""Exact distributed top-k by radix selection: the number of kept units is exact, and no score is ever gathered.

The k-th largest score is found from three histograms of its bit pattern (11, 11 and 10 bits), so the amount of
communication does not depend on the size of the model: for one selection group, three sums of 2048, 2048 and 1024
counts and two small ones that break ties, 41 KB in all. Many groups take turns. Ties are broken by global index
(parameter order, then element order), so every layout of the same scores over processes gives the same mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

_DIGITS = ((21, 2048), (10, 2048), (0, 1024))
_CHUNK = 1 << 18
_CHUNK_OF_A_DEVICE = 1 << 24
"""On a device every chunk costs a synchronization, because the number of keys that are left decides what comes next."""
GROUPS_AT_A_TIME = 1 << 11
"""Whose histograms are summed at once, 32 MiB: a mixture of experts may have tens of thousands of groups."""
# Scores whose exponent bits are all ones (Inf, NaN) fill the outermost four bins of the first digit.
_NON_FINITE_BINS = (slice(0, 4), slice(2044, 2048))


class Reductions(Protocol):
    """The collectives that selection needs; `Shards` implements them."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def exclusive_prefix_sum(self, counts: torch.Tensor) -> torch.Tensor: ...


class NonFiniteScoresError(ValueError):
    """A score is NaN or Inf: there is no meaningful order to select by. `groups`: indices of the selection groups."""

    def __init__(self, groups: Sequence[int]) -> None:
        super().__init__(f"scores of the selection groups {list(groups)} contain NaN or Inf")
        self.groups = tuple(groups)


@dataclass(frozen=True)
class ParameterScores:
    """The scores of the units of one parameter of which this process holds a part.

    keys: returns int32 (units,) in the order of the scores (see `sort_keys_`); called three times and not stored, so
    that selection never holds the scores of more than one parameter. num_halo: the first units, which the rank of
    the elements before counts; this process needs only their mask.
    """

    keys: Callable[[], torch.Tensor]
    num_halo: int = 0


@dataclass(frozen=True)
class SelectionGroup:
    """Parameters whose units compete for `num_kept` places."""

    members: tuple[str, ...]
    num_kept: int


def sort_keys_(scores: torch.Tensor, non_negative: bool = False) -> torch.Tensor:
    """int32 keys in the order of fp32 `scores`, in their place; -0.0 equals +0.0.

    `non_negative` scores (which must not contain -0.0) are keys already: their bit patterns are in order.
    """
    keys = scores.view(torch.int32)
    if not non_negative:
        scores.add_(0.0)
        for chunk in keys.split(_chunk(keys)):
            chunk.bitwise_xor_((chunk >> 31).bitwise_and_(0x7FFFFFFF))
    return keys


def select(
    scores: Mapping[str, ParameterScores], groups: Sequence[SelectionGroup], reductions: Reductions
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, mask bool (units,)) for every entry of `scores`; exactly `num_kept` units of each group are kept.

    Every process calls this with the same groups; `scores` holds its part of them and may lack a parameter. A
    parameter is in one group. All reductions are done before the first mask is yielded.

    Raises:
        NonFiniteScoresError: in every process alike, before any mask is made.
    """
    cuts = find_cuts(scores, groups, reductions)
    return ((name, _mask(scores[name], cut)) for name, cut in cuts.items() if name in scores)


@dataclass(frozen=True)
class Cut:
    """Of one parameter are kept: the units whose key is above `threshold`, and the first `quota` of those equal to it,
    of which all processes have `total`, and those before this one `before`."""

    threshold: int
    quota: int
    total: int
    before: int


def find_cuts(
    scores: Mapping[str, ParameterScores], groups: Sequence[SelectionGroup], reductions: Reductions
) -> dict[str, Cut]:
    """The cut of each parameter of the groups, in their order; `select` makes the masks.

    Raises: as `select`.
    """
    thresholds, kept_ties, tie_counts = _thresholds(scores, groups, reductions)
    return cuts_of(groups, thresholds, kept_ties, tie_counts, reductions)


def cuts_of(
    groups: Sequence[SelectionGroup],
    thresholds: torch.Tensor,
    kept_ties: torch.Tensor,
    tie_counts: torch.Tensor,
    reductions: Reductions,
) -> dict[str, Cut]:
    """From the threshold of each group and how many units equal to it are kept; `tie_counts`: how many units of this
    process are equal to it, per parameter."""
    names = [name for group in groups for name in group.members]
    totals = reductions.sum(tie_counts)
    quota, boundary = _tie_quotas(groups, totals, kept_ties)
    # Only a parameter in which the quota runs out needs to know how many ties lie before this process.
    before = reductions.exclusive_prefix_sum(tie_counts[boundary]) if len(boundary) else tie_counts[:0]
    before_of = dict(zip(boundary.tolist(), before.tolist(), strict=True))
    threshold_of = {name: int(thresholds[i]) for i, group in enumerate(groups) for name in group.members}
    return {
        name: Cut(threshold_of[name], int(quota[i]), int(totals[i]), before_of.get(i, 0))
        for i, name in enumerate(names)
    }


def _thresholds(
    scores: Mapping[str, ParameterScores], groups: Sequence[SelectionGroup], reductions: Reductions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per group the key of its `num_kept`-th largest unit and how many units equal to it are kept; per parameter
    how many units of this process are equal to it. All int64."""
    found, bad = [], list[int]()
    for first in range(0, max(1, len(groups)), GROUPS_AT_A_TIME):
        try:
            found.append(_thresholds_of(scores, groups[first : first + GROUPS_AT_A_TIME], reductions))
        except NonFiniteScoresError as error:
            bad += [first + index for index in error.groups]
    if bad:
        raise NonFiniteScoresError(bad)
    prefix, remaining, ties = (torch.cat(parts) for parts in zip(*found, strict=True))
    return prefix, remaining, ties


def _thresholds_of(
    scores: Mapping[str, ParameterScores], groups: Sequence[SelectionGroup], reductions: Reductions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_thresholds` of no more than `GROUPS_AT_A_TIME` groups."""
    remaining = torch.tensor([group.num_kept for group in groups], dtype=torch.int64)
    prefix = torch.zeros(len(groups), dtype=torch.int64)
    survivors: dict[str, torch.Tensor] = {}
    for digit, (shift, bins) in enumerate(_DIGITS):
        histogram = torch.zeros((len(groups), bins), dtype=torch.int64)
        for index, group in enumerate(groups):
            for name in group.members:
                if name in scores:
                    keys = _owned(scores[name]) if digit == 0 else survivors[name]
                    histogram[index] += _digit_histogram(keys, shift, bins, first=digit == 0)
        histogram = reductions.sum(histogram)
        if digit == 0:
            _check_finite(histogram)
        value, remaining = digit_of(histogram, remaining)
        prefix = value - 1024 if digit == 0 else prefix * bins + value
        for index, group in enumerate(groups):
            for name in group.members:
                if name in scores:
                    keys = _owned(scores[name]) if digit == 0 else survivors[name]
                    survivors[name] = _with_prefix(keys, int(prefix[index]), shift)
    ties = [survivors[n].numel() if n in survivors else 0 for group in groups for n in group.members]
    return prefix, remaining, torch.tensor(ties, dtype=torch.int64)


def digit_of(histogram: torch.Tensor, remaining: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per group, of a histogram (groups, bins): the bin of its `remaining`-th largest, and which of that bin it is."""
    bins = histogram.shape[1]
    from_top = histogram.flip(1).cumsum(1)
    bin_from_top = (from_top < remaining[:, None]).sum(1).clamp_(max=bins - 1)
    before = (from_top - histogram.flip(1)).gather(1, bin_from_top[:, None]).squeeze(1)
    return bins - 1 - bin_from_top, remaining - before


def _owned(scores: ParameterScores) -> torch.Tensor:
    return scores.keys()[scores.num_halo :]


def _digit_histogram(keys: torch.Tensor, shift: int, bins: int, first: bool) -> torch.Tensor:
    total = torch.zeros(bins, dtype=torch.int64, device=keys.device)
    for chunk in keys.split(_chunk(keys)):
        digit = chunk >> shift
        digit = digit + 1024 if first else digit & (bins - 1)
        total += torch.bincount(digit, minlength=bins)
    return total.cpu()


def _chunk(keys: torch.Tensor) -> int:
    """Elements at a time; on a CPU, as many as stay in its cache."""
    return _CHUNK if keys.device.type == "cpu" else _CHUNK_OF_A_DEVICE


def _with_prefix(keys: torch.Tensor, prefix: int, shift: int) -> torch.Tensor:
    """The keys whose leading digits are `prefix`."""
    parts = [chunk[(chunk >> shift) == prefix] for chunk in keys.split(_chunk(keys))]
    return torch.cat(parts) if parts else keys


def _check_finite(histogram: torch.Tensor) -> None:
    bad = torch.stack([histogram[:, bins].sum(1) for bins in _NON_FINITE_BINS]).sum(0)
    if bool((bad > 0).any()):
        raise NonFiniteScoresError(bad.nonzero().flatten().tolist())


def _mask(scores: ParameterScores, cut: Cut) -> torch.Tensor:
    return keys_kept(scores.keys(), cut, scores.num_halo)


def keys_kept(keys: torch.Tensor, cut: Cut, num_halo: int = 0) -> torch.Tensor:
    """bool like `keys`: those that the cut keeps."""
    if cut.quota >= cut.total:
        return keys >= cut.threshold
    if cut.quota == 0:
        return keys > cut.threshold
    equal = keys == cut.threshold
    # The halo is the last units of earlier ranks, so its ties end at `before`.
    first = cut.before - int(equal[:num_halo].count_nonzero())
    return (keys > cut.threshold) | (equal & (equal.cumsum(0) <= cut.quota - first))


def _tie_quotas(
    groups: Sequence[SelectionGroup], totals: torch.Tensor, kept_ties: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many ties of each parameter are kept, and the indices of the parameters where some are and some are not."""
    quota, position = torch.zeros_like(totals), 0
    for index, group in enumerate(groups):
        left = int(kept_ties[index])
        for _ in group.members:
            quota[position] = min(left, int(totals[position]))
            left -= int(quota[position])
            position += 1
    return quota, ((quota > 0) & (quota < totals)).nonzero().flatten()
