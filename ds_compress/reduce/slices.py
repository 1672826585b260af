"""Which elements of a bucket of gradients each owner is to get, and how they are cut into pieces.

A bucket is a list of flat segments in any order and of any sizes, each with one owner. What belongs to an owner, in
the order of the list, is its slice; slices may be empty and of very different lengths.

A slice is laid out in places: every segment begins at a multiple of `granule`, the places after its end are empty and
read as 0. So no block of a quantizer has elements of two parameters, and none is rounded in steps that another's
gradients made too coarse for it. Piece p of a slice is its places [p * quantum, (p + 1) * quantum).
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
    there; error feedback keeps what was lost under them. exact: never quantized, see `exactness`. The same for every
    process, except for `values`.
    """

    values: torch.Tensor
    owner: int
    key: str = ""
    start: int = 0
    exact: bool = False

    @property
    def numel(self) -> int:
        return self.values.numel()


@dataclass(frozen=True)
class Part:
    """Elements of one segment: [begin, end) of `segment.values`; `granule` as in the slice it is from."""

    segment: Segment
    begin: int
    end: int
    granule: int = 1

    @property
    def numel(self) -> int:
        return self.end - self.begin

    @property
    def places(self) -> int:
        """Elements, and the empty places after them."""
        return -(-self.numel // self.granule) * self.granule

    @property
    def values(self) -> torch.Tensor:
        return self.segment.values[self.begin : self.end]

    @property
    def start(self) -> int:
        """First element within the parameter."""
        return self.segment.start + self.begin


class Slice:
    """Everything of one owner, addressed as if it were one tensor; `numel` counts places."""

    def __init__(self, segments: Sequence[Segment], granule: int = 1) -> None:
        self._segments = [segment for segment in segments if segment.numel]
        self._granule = granule
        self._ends = list(
            itertools.accumulate(-(-segment.numel // granule) * granule for segment in self._segments)
        )
        self.numel = self._ends[-1] if self._ends else 0

    def parts(self, begin: int, end: int) -> Iterator[Part]:
        """The parts of segments at places [begin, end), `end` cut at its length; both multiples of the granule."""
        end = min(end, self.numel)
        index = bisect.bisect_right(self._ends, begin)
        while begin < end:
            segment = self._segments[index]
            offset = self._ends[index - 1] if index else 0
            last = min(min(end, self._ends[index]) - offset, segment.numel)
            part = Part(segment, begin - offset, last, self._granule)
            yield part
            begin += part.places
            index += 1


def joined(parts: Sequence[Part]) -> torch.Tensor:
    """(count(parts),): the elements in their places: a view when there is one part, else a copy."""
    if len(parts) == 1:
        return parts[0].values
    return laid_out([part.values for part in parts], parts)


def laid_out(values: Sequence[torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    """`values`, one tensor for each part, with zeros in the empty places between them."""
    pieces: list[torch.Tensor] = []
    zeros = values[0].new_zeros(max(part.granule for part in parts))
    for value, part in zip(values, parts, strict=True):
        pieces += [value, zeros[: part.places - part.numel]]
    return torch.cat(pieces[:-1])


def spread(flat: torch.Tensor, parts: Sequence[Part]) -> Iterator[torch.Tensor]:
    """The elements of each part: the inverse of `laid_out`."""
    begin = 0
    for part in parts:
        yield flat[begin : begin + part.numel]
        begin += part.places


def count(parts: Sequence[Part]) -> int:
    """Places in all parts, without the empty ones at the end."""
    return sum(part.places for part in parts[:-1]) + parts[-1].numel if parts else 0


class Slices:
    """The slices of all owners of one bucket.

    quantum: places of a slice that travel in one piece, a multiple of `granule`.
    """

    def __init__(self, segments: Sequence[Segment], owners: int, quantum: int, granule: int = 1) -> None:
        by_owner: list[list[Segment]] = [[] for _ in range(owners)]
        for segment in segments:
            by_owner[segment.owner].append(segment)
        self.of = [Slice(segments, granule) for segments in by_owner]
        self.quantum = quantum

    @property
    def pieces(self) -> int:
        """Pieces of the longest slice."""
        return max(-(-piece.numel // self.quantum) for piece in self.of)

    def parts(self, owner: int, piece: int) -> list[Part]:
        """What `owner` gets in `piece`; empty when its slice is over."""
        return list(self.of[owner].parts(piece * self.quantum, (piece + 1) * self.quantum))
