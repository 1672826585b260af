"""What a teacher is to those who learn from it; where its weights are is `engine.teachers`' business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ds_compress.sharding.shards import Shards


class Teacher(Protocol):
    """A frozen model, or what stands for one.

    model: the teacher as a module; None where only its predictions are at hand.
    """

    model: nn.Module | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its output for the student's inputs, without a graph; a collective where it is sharded."""

    def place(self, student: nn.Module, shards: Shards) -> None:
        """The student's engine exists, and its masters are at `shards`."""

    def identity(self) -> str | None:
        """What tells it from other teachers, the same in every process; a collective.

        None: it is part of the run, and its weights are the student's or are in checkpoints.
        """

    def follow(self, student: nn.Module) -> None:
        """The student took a step."""

    def fragment_state(self, shards: Shards) -> dict[str, dict[str, torch.Tensor]]:
        """What of its weights only this run knows, as `Technique.fragment_state`."""

    def load_fragment_state(self, shards: Shards, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restores what `fragment_state` returned."""
