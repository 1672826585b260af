"""The quantizers of a layer: plain attributes of the module, without parameters or buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.grid import ActivationGrid


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
    not static.
    """

    grid: ActivationGrid
    enabled: bool = False
    input_range: torch.Tensor | None = field(default=None, repr=False)
    observed: torch.Tensor | None = field(default=None, repr=False)
    observes: bool = False

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

    def _observe(self, x: torch.Tensor) -> torch.Tensor:
        extremes = torch.stack([x.amin().neg(), x.amax()]).to(torch.float32)
        if self.observed is None or self.observed.device != x.device:
            self.observed = extremes
        else:
            self.observed = torch.maximum(self.observed, extremes)
        return extremes
