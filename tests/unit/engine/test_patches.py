"""What is replaced is given back: once, in the reverse order, and never from under somebody else."""

from __future__ import annotations

import types
from typing import Any

import pytest

from ds_compress.engine.patches import Patches


class Engine:
    def step(self) -> str:
        return "original"


def ours(patches: Patches, target: Any, name: str, word: str) -> None:
    def function(*args: Any) -> str:
        return f"{word}({original(*args)})"

    original = patches.install(target, name, function)


def test_the_last_one_is_outermost_and_goes_first() -> None:
    engine, first, second = Engine(), Patches(), Patches()
    ours(first, engine, "step", "first")
    ours(second, engine, "step", "second")
    assert engine.step() == "second(first(original))"
    second.close()
    assert engine.step() == "first(original)"
    first.close()
    assert engine.step() == "original" and "step" not in vars(engine)


def test_several_of_one_object_are_closed_in_reverse() -> None:
    engine, patches = Engine(), Patches()
    for word in ("a", "b", "c"):
        ours(patches, engine, "step", word)
    assert engine.step() == "c(b(a(original)))" and patches.has(engine, "step")
    patches.close()
    patches.close()
    assert vars(engine) == {} and not patches.has(engine, "step")


@pytest.mark.parametrize("target", [Engine, types.SimpleNamespace(step=lambda *_: "original")])
def test_attributes_of_classes_and_modules_get_their_own_value_back(target: Any) -> None:
    before, patches = vars(target)["step"], Patches()
    ours(patches, target, "step", "ours")
    call = target().step if isinstance(target, type) else target.step
    assert call() == "ours(original)"
    patches.close()
    assert vars(target)["step"] is before


def test_who_wrapped_over_it_keeps_what_he_has() -> None:
    """As a profiler would: taking ours out would take his away, so ours only stops to do anything."""
    engine, patches = Engine(), Patches()
    ours(patches, engine, "step", "ours")
    inner = engine.step
    engine.step = lambda: f"theirs({inner()})"  # type: ignore[method-assign]
    assert engine.step() == "theirs(ours(original))"
    patches.close()
    assert engine.step() == "theirs(original)"


def test_closing_in_the_wrong_order_leaves_the_outer_one() -> None:
    engine, first, second = Engine(), Patches(), Patches()
    ours(first, engine, "step", "first")
    ours(second, engine, "step", "second")
    first.close()
    assert engine.step() == "second(original)"
    second.close()
    assert engine.step() == "original"
