"""Which elements of a bucket of gradients each owner gets, and how they are divided into chunks.

A bucket is a list of flat segments in any order and of any sizes, each with one owner. The segments of an owner, in
the order of the list, are its slice; slices may be empty and of very different lengths.

A slice is padded: every segment begins at a multiple of `alignment`, and the positions after its end read as 0. So no
block of a quantizer has elements of two parameters, and small gradients are not rounded with the scale of another
parameter's large ones. Chunk c of a slice is its positions [c * chunk_numel, (c + 1) * chunk_numel).
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

    values: flat and contiguous, any float dtype. key, start: the parameter that it belongs to, and its first element
    there; error feedback stores residuals under them. exact: never quantized, see `uncompressed`. All but `values` are
    the same in every process.
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
    """Elements of one segment: [begin, end) of `segment.values`; `alignment` as in its slice."""

    segment: Segment
    begin: int
    end: int
    alignment: int = 1

    @property
    def numel(self) -> int:
        return self.end - self.begin

    @property
    def padded_numel(self) -> int:
        """Elements, and the padding after them."""
        return -(-self.numel // self.alignment) * self.alignment

    @property
    def values(self) -> torch.Tensor:
        return self.segment.values[self.begin : self.end]

    @property
    def start(self) -> int:
        """First element within the parameter."""
        return self.segment.start + self.begin


class Slice:
    """All segments of one owner, addressed as one padded tensor of `numel` positions."""

    def __init__(self, segments: Sequence[Segment], alignment: int = 1) -> None:
        self._segments = [segment for segment in segments if segment.numel]
        self._alignment = alignment
        self._ends = list(
            itertools.accumulate(-(-segment.numel // alignment) * alignment for segment in self._segments)
        )
        self.numel = self._ends[-1] if self._ends else 0

    def parts(self, begin: int, end: int) -> Iterator[Part]:
        """The parts of segments at positions [begin, end), up to its length; both multiples of the alignment."""
        end = min(end, self.numel)
        index = bisect.bisect_right(self._ends, begin)
        while begin < end:
            segment = self._segments[index]
            offset = self._ends[index - 1] if index else 0
            last = min(min(end, self._ends[index]) - offset, segment.numel)
            part = Part(segment, begin - offset, last, self._alignment)
            yield part
            begin += part.padded_numel
            index += 1


def packed(parts: Sequence[Part]) -> torch.Tensor:
    """(packed_numel(parts),): the elements with the padding between them; a view of a single part, else a copy."""
    if len(parts) == 1:
        return parts[0].values
    return pack([part.values for part in parts], parts)


def pack(values: Sequence[torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    """`values`, one tensor for each part, with zeros as padding between them."""
    chunks: list[torch.Tensor] = []
    zeros = values[0].new_zeros(max(part.alignment for part in parts))
    for value, part in zip(values, parts, strict=True):
        chunks += [value, zeros[: part.padded_numel - part.numel]]
    return torch.cat(chunks[:-1])


def unpack(flat: torch.Tensor, parts: Sequence[Part]) -> Iterator[torch.Tensor]:
    """The elements of each part: the inverse of `pack`."""
    begin = 0
    for part in parts:
        yield flat[begin : begin + part.numel]
        begin += part.padded_numel


def packed_numel(parts: Sequence[Part]) -> int:
    """Positions of all parts, without the padding at the end."""
    return sum(part.padded_numel for part in parts[:-1]) + parts[-1].numel if parts else 0


class Slices:
    """The slices of all owners of one bucket.

    chunk_numel: positions of a slice that are sent in one chunk, a multiple of `alignment`.
    """

    def __init__(
        self, segments: Sequence[Segment], owners: int, chunk_numel: int, alignment: int = 1
    ) -> None:
        by_owner: list[list[Segment]] = [[] for _ in range(owners)]
        for segment in segments:
            by_owner[segment.owner].append(segment)
        self.of = [Slice(segments, alignment) for segments in by_owner]
        self.chunk_numel = chunk_numel

    @property
    def chunks(self) -> int:
        """Chunks of the longest slice."""
        return max(-(-chunk.numel // self.chunk_numel) for chunk in self.of)

    def parts(self, owner: int, chunk: int) -> list[Part]:
        """What `owner` gets in `chunk`; empty after the end of its slice."""
        return list(self.of[owner].parts(chunk * self.chunk_numel, (chunk + 1) * self.chunk_numel))
