"""When a mask is computed and how dense it is then. Steps are applied optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DensitySchedule:
    """Density from 1 to a target over [begin, end], recomputed every `stride` steps.

    `shape` is constant (the target at once), linear, or cubic (Zhu & Gupta 2017, "To prune, or not to prune",
    equation 1: most weights go early, when the network recovers easily). Without `end` a changing
    mask is recomputed for ever and a constant one exactly once.
    """

    shape: str
    begin: int
    end: int | None
    stride: int

    def density(self, step: int, target: float) -> float:
        """Fraction of weights kept at `step`, in (0, 1]."""
        if step < self.begin:
            return 1.0
        if self.shape == "constant" or self.end is None or step >= self.end:
            return target
        remaining = 1.0 - (step - self.begin) / (self.end - self.begin)
        exponent = {"linear": 1, "cubic": 3}[self.shape]
        return target + (1.0 - target) * remaining**exponent

    def is_due(self, step: int, mask_may_change: bool) -> bool:
        """Whether the mask that will be active at `step` has to be computed.

        mask_may_change: True for methods whose mask changes even at a constant density (learned or movement scores,
        regrowth).
        """
        if step < self.begin or (self.end is not None and step > self.end):
            return False
        if step in (self.begin, self.end):
            return True
        if self.shape == "constant" and not mask_may_change:
            return False
        return (step - self.begin) % self.stride == 0

    def is_over(self, step: int, mask_may_change: bool) -> bool:
        """True when no mask will be computed after `step`."""
        if self.end is not None:
            return step >= self.end
        return self.shape == "constant" and not mask_may_change and step >= self.begin
