"""Worker momentum: each worker sends the running mean of its gradients in place of the gradient.

Karimireddy et al. 2021 ("Learning from history for Byzantine robust optimization"): an attack hides in the variance of
honest workers, and momenta have sqrt((1 - beta) / (1 + beta)) of the standard deviation of gradients. It replaces the
optimizer's own momentum.

    m = g at first, then beta * m + (1 - beta) * g

A worker stores as many elements as its gradients have, in bfloat16. Where each of the k micro-steps of a step is
reduced (stages 2 and 3), each uses beta^(1/k): beta is the weight of a gradient after one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.slices import Segment


class WorkerMomentum:
    """The running means of this worker; `kept` is rolled back and saved like the residuals of error feedback."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.kept = Residuals(bits=16)

    @torch.no_grad()
    def apply(self, segments: Sequence[Segment], loss_scale: float, per_step: int = 1) -> None:
        """Replaces each segment's values by its running mean.

        A segment with NaN or Inf stays as it is, so that the overflow is detected; its running mean does not change.

        Args:
            loss_scale: what the values are multiplied by.
            per_step: how many gradients of a parameter are reduced in one step.
        """
        beta = self.beta ** (1 / per_step)
        for segment in segments:
            gradient = segment.values.float()
            run = (segment.key, segment.start, segment.numel)
            if self.kept.covers(*run):
                before = self.kept.load(*run, gradient.device, loss_scale)
                mean = before * beta + gradient * (1 - beta)
            else:
                before, mean = torch.zeros_like(gradient), gradient
            finite = torch.isfinite(gradient).all()
            self.kept.store(segment.key, segment.start, torch.where(finite, mean, before), loss_scale)
            segment.values.copy_(torch.where(finite, mean, gradient))
