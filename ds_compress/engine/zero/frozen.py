"""Masks on weights that no optimizer steps: the frozen base of LoRA, or what was left out of `model_parameters`.

The optimizer's hooks never meet such a weight, and it does not change by itself: it is masked once for each new mask,
right after the step that brought it. Where masters are sharded over processes so are these fragments, so the selection
is the same code and a mask still lives on one owner; what the owner has cleared then goes to those who hold a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.engine.zero import internals
from ds_compress.sharding.fragment import Fragment
from ds_compress.techniques.base import Technique

logger = logging.getLogger("ds_compress")


class FrozenWeights:
    """The weights without a master that `techniques` mask.

    `apply` is a collective where masters are sharded: every process calls it after the same steps.
    """

    def __init__(self, techniques: Sequence[Technique], frozen: Sequence[Fragment]) -> None:
        masked = {name for technique in techniques for name in technique.masked_weights()}
        self._techniques = techniques
        self._fragments = [fragment for fragment in frozen if fragment.name in masked]
        if self._fragments:
            logger.info(
                "ds_compress: %d weights are masked that no optimizer steps, such as %s",
                len(self._fragments),
                self._fragments[0].name,
            )

    @torch.no_grad()
    def apply(self) -> None:
        if not self._fragments:
            return
        owned = [fragment for fragment in self._fragments if fragment.numel > 0]
        for technique in self._techniques:
            technique.on_update(owned)
        for fragment in self._fragments:
            _tell_the_other_copies(fragment)


def _tell_the_other_copies(fragment: Fragment) -> None:
    parameter: Any = fragment.parameter
    if internals.is_zero3_parameter(parameter):
        if internals.is_gathered(parameter):
            # A weight small enough to stay whole everywhere: made anew from the parts.
            parameter.partition([parameter])
            parameter.all_gather([parameter])
    elif fragment.group is not None:
        slice_numel = -(-parameter.numel() // dist.get_world_size(fragment.group))
        own = parameter.new_zeros(slice_numel)
        own[: fragment.numel] = fragment.values
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(fragment.group))]
        dist.all_gather(parts, own, group=fragment.group)
        parameter.data.view(-1).copy_(torch.cat(parts)[: parameter.numel()])
