"""Error feedback: the quantization error of each gradient element in the last payload, added to its next gradient.

Seide et al. 2014 (1-bit SGD), Karimireddy et al. 2019 (EF-SGD). A sender's residuals are as large as its gradients; in
fp32 they would undo what ZeRO saves, so they are stored in 8 bits (blocks of 512 with a scale) or in bfloat16.

They belong to elements of a parameter, [start, start + n), whatever bucket these were sent in: when buckets change,
stored runs are split and joined. Nothing here is a collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_compress.reduce.codec import BlockCodec

_LARGEST_BLOCK, _SMALLEST_BLOCK = 512, 32


@dataclass(frozen=True)
class _Run:
    """Stored residuals of `numel` elements; they are multiplied by `loss_scale`."""

    numel: int
    stored: torch.Tensor
    loss_scale: float


class Residuals:
    """Residuals by parameter and element.

    Every change since the last `commit` can be undone by `rollback`: what a skipped step sent never reached the
    weights, so its residuals must not replace those of the step before.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._runs: dict[str, dict[int, _Run]] = {}
        self._before: dict[str, dict[int, _Run]] = {}

    def load(
        self, key: str, start: int, numel: int, device: torch.device, loss_scale: float = 1.0
    ) -> torch.Tensor:
        """fp32 (numel,) on `device`, zero where nothing is stored, multiplied by the `loss_scale` of now."""
        runs = self._runs.get(key, {})
        exact = runs.get(start)
        if exact is not None and exact.numel == numel:
            return self._decoded(exact, loss_scale)
        found = torch.zeros(numel, device=device)
        for first, run in runs.items():
            low, high = max(start, first), min(start + numel, first + run.numel)
            if low < high:
                found[low - start : high - start] = self._decoded(run, loss_scale)[low - first : high - first]
        return found

    def covers(self, key: str, start: int, numel: int) -> bool:
        """Whether something was stored for every one of these elements."""
        at = start
        for first, run in sorted(self._runs.get(key, {}).items()):
            if first <= at < first + run.numel:
                at = first + run.numel
        return at >= start + numel

    def store(self, key: str, start: int, values: torch.Tensor, loss_scale: float = 1.0) -> None:
        """Replaces the residuals of elements [start, start + n) of `key` by `values` fp32 (n,)."""
        runs = self._runs.setdefault(key, {})
        # Runs are immutable, so a shallow copy is enough for a rollback.
        self._before.setdefault(key, dict(runs))
        end = start + values.numel()
        for first, run in list(runs.items()):
            last = first + run.numel
            if first < end and start < last and (first, last) != (start, end):
                del runs[first]
                rest = self._decoded(run, run.loss_scale)
                if first < start:
                    runs[first] = self._encoded(rest[: start - first], run.loss_scale)
                if end < last:
                    runs[end] = self._encoded(rest[end - first :], run.loss_scale)
        runs[start] = self._encoded(values, loss_scale)

    def commit(self) -> None:
        """The step of these residuals was applied."""
        self._before.clear()

    def rollback(self) -> None:
        """The step was skipped: as if nothing had been stored since the last `commit`."""
        self._runs.update(self._before)
        self._before.clear()

    def clear(self) -> None:
        self._runs.clear()
        self._before.clear()

    @property
    def nbytes(self) -> int:
        """Bytes stored between steps."""
        return sum(run.stored.nbytes for runs in self._runs.values() for run in runs.values())

    def state(self) -> Iterator[tuple[Mapping[str, Any], torch.Tensor]]:
        """(description, stored tensor) of every run, for a checkpoint."""
        for key, runs in self._runs.items():
            for start, run in runs.items():
                yield {"key": key, "start": start, "numel": run.numel, "unit": run.loss_scale}, run.stored

    def restore(self, run: Mapping[str, Any], stored: torch.Tensor) -> None:
        """Puts back one run of `state`, which must have been stored in as many bits."""
        self._runs.setdefault(run["key"], {})[run["start"]] = _Run(run["numel"], stored, run["unit"])

    def mean_of(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
        """Runs with the mean over several processes, zero where one has stored nothing.

        states: of each process, {"run": description, "stored": a function that reads the tensor}. Returns the same with
        tensors. One parameter of every process is in memory at a time.
        """
        by_key: dict[str, list[list[Mapping[str, Any]]]] = {}
        for number, state in enumerate(states):
            for item in state:
                own = by_key.setdefault(item["run"]["key"], [[] for _ in states])
                own[number].append(item)
        for key, items in by_key.items():
            theirs = [Residuals(self.bits) for _ in states]
            for residuals, own_items in zip(theirs, items, strict=True):
                for item in own_items:
                    residuals.restore(item["run"], item["stored"]())
            for start, end in _covered(item["run"] for own_items in items for item in own_items):
                mean = torch.zeros(end - start)
                for residuals in theirs:
                    mean += residuals.load(key, start, end - start, mean.device) / len(states)
                run = {"key": key, "start": start, "numel": end - start, "unit": 1.0}
                yield {"run": run, "stored": self._encoded(mean, 1.0).stored}

    def _encoded(self, values: torch.Tensor, loss_scale: float) -> _Run:
        if self.bits == 16:
            return _Run(values.numel(), values.to(torch.bfloat16, copy=True), loss_scale)
        codec = _codec(values.numel())
        stored = torch.empty(codec.payload_bytes(values.numel()), dtype=torch.uint8, device=values.device)
        codec.encode(values.contiguous(), stored)
        return _Run(values.numel(), stored, loss_scale)

    def _decoded(self, run: _Run, loss_scale: float) -> torch.Tensor:
        if self.bits == 16:
            values = run.stored.float()
        else:
            values = torch.empty(run.numel, device=run.stored.device)
            _codec(run.numel).decode(run.stored, values)
        return values if loss_scale == run.loss_scale else values.mul_(loss_scale / run.loss_scale)


def _covered(runs: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """[start, end) of all elements that one of the runs has, joined where they touch."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted((run["start"], run["start"] + run["numel"]) for run in runs):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _codec(numel: int) -> BlockCodec:
    """Blocks that are not much longer than their content: most parameters are biases and norms."""
    return BlockCodec(8, min(_LARGEST_BLOCK, -(-numel // _SMALLEST_BLOCK) * _SMALLEST_BLOCK))
