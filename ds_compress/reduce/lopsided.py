"""Whether a bucket of gradients belongs to so few owners that a reduce-scatter is slower than an all-reduce."""

from __future__ import annotations

from collections.abc import Sequence


def is_lopsided(of_owner: Sequence[int]) -> bool:
    """Whether one owner gets so much of a bucket that its link would be the wall. of_owner: elements, by owner.

    All W - 1 others send it their n_w elements; an all-reduce brings 2 (W - 1) / W of all n elements to everybody. With
    many buckets a bucket of ZeRO-2 belongs to one or two of all processes.
    """
    return len(of_owner) > 2 and max(of_owner) * len(of_owner) > 2 * sum(of_owner)
