"""Several holders of fragments inside one process: threads that meet at each reduction.

Runs the very code that processes run, in milliseconds, so property tests can try any layout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ds_compress.sharding.shards import Shards


class PlainFragment:
    """A fragment that is nothing but its numbers."""

    def __init__(self, name: str, full: torch.Tensor, start: int, numel: int) -> None:
        self.name, self.shape, self.start, self.numel = name, tuple(full.shape), start, numel
        self.values = full.flatten()[start : start + numel].clone()
        self.gradient: torch.Tensor | None = None
        self.group = "threads"


class RankShards(Shards):
    """`Shards` of one thread; collectives go through the common `_Meeting`."""

    def __init__(self, fragments: Sequence[PlainFragment], meeting: _Meeting, place: int) -> None:
        self.fragments = {f.name: f for f in fragments}  # type: ignore[misc]
        self._meeting, self._place = meeting, place
        self._group = meeting if meeting.size > 1 else None
        self._device = torch.device("cpu")
        self.sums = self.maxima = 0
        self.bytes = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return torch.stack(self._meeting.exchange(self._place, tensor)).sum(0)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        self.maxima += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return torch.stack(self._meeting.exchange(self._place, tensor)).amax(0)

    def exclusive_prefix_sum(self, counts: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        self.bytes += self._meeting.size * counts.numel() * 8
        everyone = self._meeting.exchange(self._place, counts)
        return sum(everyone[: self._place], torch.zeros_like(counts))


class _Meeting:
    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[Any] = [None] * size

    def exchange(self, place: int, value: Any) -> list[Any]:
        self._slots[place] = value
        self._barrier.wait(timeout=60)
        result = list(self._slots)
        self._barrier.wait(timeout=60)
        return result

    def abort(self) -> None:
        self._barrier.abort()


def run_ranks_of_shards(
    full: Mapping[str, torch.Tensor], cuts: Sequence[int], work: Callable[[RankShards], Any]
) -> list[Any]:
    """Lays the tensors end to end, cuts the line at `cuts`, and calls `work` for each piece in a thread of its own."""
    total = sum(t.numel() for t in full.values())
    edges = [0, *sorted(cuts), total]
    meeting = _Meeting(len(edges) - 1)
    results: list[Any] = [None] * meeting.size
    errors: list[BaseException] = []

    def run(place: int) -> None:
        low, high, at, fragments = edges[place], edges[place + 1], 0, []
        for name, tensor in full.items():
            begin, end = max(low, at), min(high, at + tensor.numel())
            if begin < end:
                fragments.append(PlainFragment(name, tensor, begin - at, end - begin))
            at += tensor.numel()
        try:
            results[place] = work(RankShards(fragments, meeting, place))
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(meeting.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if real:
        raise real[0]
    return results


def joined(
    full: Mapping[str, torch.Tensor], parts: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The pieces of each tensor that the holders returned, put together again in order."""
    return {
        name: torch.cat([part[name] for part in parts if name in part]).view(t.shape)
        for name, t in full.items()
    }
