"""What quantized inputs of fused experts need of the implementation that multiplies them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ds_compress.config.targets import Target
from ds_compress.errors import Problem, dotted, shown

_FUSED = ("deepgemm", "sonicmoe")
"""Kernels that multiply by both matrices and apply the gate in between: nothing can be rounded there."""


def implementations(key: str, targets: Sequence[Target]) -> Iterator[Problem]:
    """Experts whose products are one kernel."""
    for target in targets:
        config: Any = getattr(target.module, "config", None)
        chosen = getattr(config, "_experts_implementation", None)
        if target.kind.is_experts and chosen in _FUSED:
            yield Problem(
                dotted(key, "different_groups", target.group, "modules"),
                f"{target.module_name}, whose experts implementation is {shown(chosen)}",
                '"grouped_mm", "batched_mm" or "eager": that kernel computes both products and what is between them',
                'load the model with experts_implementation="grouped_mm", or quantize weights only',
            )
            return
