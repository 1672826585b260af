"""Something that happens before or after a call, for good: in processes that are about to die."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def before(target: Any, name: str, act: Callable[..., object]) -> None:
    """`act` is called with the arguments of `target.name` before every call."""
    original = getattr(target, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(target, name, call)


def after(target: Any, name: str, act: Callable[..., object]) -> None:
    """`act` is called with the arguments of `target.name` after every call."""
    original = getattr(target, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        act(*args, **kwargs)
        return result

    setattr(target, name, call)
