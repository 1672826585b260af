"""`measure_link`: whether quantizing pays between these processes is decided once for a run, and stays.

Timings vary, and the two ways do not give the same bits. So the verdict is state of the run: checkpoints hold it, a
resumed run takes it from there, and a model that shrinks goes on with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from ds_compress.reduce.bandwidth import Comparison

logger = logging.getLogger("ds_compress")

_INSIST = "measure_link: false insists"


class LinkVerdict:
    """The verdict of one block; `block` is its name in the JSON, `measures` its `measure_link`."""

    def __init__(self, block: str, measures: bool) -> None:
        self._block, self._measures = block, measures
        self._found: Comparison | None = None

    @property
    def is_worthwhile(self) -> bool:
        """Whether to quantize; true while nothing was measured."""
        return self._found is None or self._found.is_worthwhile

    def take(self, measure: Callable[[], Comparison], group: Any) -> None:
        """Measures, unless it is known already; a collective over `group`."""
        if not self._measures or self._found is not None or dist.get_world_size(group) == 1:
            return
        self._found = measure()
        self._tell(group, "is", "")

    def follow(self, other: LinkVerdict) -> None:
        """The same run goes on: what `other` has found counts."""
        self._found = other._found

    def state(self) -> dict[str, Any] | None:
        """Plain values, the same in every process; None: nothing was measured."""
        return None if self._found is None else self._found.state()

    def restore(self, state: Mapping[str, Any] | None, group: Any) -> None:
        """What a checkpoint says counts, whatever was measured here; nothing where the JSON does not measure."""
        if state is None or not self._measures or dist.get_world_size(group) == 1:
            return
        restored = Comparison.restored(state)
        if restored == self._found:
            return
        self._found = restored
        self._tell(group, "stays", ", as this run found when it began")

    def _tell(self, group: Any, verb: str, whence: str) -> None:
        state = "on" if self.is_worthwhile else f"off on this link ({_INSIST})"
        log_once(group, f"{self._block} {verb} {state}{whence}: {self._found}")


def log_once(group: Any, text: str, level: int = logging.INFO) -> None:
    """A line from the first process of the group."""
    if dist.get_rank(group) == 0:
        logger.log(level, "ds_compress: %s", text)
