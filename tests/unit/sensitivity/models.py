"""Inputs that the tests of this folder share."""

from __future__ import annotations

import torch

from ds_compress.sensitivity.calibration import Batch, Example, batches


def examples(count: int = 10, vocabulary: int = 40, seed: int = 0) -> list[Example]:
    """Of 2 to 12 tokens, without padding's 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 13, (count,), generator=generator).tolist()
    return [Example(torch.randint(1, vocabulary, (n,), generator=generator).tolist()) for n in lengths]


def some_batches(count: int = 10, size: int = 4, seed: int = 0) -> list[Batch]:
    return batches(examples(count, seed=seed), size, 0)
