"""The page of recipes lists them as the package has them."""

from __future__ import annotations

from ds_compress.config.recipes import newest
from tests.docs.recipe_table import PAGE, current


def test_the_table_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert current(text) == text, "run python -m tests.docs.recipe_table"
    assert all(f"| `{recipe.label}` " in text for recipe in newest().values())
