"""Exact top-k of scores that hardly move between two selections, in one pass over them.

A threshold that was found before says where the next one is: what lies above a window around the guess is kept, what
lies below is not, and only the few scores inside are looked at again (`ops.functional.mask_window`). Where the guess
was wrong, and the first time, `radix` selects from all scores. Either way exactly the same units are kept; and all
processes take the same way, because they guess from thresholds that all of them know.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ds_compress.ops import bitmask
from ds_compress.select import radix
from ds_compress.select.radix import Cut, Reductions, SelectionGroup

_FIRST_MARGIN, _LEAST_MARGIN = 2.0**-7, 2.0**-11
"""Of a threshold."""
_DIGITS = ((21, 2048), (10, 2048), (0, 1024))
"""(shift, bins) that find a key by its distance from the low end of a window."""
_INSIDE_AT_MOST, _CAPACITY_AT_LEAST = 16, 1 << 10
"""One score of so many may lie inside the window, but for small parameters."""
_NOTHING = (0, 0, 0, False)
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Candidates:
    """The scores of one parameter of which this process holds a part.

    scores: gives fp32 (n,), only to be read, and whether their absolute values count; called for one parameter at a
    time. competing: packed bits of those that take part, the others rank below all of them; None: all do.
    """

    scores: Callable[[], tuple[torch.Tensor, bool]]
    competing: torch.Tensor | None

    def keys(self) -> torch.Tensor:
        """int32 (n,) in their order."""
        given, magnitude = self.scores()
        scores = given.abs() if magnitude else given.clone()
        if self.competing is not None:
            bitmask.apply_(scores, self.competing, fill=-_LARGEST)
        return radix.sort_keys_(scores, non_negative=magnitude and self.competing is None)


class MovingThresholds:
    """Selects as `radix.select` does, and remembers the threshold of each selection group."""

    def __init__(self) -> None:
        self._guesses: dict[tuple[str, ...], _Guess] = {}

    def select(
        self, candidates: Mapping[str, Candidates], groups: Sequence[SelectionGroup], reductions: Reductions
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, packed mask uint8 (ceil(n / 8),)) for every entry of `candidates`, in the order of the groups.

        All reductions are done before the first mask is yielded.

        Raises:
            NonFiniteScoresError: as `radix.select`.
        """
        guessed = [group for group in groups if group.members in self._guesses]
        found = {
            name: _Found.of(candidates[name], self._guesses[group.members].window)
            for group in guessed
            for name in group.members
            if name in candidates
        }
        missing = self._missing(guessed, found, reductions)
        hit = [group for group in guessed if group.members in missing]
        cuts = self._cuts_in_windows(hit, missing, found, reductions)
        cuts |= self._cuts_of_all(
            candidates, groups, [g for g in groups if g.members not in missing], reductions
        )
        for group in groups:
            self._learn(group.members, cuts[group.members[0]], group.members in missing)
        return (
            (
                name,
                found[name].kept(cuts[name])
                if group.members in missing
                else _kept(candidates[name], cuts[name]),
            )
            for group in groups
            for name in group.members
            if name in candidates
        )

    def _missing(
        self, groups: Sequence[SelectionGroup], found: Mapping[str, _Found], reductions: Reductions
    ) -> dict[tuple[str, ...], int]:
        """By members, of each group whose threshold lies in its window: how many units from inside are kept."""
        if not groups:
            return {}
        own = [[found[name].counts for name in group.members if name in found] for group in groups]
        counts = torch.tensor([[sum(column) for column in zip(_NOTHING, *rows, strict=True)] for rows in own])
        missing = {}
        for group, row in zip(groups, reductions.sum(counts).tolist(), strict=True):
            above, inside, non_finite, overflowed = row
            if overflowed:
                self._guesses[group.members] = self._guesses[group.members].narrower
            elif not non_finite and above < group.num_kept <= above + inside:
                missing[group.members] = group.num_kept - above
        return missing

    def _cuts_in_windows(
        self,
        groups: Sequence[SelectionGroup],
        missing: Mapping[tuple[str, ...], int],
        found: Mapping[str, _Found],
        reductions: Reductions,
    ) -> dict[str, Cut]:
        """Radix selection from what lies in the windows of the groups."""
        cuts, size = dict[str, Cut](), radix.GROUPS_AT_A_TIME
        for first in range(0, len(groups), size):
            cuts |= self._cuts_at_once(groups[first : first + size], missing, found, reductions)
        return cuts

    def _cuts_at_once(
        self,
        groups: Sequence[SelectionGroup],
        missing: Mapping[tuple[str, ...], int],
        found: Mapping[str, _Found],
        reductions: Reductions,
    ) -> dict[str, Cut]:
        lows = torch.tensor([self._guesses[group.members].window[0] for group in groups])
        remaining = torch.tensor([missing[group.members] for group in groups])
        of_group, of_member, offsets = _inside(groups, found, lows)
        place = torch.zeros(len(groups), dtype=torch.int64)
        for shift, bins in _DIGITS:
            digits = offsets >> shift
            counts = torch.bincount(of_group * bins + digits, minlength=len(groups) * bins)
            value, remaining = radix.digit_of(reductions.sum(counts.view(-1, bins).cpu()), remaining)
            place += value << shift
            equal = digits == value.to(digits.device)[of_group]
            of_group, of_member, offsets = (
                of_group[equal],
                of_member[equal],
                offsets[equal] & ((1 << shift) - 1),
            )
        members = sum(len(group.members) for group in groups)
        ties = torch.bincount(of_member, minlength=members).cpu()
        return radix.cuts_of(groups, lows + place, remaining, ties, reductions)

    def _cuts_of_all(
        self,
        candidates: Mapping[str, Candidates],
        groups: Sequence[SelectionGroup],
        missed: Sequence[SelectionGroup],
        reductions: Reductions,
    ) -> dict[str, Cut]:
        if not missed:
            return {}
        names = [name for group in missed for name in group.members if name in candidates]
        scores = {name: radix.ParameterScores(candidates[name].keys) for name in names}
        try:
            return radix.find_cuts(scores, missed, reductions)
        except radix.NonFiniteScoresError as error:
            raise radix.NonFiniteScoresError([groups.index(missed[i]) for i in error.groups]) from None

    def _learn(self, members: tuple[str, ...], cut: Cut, was_right: bool) -> None:
        known, threshold = self._guesses.get(members), _score_of(cut.threshold)
        self._guesses[members] = (
            _Guess.first(threshold) if known is None else known.after(threshold, was_right)
        )


