"""Which parameters travel as they are while the others are quantized: those whose bytes do not count.

A LayerNorm, a bias or a gain has few elements and often gradients of a size of its own; each matters more than an
element of a matrix does. Of BERT they are 0.1 %, of a Llama 0.01 % of all elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SMALLEST_QUANTIZED = 1024
"""Elements; a parameter with fewer would be a block or two of an own scale each, and is no cost as it is."""


def travels_exactly(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is small, or has one dimension only, those of length 1 aside."""
    return math.prod(shape) < SMALLEST_QUANTIZED or sum(size > 1 for size in shape) < 2
