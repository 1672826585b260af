"""Layers that run as one kernel: an activation behind a product, and products that share their input."""

from __future__ import annotations

from torch import nn


def fuse(model: nn.Module) -> None:
    """In place."""
