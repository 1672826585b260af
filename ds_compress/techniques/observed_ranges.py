"""Static ranges: a running mean of the extremes that training sees in each step, the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from ds_compress.quant.quantizers import InputQuantizer

if TYPE_CHECKING:
    from ds_compress.sharding.shards import Shards


class ObservedRanges:
    """Of the quantizers given by name. momentum: the share of the old range that a new one keeps."""

    def __init__(self, quantizers: Mapping[str, InputQuantizer], momentum: float) -> None:
        self.quantizers = dict(quantizers)
        self._momentum = momentum
        self._shards: Shards | None = None
        self._undo: dict[str, tuple[torch.Tensor | None, bool]] = {}

    def attach(self, shards: Shards) -> None:
        self._shards = shards

    def remember(self) -> None:
        """What `put_back` restores."""
        self._undo = {name: (q.input_range, q.is_complete) for name, q in self.quantizers.items()}

    def put_back(self) -> None:
        """The step was not applied: ranges are as before it, and what it saw is forgotten."""
        for name, quantizer in self.quantizers.items():
            (quantizer.input_range, quantizer.is_complete), quantizer.observed = self._undo[name], None

    @property
    def missing(self) -> int:
        """How many have no range yet."""
        return sum(quantizer.lacks_range for quantizer in self.quantizers.values())

    def update(self, device: torch.device) -> None:
        """All at once: one reduction over processes, and no look at the values once each has a range.

        Extremes that are not finite leave the range as it was.
        """
        quantizers = list(self.quantizers.values())
        counts = [quantizer.experts or 1 for quantizer in quantizers]
        observed = torch.cat(
            [_rows(device, q.observed, n, -torch.inf) for q, n in zip(quantizers, counts, strict=True)]
        )
        if self._shards is not None:
            observed = self._shards.reduce_max(observed)
        # Observed is (-min, max), so that one maximum serves both.
        fresh = torch.stack([observed[:, 0].neg(), observed[:, 1]], dim=1)
        finite = torch.isfinite(fresh).all(dim=1, keepdim=True)
        old = torch.cat(
            [_rows(device, q.input_range, n, torch.nan) for q, n in zip(quantizers, counts, strict=True)]
        )
        old = torch.where(old.isnan() & finite, fresh, old)
        ranges = torch.where(finite, torch.lerp(fresh, old, self._momentum), old)
        known = None if not self.missing else ranges.isfinite().all(dim=1).split(counts)
        for number, (quantizer, own) in enumerate(zip(quantizers, ranges.split(counts), strict=True)):
            if known is None or bool(known[number].any()):
                quantizer.input_range = own if quantizer.experts else own[0]
                quantizer.is_complete = known is None or bool(known[number].all())
            quantizer.observed = None

    def state(self) -> dict[str, torch.Tensor]:
        """fp32 (min, max) on the CPU by name, of those that have a range; of experts [experts, 2], NaN where none."""
        return {
            name: quantizer.input_range.detach().cpu().clone()
            for name, quantizer in self.quantizers.items()
            if quantizer.input_range is not None
        }

    def load(self, ranges: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state` returned."""
        for name, quantizer in self.quantizers.items():
            saved = ranges.get(name)
            quantizer.input_range = None if saved is None else saved.to(torch.float32).clone()
            quantizer.is_complete = saved is not None and not bool(saved.isnan().any())
            quantizer.observed = None


def renamed_ranges(
    ranges: Mapping[str, torch.Tensor], renamed: Callable[[str], str | None]
) -> dict[str, torch.Tensor]:
    """Those of a model whose names change by `renamed`; None: the module is gone."""
    found = {renamed(name): kept for name, kept in ranges.items()}
    return {name: kept for name, kept in found.items() if name is not None}


def _rows(device: torch.device, given: torch.Tensor | None, count: int, otherwise: float) -> torch.Tensor:
    """[count, 2]"""
    if given is None:
        return torch.full((count, 2), otherwise, device=device)
    return given.to(device).view(count, 2)
