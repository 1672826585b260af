"""Which elements of a bucket of gradients each owner is to get, and how they are cut into pieces.

A bucket is a list of flat segments in any order and of any sizes, each with one owner. What belongs to an owner, in
the order of the list, is its slice; slices may be empty and of very different lengths. Piece p of a slice is its
elements [p * quantum, (p + 1) * quantum).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of gradient elements with one owner.

    values: flat and contiguous, any float dtype. key, start: the parameter it belongs to, and its first element
    there; error feedback keeps what was lost under them. The same for every process, except for `values`.
    """

    values: torch.Tensor
    owner: int
    key: str = ""
    start: int = 0

    @property
    def numel(self) -> int:
        return self.values.numel()


@dataclass(frozen=True)
class Part:
    """Elements of one segment: [begin, end) of `segment.values`."""

    segment: Segment
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.begin

    @property
    def values(self) -> torch.Tensor:
        return self.segment.values[self.begin : self.end]

    @property
    def start(self) -> int:
        """First element within the parameter."""
        return self.segment.start + self.begin


class Slice:
    """Everything of one owner, addressed as if it were one tensor."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = [segment for segment in segments if segment.numel]
        self._ends = list(itertools.accumulate(segment.numel for segment in self._segments))
        self.numel = self._ends[-1] if self._ends else 0

    def parts(self, begin: int, end: int) -> Iterator[Part]:
        """The parts of segments that make up elements [begin, end) of the slice, `end` cut at its length."""
        end = min(end, self.numel)
        index = bisect.bisect_right(self._ends, begin)
        while begin < end:
            segment = self._segments[index]
            offset = self._ends[index] - segment.numel
            part = Part(segment, begin - offset, min(end, self._ends[index]) - offset)
            yield part
            begin += part.numel
            index += 1


def joined(parts: Sequence[Part]) -> torch.Tensor:
    """The elements as one tensor: a view when there is one part, else a copy."""
    if len(parts) == 1:
        return parts[0].values
    return torch.cat([part.values for part in parts])


class Slices:
    """The slices of all owners of one bucket.

    quantum: elements of a slice that travel in one piece.
    """

    def __init__(self, segments: Sequence[Segment], owners: int, quantum: int) -> None:
        by_owner: list[list[Segment]] = [[] for _ in range(owners)]
        for segment in segments:
            by_owner[segment.owner].append(segment)
        self.of = [Slice(segments) for segments in by_owner]
        self.quantum = quantum

    @property
    def pieces(self) -> int:
        """Pieces of the longest slice."""
        return max(-(-piece.numel // self.quantum) for piece in self.of)

    def parts(self, owner: int, piece: int) -> list[Part]:
        """What `owner` gets in `piece`; empty when its slice is over."""
        return list(self.of[owner].parts(piece * self.quantum, (piece + 1) * self.quantum))


def count(parts: Sequence[Part]) -> int:
    """Elements in all parts."""
    return sum(part.numel for part in parts)
