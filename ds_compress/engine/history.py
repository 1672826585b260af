"""The numbers of a run over its applied steps, few enough to keep for ever: what `ds_compress report` draws.

Every `stride`-th step is kept. At more than `CAPACITY` points the stride doubles and every other point goes, so that a
long run has between 256 and 512 of them, evenly spaced. A number on a device stays there until the history is written:
keeping it waits for nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from ds_compress.engine.patches import Patches

logger = logging.getLogger("ds_compress")

CAPACITY = 512
"""Points."""
MOST_NAMES = 256
"""Numbers of one step; a run of thousands of workers or losses has more."""
Number = float | torch.Tensor


class History:
    """Points are by applied step; values are numbers, or tensors of one number.

    Attributes: stride: applied steps between two points. left_out: names beyond the first `MOST_NAMES`.
    """

    def __init__(self) -> None:
        self.stride = 1
        self.left_out: set[str] = set()
        self._names: set[str] = set()
        self._points: dict[int, dict[str, Number]] = {}

    def is_due(self, step: int) -> bool:
        """Whether the numbers of this step are kept."""
        return step % self.stride == 0

    def add(self, step: int, numbers: Mapping[str, Number]) -> None:
        """Keeps the numbers of a step. What a later step writes into a tensor does not change them."""
        self._points[step] = {name: _kept(value) for name, value in numbers.items() if self._has_room(name)}
        while len(self._points) > CAPACITY:
            self.stride *= 2
            self._points = {step: kept for step, kept in self._points.items() if self.is_due(step)}

    def _has_room(self, name: str) -> bool:
        if name in self._names:
            return True
        if len(self._names) < MOST_NAMES:
            self._names.add(name)
            return True
        self.left_out.add(name)
        return False

    def as_data(self, step: int | None = None, numbers: Mapping[str, Number] | None = None) -> dict[str, Any]:
        """JSON values: {"stride", "steps": [...], "numbers": {name: [...]}, "left_out"}; waits for the device.

        step, numbers: a last point, which is not kept. A list has None for steps that lack the number. NaN and Inf,
        which JSON does not have, are strings.
        """
        _settle(self._points.values())
        points = dict(self._points)
        if step is not None and numbers is not None and step not in points:
            points[step] = {
                name: float(value) for name, value in numbers.items() if name not in self.left_out
            }
        steps = sorted(points)
        names = dict.fromkeys(name for step in steps for name in points[step])
        columns = {name: [_json(points[step].get(name)) for step in steps] for name in names}
        return {"stride": self.stride, "steps": steps, "numbers": columns, "left_out": len(self.left_out)}

    def load(self, data: Mapping[str, Any]) -> None:
        """Goes on after what `as_data` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        steps, columns = [int(step) for step in data["steps"]], data["numbers"]
        points: dict[int, dict[str, Number]] = {step: {} for step in steps}
        for name, values in columns.items():
            for step, value in zip(steps, values, strict=True):
                if value is not None:
                    points[step][str(name)] = float(value)
        self.stride, self._names, self.left_out = max(1, int(data["stride"])), set(map(str, columns)), set()
        # A point between two strides was the last one of the run that saved it.
        self._points = {step: kept for step, kept in points.items() if self.is_due(step)}

    def clear(self) -> None:
        """As when the run began."""
        self.stride, self.left_out, self._names, self._points = 1, set(), set(), {}


class LastLoss:
    """The loss that `engine.backward` was given last, in this process: of one micro-batch, before any scaling.

    None before the first, and where a script calls `loss.backward()` itself.
    """

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def watch(self, engine: Any, patches: Patches) -> None:
        """Looks at what `engine.backward` gets; a reference, no copy."""

        def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(loss, torch.Tensor) and loss.numel() == 1:
                self.value = loss.detach()
            return original(loss, *args, **kwargs)

        original = patches.install(engine, "backward", backward)


def _kept(value: Number) -> Number:
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.device.type == "cpu":
        return float(value)
    return value.detach().clone()


def _settle(points: Any) -> None:
    """Tensors become numbers, those of one device by one read."""
    by_device: dict[torch.device, list[tuple[dict[str, Number], str, torch.Tensor]]] = {}
    for point in points:
        for name, value in point.items():
            if isinstance(value, torch.Tensor):
                by_device.setdefault(value.device, []).append((point, name, value))
    for found in by_device.values():
        numbers = torch.stack([value.float().reshape(()) for _, _, value in found]).tolist()
        for (point, name, _), number in zip(found, numbers, strict=True):
            point[name] = number


def _json(value: Any) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return str(float(value))
