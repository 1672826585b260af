"""Two numbers that identify the values of a tensor. Imports nothing of ds_compress, because reload scripts run it."""

from __future__ import annotations

import torch

_CHUNK = 2**20
_SAME = 1e-5

Fingerprint = list[float]


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> Fingerprint:
    """[norm, projection on a fixed pseudo-random direction], in fp64: any order, any value counts."""
    places = torch.arange(min(_CHUNK, tensor.numel()), dtype=torch.int64)
    signs = ((places * 2654435761 % 4294967296).double() / 2147483648 - 1).to(tensor.device)
    squares = projection = 0.0
    for number, chunk in enumerate(tensor.detach().flatten().split(_CHUNK)):
        values = chunk.double()
        squares += float(values @ values)
        projection += float(values @ signs[: len(values)]) * (1 + number % 7)
    return [squares**0.5, projection]


def same(one: Fingerprint, other: Fingerprint) -> bool:
    """Up to the rounding of a product in fp32."""
    return all(abs(a - b) <= _SAME * min(one[0], other[0]) for a, b in zip(one, other, strict=True))
