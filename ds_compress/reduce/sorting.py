"""Order statistics per coordinate over a few workers, by a network of minima and maxima.

`torch.sort` over the short axis of an (n, m) tensor spends most of its time on overhead; a sorting network does the
same with elementwise minima and maxima of rows. Batcher's odd-even merge sort, for any n; for more rows than `LARGEST`
torch's own sort is used.
"""

from __future__ import annotations

import functools

import torch

LARGEST = 8
# Elements of all rows that are processed at a time: few enough to stay in cache.
_IN_CACHE = 1 << 17


@functools.cache
def comparators(n: int) -> tuple[tuple[int, int], ...]:
    """Pairs (low, high) of rows; exchanging each into order, one after the other, sorts any n rows (Knuth 5.2.2 M)."""
    pairs = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(pairs)


def sort_rows_(rows: torch.Tensor) -> torch.Tensor:
    """Sorts each column of `rows` (n, m) in ascending order, in place; returns it."""
    if len(rows) > LARGEST:
        return rows.copy_(rows.sort(0).values)
    step = max(1, _IN_CACHE // max(1, len(rows)))
    low = torch.empty(min(step, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    for begin in range(0, rows.shape[1], step):
        lines = [row[begin : begin + step] for row in rows]
        scratch = low[: lines[0].numel()]
        for a, b in comparators(len(rows)):
            torch.minimum(lines[a], lines[b], out=scratch)
            torch.maximum(lines[a], lines[b], out=lines[b])
            lines[a].copy_(scratch)
    return rows
