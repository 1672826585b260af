"""`hidden_pruning`: the model's hidden size shrinks.

    "hidden_pruning": {"dense_ratio": 0.75}

A unit is one entry of the residual stream, with every weight that writes or reads it. Exact only for models that
normalize by a root mean square and scale nothing by the hidden size; others are refused with the reason. See
`techniques.structured_pruning` for the keys.
"""

from __future__ import annotations

from typing import ClassVar

from ds_compress.techniques.structured_pruning import StructuredPruning


class HiddenPruning(StructuredPruning):
    name: ClassVar[str] = "hidden_pruning"
