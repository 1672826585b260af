"""`head_pruning`: attention layers lose heads.

    "head_pruning": {"dense_ratio": 0.5}

A head is its rows of the query, key and value projections and its columns of the output projection, which are what
`l1` sums; under grouped-query attention the unit is a key/value head with its query heads. `method` is `topk` unless
the JSON says otherwise. See `techniques.structured_pruning` for the keys.
"""

from __future__ import annotations

from typing import ClassVar

from ds_compress.techniques.structured_pruning import StructuredPruning


class HeadPruning(StructuredPruning):
    name: ClassVar[str] = "head_pruning"
