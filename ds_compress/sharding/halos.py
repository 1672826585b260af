"""Block rows that are cut between processes, made whole in each process that has a part of them.

Nobody is told who holds what. Pass by pass over the block rows of all parameters, a flag for each of them tells which
are cut, and those are summed from their disjoint parts. So what a process sends and holds at a time is bounded,
whatever the model and the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ds_compress.sharding.fragment import Fragment

AT_A_TIME = 1 << 24
"""Elements of the parameters in one pass: 64 MiB in fp32, where every block row is cut."""

Reduction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Run:
    """Block rows [begin, end) of a parameter of `numel` elements; each has `block_row`, the last one maybe fewer."""

    name: str
    block_row: int
    numel: int
    begin: int
    end: int

    def span(self, row: int) -> tuple[int, int]:
        """The elements [low, high) of a block row."""
        return row * self.block_row, min((row + 1) * self.block_row, self.numel)

    def sizes(self) -> torch.Tensor:
        """Elements of each block row, int64."""
        sizes = torch.full((self.end - self.begin,), self.block_row, dtype=torch.int64)
        low, high = self.span(self.end - 1)
        sizes[-1] = high - low
        return sizes


def exchange(
    fragments: Mapping[str, Fragment],
    values: Mapping[str, torch.Tensor],
    block_row_numel: Mapping[str, int],
    numel: Mapping[str, int],
    total: Reduction,
    most: Reduction,
    at_a_time: int = AT_A_TIME,
) -> dict[str, torch.Tensor]:
    """See `Shards.exchange_halos`. total, most: the sum and the maximum over the processes."""
    whole = {
        name: _with_room(fragments[name], own, block_row_numel[name], numel[name])
        for name, own in values.items()
    }
    for runs in _passes(block_row_numel, numel, at_a_time):
        _fill(runs, fragments, values, whole, total, most)
    return whole


def _with_room(fragment: Fragment, own: torch.Tensor, block_row: int, numel: int) -> torch.Tensor:
    """The block rows that the fragment touches, with its own elements."""
    before = fragment.start % block_row
    end = min(-(-(fragment.start + fragment.numel) // block_row) * block_row, numel)
    size = end - fragment.start + before
    if size == fragment.numel:
        return own
    whole = own.new_zeros(size)
    whole[before : before + fragment.numel] = own
    return whole


def _passes(
    block_row_numel: Mapping[str, int], numel: Mapping[str, int], at_a_time: int
) -> Iterator[list[_Run]]:
    """All block rows in order, about `at_a_time` elements at once; the same in every process."""
    runs, left = list[_Run](), at_a_time
    for name, block_row in block_row_numel.items():
        at, rows = 0, -(-numel[name] // block_row)
        while at < rows:
            end = min(rows, at + max(1, left // block_row))
            runs.append(_Run(name, block_row, numel[name], at, end))
            left, at = left - (end - at) * block_row, end
            if left < block_row:
                yield runs
                runs, left = [], at_a_time
    if runs:
        yield runs


def _fill(
    runs: Sequence[_Run],
    fragments: Mapping[str, Fragment],
    values: Mapping[str, torch.Tensor],
    whole: Mapping[str, torch.Tensor],
    total: Reduction,
    most: Reduction,
) -> None:
    """Completes those block rows of `runs` in `whole` that are cut; a collective."""
    sizes = torch.cat([run.sizes() for run in runs])
    is_cut, first, ours = torch.zeros(len(sizes), dtype=torch.uint8), 0, list[tuple[_Run, int, int]]()
    for run in runs:
        fragment = fragments.get(run.name)
        if fragment is not None:
            # Where a block row is cut, a fragment begins inside. Those between its first and its last are its own.
            rows = {fragment.start // run.block_row, (fragment.start + fragment.numel - 1) // run.block_row}
            held = [(run, row, first + row - run.begin) for row in rows if run.begin <= row < run.end]
            ours += held if run.name in values else []
            for _, row, place in held:
                is_cut[place] |= int(run.span(row)[0] < fragment.start < run.span(row)[1])
        first += run.end - run.begin
    is_cut = most(is_cut)
    if not is_cut.any():
        return
    ends = (sizes * is_cut).cumsum(0)
    shared = torch.zeros(int(ends[-1]), dtype=torch.float32)
    ours = [(run, row, int(ends[place] - sizes[place])) for run, row, place in ours if is_cut[place]]
    for run, row, at in ours:
        (low, high), fragment = run.span(row), fragments[run.name]
        begin, end = max(low, fragment.start), min(high, fragment.start + fragment.numel)
        own = values[run.name][begin - fragment.start : end - fragment.start]
        shared[at + begin - low : at + end - low] = own
    shared = total(shared)
    for run, row, at in ours:
        low, high = run.span(row)
        start = fragments[run.name].start // run.block_row * run.block_row
        whole[run.name][low - start : high - start] = shared[at : at + high - low]
