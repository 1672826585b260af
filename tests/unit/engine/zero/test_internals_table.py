from __future__ import annotations

import dataclasses

import pytest

from ds_compress.engine.zero import internals_table


def test_the_installed_deepspeed_has_every_seam() -> None:
    assert internals_table.missing_internals() == []


@pytest.mark.parametrize(
    "broken",
    [
        internals_table.Internal("deepspeed.runtime.engine:DeepSpeedEngine._no_such_method"),
        internals_table.Internal("deepspeed.runtime.no_such_module:anything"),
        internals_table.Internal(
            "deepspeed.runtime.engine:DeepSpeedEngine.backward", ("self", "no_such_argument")
        ),
        internals_table.Internal(
            "deepspeed.runtime.engine:DeepSpeedEngine.step", source_mentions=("no such line",)
        ),
    ],
)
def test_a_changed_internal_is_named(
    monkeypatch: pytest.MonkeyPatch, broken: internals_table.Internal
) -> None:
    monkeypatch.setattr(internals_table, "INTERNALS", (*internals_table.INTERNALS, broken))
    (problem,) = internals_table.missing_internals()
    assert problem.startswith(broken.path)


def test_only_the_engine_package_imports_deepspeed_internals() -> None:
    from pathlib import Path

    package = Path(internals_table.__file__).parents[2]
    offenders = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "deepspeed.runtime" in path.read_text() and path.relative_to(package).parts[0] != "engine"
    ]
    assert offenders == []
    assert dataclasses.is_dataclass(internals_table.Internal)
