"""In what buckets gradients are reduced, and who owns which part of one: as DeepSpeed 0.19 makes them.

Gradients come in the reverse order of the parameters, about as backward makes them; which order it really is changes
who shares a bucket, not how much is sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ds_compress.config.targets import Weight
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.reduce.uncompressed import is_sent_uncompressed

_ALIGNMENT = 2
"""Elements to which ZeRO-1 and 2 round the slice of a process up."""


@dataclass(frozen=True)
class Run:
    """Elements of one parameter with one owner; `count` owners have as many each. exact: never quantized."""

    owner: int
    numel: int
    exact: bool
    count: int = 1


@dataclass(frozen=True)
class Bucket:
    """What is reduced together."""

    runs: tuple[Run, ...]

    @property
    def numel(self) -> int:
        return sum(run.numel * run.count for run in self.runs)


def flat_numel(weights: Iterable[Weight], processes: int) -> int:
    """Elements of the flat buffer of all weights that ZeRO-1 and 2 cut into slices."""
    step = _ALIGNMENT * processes
    return -(-sum(weight.numel for weight in weights) // step) * step


def shard_numel(weight: Weight, processes: int) -> int:
    """Elements of one process' part of a parameter under ZeRO-3."""
    return -(-weight.numel // processes)


def owned_numel(weights: Sequence[Weight], layout: RunLayout) -> int:
    """Elements of one process' part of the fp32 weights, of the process that has most."""
    if layout.stage == 0:
        return sum(weight.numel for weight in weights)
    if layout.stage == 3:
        return sum(shard_numel(weight, layout.world_size) for weight in weights)
    return flat_numel(weights, layout.world_size) // layout.world_size


def owned_by_each(weights: Sequence[Weight], names: Collection[str], layout: RunLayout) -> list[int]:
    """Elements of the weights `names` that each process owns; one number where all own as many."""
    if layout.stage not in (1, 2):
        return [owned_numel([weight for weight in weights if weight.name in names], layout)]
    return _of_owners(weights, layout, lambda weight, run: run.numel if weight.name in names else 0)


def touched_by_each(weights: Sequence[Weight], layout: RunLayout) -> list[int]:
    """Elements of all weights of which each process owns a part under ZeRO-1 or 2."""
    return _of_owners(weights, layout, lambda weight, _: weight.numel)


def _of_owners(
    weights: Sequence[Weight], layout: RunLayout, count: Callable[[Weight, Run], int]
) -> list[int]:
    firsts, size = _firsts(weights), flat_numel(weights, layout.world_size) // layout.world_size
    found = [0] * layout.world_size
    for weight in weights:
        for run in _slices(firsts[weight.name], weight, size):
            found[run.owner] += count(weight, run)
    return found


def buckets(weights: Sequence[Weight], layout: RunLayout) -> Iterator[Bucket]:
    """Those of one reduction. weights: that train, in the order of the model."""
    processes = layout.world_size
    firsts, size = _firsts(weights), flat_numel(weights, processes) // processes
    for members in _filled(weights, layout):
        runs: list[Run] = []
        for weight in members:
            runs += (
                _equal_parts(weight, processes)
                if layout.stage == 3
                else _slices(firsts[weight.name], weight, size)
            )
        yield Bucket(tuple(runs))


def _firsts(weights: Sequence[Weight]) -> dict[str, int]:
    """First element of each in the flat buffer."""
    ends = itertools.accumulate(weight.numel for weight in weights)
    return {weight.name: end - weight.numel for weight, end in zip(weights, ends, strict=True)}


def _filled(weights: Sequence[Weight], layout: RunLayout) -> Iterator[list[Weight]]:
    in_order = weights if layout.stage == 0 or layout.is_bf16_optimizer else list(reversed(weights))
    members: list[Weight] = []
    numel = 0
    for weight in in_order:
        # Without ZeRO a bucket ends behind the parameter that makes it full, with ZeRO before it.
        over = numel > layout.bucket if layout.stage == 0 else numel + weight.numel > layout.bucket
        if members and over:
            yield members
            members, numel = [], 0
        members.append(weight)
        numel += weight.numel
    if members:
        yield members


def _equal_parts(weight: Weight, processes: int) -> Iterator[Run]:
    exact, part = is_sent_uncompressed(weight.shape), shard_numel(weight, processes)
    full, rest = divmod(weight.numel, part) if part else (0, 0)
    if full:
        yield Run(0, part, exact, full)
    if rest:
        yield Run(full, rest, exact)


def _slices(first: int, weight: Weight, size: int) -> Iterator[Run]:
    """Of a parameter that begins at element `first` of the flat buffer, which is cut into slices of `size` elements."""
    at, end, exact = first, first + weight.numel, is_sent_uncompressed(weight.shape)
    while at < end:
        owner = at // size
        stop = min(end, (owner + 1) * size)
        yield Run(owner, stop - at, exact)
        at = stop
