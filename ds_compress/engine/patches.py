"""Methods and module globals that we replace, and how they are given back.

Whoever replaces something puts it into a `Patches` and closes that when done. What somebody else has wrapped meanwhile
is not taken out from under them: ours stays inside of theirs and calls the original from then on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("ds_compress")


class Patches:
    """Replaced attributes of objects, classes and modules; closed in the reverse order."""

    def __init__(self) -> None:
        self._installed: list[_Patch] = []

    def install(self, target: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`target.name(...)` calls `function` until `close`; returns what it called before."""
        patch = _Patch(target, name, function)
        self._installed.append(patch)
        return patch.original

    def has(self, target: Any, name: str) -> bool:
        """Whether `target.name` is replaced by one of these."""
        return any(patch.target is target and patch.name == name for patch in self._installed)

    def close(self) -> None:
        """Gives everything back, the last one first; again: nothing."""
        while self._installed:
            self._installed.pop().undo()


class _Patch:
    def __init__(self, target: Any, name: str, function: Callable[..., Any]) -> None:
        self.target, self.name = target, name
        self.original: Callable[..., Any] = getattr(target, name)
        self._replaces_own = name in vars(target)
        self._before = vars(target).get(name)
        self._is_open = True

        @functools.wraps(self.original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return (function if self._is_open else self.original)(*args, **kwargs)

        self._patched = patched
        setattr(target, name, patched)

    def undo(self) -> None:
        self._is_open = False
        if vars(self.target).get(self.name) is not self._patched:
            where = getattr(self.target, "__name__", type(self.target).__name__)
            logger.debug("%s.%s was wrapped again; ours stays inside of it, without effect", where, self.name)
        elif self._replaces_own:
            setattr(self.target, self.name, self._before)
        else:
            delattr(self.target, self.name)


GLOBALS = Patches()
"""Constructors of DeepSpeed and globals of its modules, replaced once per process; `unregister` closes it."""
