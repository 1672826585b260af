from __future__ import annotations

import dataclasses

import pytest

from ds_compress.engine import seams


def test_the_installed_deepspeed_has_every_seam() -> None:
    assert seams.missing_seams() == []


@pytest.mark.parametrize(
    "broken",
    [
        seams.Seam("deepspeed.runtime.engine:DeepSpeedEngine._no_such_method"),
        seams.Seam("deepspeed.runtime.no_such_module:anything"),
        seams.Seam("deepspeed.runtime.engine:DeepSpeedEngine.backward", ("self", "no_such_argument")),
        seams.Seam("deepspeed.runtime.engine:DeepSpeedEngine.step", source_mentions=("no such line",)),
    ],
)
def test_a_changed_seam_is_named(monkeypatch: pytest.MonkeyPatch, broken: seams.Seam) -> None:
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS, broken))
    (problem,) = seams.missing_seams()
    assert problem.startswith(broken.path)


def test_only_the_engine_package_imports_deepspeed_internals() -> None:
    from pathlib import Path

    package = Path(seams.__file__).parents[1]
    offenders = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "deepspeed.runtime" in path.read_text() and path.parent.name != "engine"
    ]
    assert offenders == []
    assert dataclasses.is_dataclass(seams.Seam)
