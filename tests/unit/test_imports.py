"""Actions run when a module is imported, before or after they were asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from ds_compress.imports import when_imported


def test_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waited_for.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[tuple[str, int]] = []

    def action(module: ModuleType) -> None:
        seen.append((module.__name__, module.value))

    when_imported("waited_for", action)
    assert seen == []
    import waited_for  # type: ignore[import-not-found]

    assert seen == [("waited_for", 3)]
    when_imported("waited_for", action)
    assert len(seen) == 2
    assert waited_for.value == 3
    sys.modules.pop("waited_for")


def test_a_module_that_is_not_there_stays_an_import_error() -> None:
    when_imported("not_there_at_all", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        import not_there_at_all  # type: ignore[import-not-found]  # noqa: F401
