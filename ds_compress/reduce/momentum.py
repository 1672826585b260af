"""Worker momentum: each worker sends the running mean of its gradients in place of the gradient.

Karimireddy et al. 2021 ("Learning from history for Byzantine robust optimization"): the spread of honest workers is
what an attack hides in, and momenta have sqrt((1 - beta) / (1 + beta)) of the spread of gradients. It stands for the
optimizer's own momentum.

    m = g at first, then beta * m + (1 - beta) * g

A worker keeps as much as its gradients, in bfloat16. Where each of k micro-steps of a step is reduced (stages 2 and 3),
each has beta^(1/k): beta is what is left of a gradient after one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.slices import Segment


class WorkerMomentum:
    """The running means of this worker; `kept` can be undone and saved like what error feedback keeps."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.kept = Residuals(bits=16)

    @torch.no_grad()
    def apply(self, segments: Sequence[Segment], unit: float, per_step: int = 1) -> None:
        """Replaces each segment's values by its running mean.

        A segment with NaN or Inf stays what it is, to be noticed, and leaves its running mean alone.

        Args:
            unit: the loss scale that the values are multiplied by.
            per_step: how many gradients of a parameter are reduced in one step.
        """
        beta = self.beta ** (1 / per_step)
        for segment in segments:
            gradient = segment.values.float()
            place = (segment.key, segment.start, segment.numel)
            if self.kept.covers(*place):
                before = self.kept.load(*place, gradient.device, unit)
                mean = before * beta + gradient * (1 - beta)
            else:
                before, mean = torch.zeros_like(gradient), gradient
            finite = torch.isfinite(gradient).all()
            self.kept.store(segment.key, segment.start, torch.where(finite, mean, before), unit)
            segment.values.copy_(torch.where(finite, mean, gradient))
