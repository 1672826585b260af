"""The quantizers of a layer: plain attributes of the module, without parameters or buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.fake_quantized_rows import fake_quantized_rows
from ds_compress.quant.grid import ActivationGrid, TokenGranularity


@dataclass
class WeightQuantizer:
    """`fake_quant`: how the weight is quantized now; None: not (yet)."""

    fake_quant: FakeQuantConfig | None = None

    def describe(self) -> str:
        """Format and state for `print(model)`, e.g. "int4 per_column_group of 32, blend 25%" or "off"."""
        if self.fake_quant is None:
            return "off"
        blend = self.fake_quant.blend_ratio
        return self.fake_quant.grid.describe() + (f", blend {blend:.0%}" if blend else "")


@dataclass
class InputQuantizer:
    """How the input is quantized, and for a static grid what was observed of it.

    enabled: past its schedule offset. input_range: fp32 (min, max) of a static grid; None until there is a first
    range, and inputs are not quantized until then. observed: fp32 (-min, max) over the training forwards since the
    technique last read it; None when there were none. observes: whether to observe although the grid of the moment is
    not static. experts: how many have a range each, see `ExpertsInputQuantizer`; is_complete: whether all have one.
    """

    grid: ActivationGrid
    enabled: bool = False
    input_range: torch.Tensor | None = field(default=None, repr=False)
    observed: torch.Tensor | None = field(default=None, repr=False)
    observes: bool = False
    experts: int | None = None
    is_complete: bool = field(default=True, repr=False)

    @property
    def lacks_range(self) -> bool:
        """Whether what a static grid needs was not observed yet, of all experts or of one."""
        return self.input_range is None or not self.is_complete

    @property
    def is_active(self) -> bool:
        """Whether inputs are quantized now: past the offset, and with a range where the grid needs one."""
        return self.enabled and (not self.grid.static or self.input_range is not None)

    def describe(self) -> str:
        """Format and state for `print(model)`, e.g. "int8 per_token" or "int8 per_tensor static, off"."""
        if self.is_active:
            return self.grid.describe()
        return self.grid.describe() + (", no range yet" if self.enabled else ", off")

    def active(self, x: torch.Tensor, training: bool) -> tuple[ActivationGrid | None, torch.Tensor | None]:
        """The grid and range for this input; observes a static grid's input in training."""
        if not self.enabled:
            return None, None
        observes = (self.grid.static or self.observes) and training and x.numel()
        extremes = self._observe(x.detach()) if observes else None
        if not self.grid.static:
            return self.grid, None
        if self.input_range is None:
            return None, None
        if self.input_range.device != x.device:
            self.input_range = self.input_range.to(x.device)
        if extremes is None:
            return self.grid, self.input_range
        # An Inf would saturate unnoticed at the end of a fixed range: inf - inf makes the range NaN instead.
        return self.grid, self.input_range + (extremes - extremes)

    def keep_experts(self, kept: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Of the input of a stack of experts: see there."""

    def _observe(self, x: torch.Tensor) -> torch.Tensor:
        extremes = torch.stack([x.amin().neg(), x.amax()]).to(torch.float32)
        if self.observed is None or self.observed.device != x.device:
            self.observed = extremes
        else:
            self.observed = torch.maximum(self.observed, extremes)
        return extremes


@dataclass
class ExpertsInputQuantizer(InputQuantizer):
    """How the rows that experts multiply by one of their matrices are quantized; each expert has a range of its own.

    experts: how many. input_range: fp32 [experts, 2], (min, max) of each, NaN for an expert that has none yet: its rows
    are not quantized until it saw some. observed: fp32 [experts, 2], (-min, max), -inf for those without rows.
    """

    experts: int = field(default=1)

    def keep_experts(self, kept: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """kept: [experts, 2] -> rows of the experts that are left."""
        self.experts = len(kept(torch.empty(self.experts, 2)))
        self.input_range = None if self.input_range is None else kept(self.input_range)
        self.observed = None

    def quantize(self, x: torch.Tensor, expert: int | torch.Tensor, training: bool) -> torch.Tensor:
        """Q(x) with a straight-through gradient; observes in training where ranges are static.

        Args:
            x: [..., features], a row for each token of an expert.
            expert: of all rows, or int64 that broadcasts to x.shape[:-1], of each row. Rows of an expert beyond the
                last pass as they are.
        """
        grid = self.grid
        if not self.enabled or not x.numel():
            return x
        per_expert = grid.has_global_scale or grid.granularity is TokenGranularity.PER_TENSOR
        observes = training and (grid.static or self.observes)
        extremes = None
        if observes or (per_expert and not grid.static):
            extremes = extremes_by_expert(x.detach(), expert, self.experts)
        if observes and extremes is not None:
            self._observe_experts(extremes)
        if not per_expert:
            return fake_quantized_rows(x, grid)
        ranges = self._ranges(x, extremes)
        return x if ranges is None else fake_quantized_rows(x, grid, *_of_rows(ranges, expert, x))

    def _ranges(self, x: torch.Tensor, extremes: torch.Tensor | None) -> torch.Tensor | None:
        """fp32 [experts, 2]: NaN where rows pass as they are, Inf where a fault has to show; None: all pass."""
        if not self.grid.static:
            assert extremes is not None
            return _as_range(extremes)
        if self.input_range is None:
            return None
        if self.input_range.device != x.device:
            self.input_range = self.input_range.to(x.device)
        if extremes is None:
            return self.input_range
        # An Inf would saturate unnoticed at the end of a fixed range, and a NaN is one, too.
        is_fault = extremes.isnan() | extremes.isposinf()
        return torch.where(
            is_fault.any(1, keepdim=True) & self.input_range.isfinite(), torch.inf, self.input_range
        )

    def _observe_experts(self, extremes: torch.Tensor) -> None:
        if self.observed is None or self.observed.device != extremes.device:
            self.observed = extremes
        else:
            self.observed = torch.maximum(self.observed, extremes)


def extremes_by_expert(x: torch.Tensor, expert: int | torch.Tensor, experts: int) -> torch.Tensor:
    """fp32 [experts, 2]: (-min, max) of the rows of each; -inf for those without rows, or with zeros only."""
    rows = torch.stack([x.amin(-1).neg(), x.amax(-1)], dim=-1).to(torch.float32)
    found = rows.new_full((experts + 1, 2), -torch.inf)
    if isinstance(expert, int):
        found[expert] = rows.flatten(0, -2).amax(0)
    else:
        of = expert.clamp(0, experts).expand(rows.shape[:-1]).reshape(-1, 1).expand(-1, 2)
        found.scatter_reduce_(0, of, rows.flatten(0, -2), "amax")
    found = found[:experts]
    # Zeros say nothing about a range, and Llama 4 gives every expert a row for each token: zeros but for its own.
    return torch.where((found == 0).all(1, keepdim=True), -torch.inf, found)


def _as_range(extremes: torch.Tensor) -> torch.Tensor:
    """(min, max), with NaN for those without rows and Inf for those with a fault."""
    is_fault = (extremes.isnan() | extremes.isposinf()).any(1, keepdim=True)
    is_empty = extremes.isneginf().any(1, keepdim=True)
    found = torch.stack([extremes[:, 0].neg(), extremes[:, 1]], dim=1)
    return torch.where(is_fault, torch.inf, torch.where(is_empty, torch.nan, found))


def _of_rows(
    ranges: torch.Tensor, expert: int | torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(min, max) for each row of x, or of one expert (1,)."""
    if isinstance(expert, int):
        return ranges[expert, :1], ranges[expert, 1:]
    beyond = torch.cat([ranges, ranges.new_full((1, 2), torch.nan)])
    of = beyond[expert.clamp(0, len(ranges)).expand(x.shape[:-1])]
    return of[..., :1], of[..., 1:]