@dataclass(frozen=True)
class _Guess:
    """A threshold that was found, how it moved before, and by how much the next guess may err.

    In scores, not in keys, of which half lie between -1 and 1 wherever the scores do.
    """

    threshold: float
    move: float
    margin: float

    @classmethod
    def first(cls, threshold: float) -> _Guess:
        return cls(threshold, 0.0, _FIRST_MARGIN * abs(threshold))

    @property
    def window(self) -> tuple[int, int]:
        """The keys of its ends."""
        middle = self.threshold + self.move
        return _key_of(middle - self.margin), _key_of(middle + self.margin)

    def after(self, threshold: float, was_right: bool) -> _Guess:
        """Guesses that are right let the margin shrink slowly to four times their error; one that was wrong widens it.

        A miss costs a selection from all scores, a window twice as wide a few percent of that.
        """
        error = abs(threshold - self.threshold - self.move)
        margin = max(4 * error, 0.75 * self.margin) if was_right else max(error, 2 * self.margin)
        margin = max(margin, _LEAST_MARGIN * abs(threshold))
        return _Guess(threshold, threshold - self.threshold, margin)

    @property
    def narrower(self) -> _Guess:
        return replace(self, margin=self.margin / 16)


def _key_of(score: float) -> int:
    """As `radix.sort_keys_` orders; what fp32 does not reach is its largest value."""
    within = max(-_LARGEST, min(score, _LARGEST))
    bits = int.from_bytes(struct.pack("<f", within + 0.0), "little", signed=True)
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


def _score_of(key: int) -> float:
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    score: float = struct.unpack("<f", bits.to_bytes(4, "little", signed=True))[0]
    return score


@dataclass(frozen=True)
class _Found:
    """What a pass over the scores of a parameter found.

    counts: above the window, inside, not finite, and whether not all that lies inside is at hand.
    """

    packed: torch.Tensor
    keys: torch.Tensor
    places: torch.Tensor
    counts: tuple[int, int, int, bool]

    @classmethod
    def of(cls, candidates: Candidates, window: tuple[int, int]) -> _Found:
        scores, magnitude = candidates.scores()
        capacity = max(_CAPACITY_AT_LEAST, scores.numel() // _INSIDE_AT_MOST)
        packed, keys, places, counts = bitmask.window(
            scores, candidates.competing, *window, magnitude, capacity
        )
        above, inside, non_finite = counts.tolist()
        # Copies: what the pass had room for is many times what it found.
        found = keys[:inside].clone(), places[:inside].clone()
        return cls(packed, *found, (above, inside, non_finite, inside > capacity))

    def kept(self, cut: Cut) -> torch.Tensor:
        """The packed mask."""
        bitmask.set_bits_(self.packed, self.places[radix.keys_kept(self.keys, cut)])
        return self.packed


def _inside(
    groups: Sequence[SelectionGroup], found: Mapping[str, _Found], lows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each score inside a window: the index of its group, of its parameter, and its key above the window's low."""
    of_group, of_member, offsets, member = [], [], [], 0
    for index, group in enumerate(groups):
        for name in group.members:
            if name in found:
                keys = found[name].keys
                of_group.append(torch.full_like(keys, index, dtype=torch.int64))
                of_member.append(torch.full_like(keys, member, dtype=torch.int64))
                offsets.append(keys.long() - int(lows[index]))
            member += 1
    if not offsets:
        return (lows.new_empty(0),) * 3
    return torch.cat(of_group), torch.cat(of_member), torch.cat(offsets)


def _kept(candidates: Candidates, cut: Cut) -> torch.Tensor:
    return bitmask.pack(radix.keys_kept(candidates.keys(), cut))
