"""Which parameters are sent uncompressed while the others are quantized: those with negligible bytes.

A LayerNorm, a bias or a gain has few elements, often with gradients of another magnitude; each matters more than an
element of a matrix does. Of BERT they are 0.1 %, of a Llama 0.01 % of all elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SMALLEST_QUANTIZED = 1024
"""Elements; a parameter with fewer would be a block or two with a scale each, and costs next to nothing as it is."""


def is_sent_uncompressed(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is small, or has only one dimension that is longer than 1."""
    return math.prod(shape) < SMALLEST_QUANTIZED or sum(size > 1 for size in shape) < 2
