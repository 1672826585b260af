"""`row_pruning`: feed-forward blocks lose inner neurons.

    "row_pruning": {"dense_ratio": 0.5}

A neuron is a row of the first matrix (of gate and up together in gated blocks), its bias, and a column of the second
matrix; `l1` sums |w| over its inputs, as the removed library did. See `techniques.structured_pruning` for the keys. A
regex that reaches a Linear that is no feed-forward block zeroes its output rows, and nothing is removed.
"""

from __future__ import annotations

from typing import ClassVar

from ds_compress.techniques.structured_pruning import StructuredPruning


class RowPruning(StructuredPruning):
    name: ClassVar[str] = "row_pruning"
