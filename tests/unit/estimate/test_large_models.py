"""The table of large models in the docs is what `estimate` says."""

from __future__ import annotations

from tests.unit.estimate.large_models import PAGE, with_table


def test_the_table_is_current() -> None:
    assert with_table(PAGE.read_text()) == PAGE.read_text(), "run python -m tests.unit.estimate.large_models"
