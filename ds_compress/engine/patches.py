"""Methods of one object replaced, and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Patches:
    """Attributes put on an object in front of its class's methods."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._names: list[str] = []

    def put(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what was there."""
        original: Callable[..., Any] = getattr(self._target, name)
        setattr(self._target, name, function)
        self._names.append(name)
        return original

    def undo(self) -> None:
        for name in self._names:
            vars(self._target).pop(name, None)
