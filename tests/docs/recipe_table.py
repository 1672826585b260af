"""The table of recipes in `docs/recipes.md`, written from the recipes of the package.

    python -m tests.docs.recipe_table     # rewrites it if it is not current

The page marks its place with `<!-- recipes -->` and `<!-- end of recipes -->`.
"""

from __future__ import annotations

import re

from ds_compress.config.recipes import Recipe, newest
from tests.docs.pages import DOCS

PAGE = DOCS / "recipes.md"
_TABLE = re.compile(r"(<!-- recipes -->\n).*?(<!-- end of recipes -->)", re.DOTALL)


def current(text: str) -> str:
    """`text` of the page, its table replaced by a current one."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{table()}\n{found[2]}", text)


def table() -> str:
    """In a `div`, which a style sheet shows row below row on a phone."""
    rows = "\n".join(map(_row, newest().values()))
    head = "| recipe | use | what it does | loads in |\n|---|---|---|---|"
    return f'<div class="keys" markdown>\n\n{head}\n{rows}\n\n</div>\n'


def _row(recipe: Recipe) -> str:
    files = ", ".join(
        f"[ZeRO-{stage}](../ds_configs/recipes/{recipe.name}_zero{stage}.json)" for stage in (2, 3)
    )
    needs = f" Needs {recipe.needs}." if recipe.needs else ""
    does = recipe.does[0].upper() + recipe.does[1:]
    return f"| `{recipe.label}` {files} | {recipe.use} | {does}{needs} | {recipe.loads_in} |"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if current(text) != text:
        PAGE.write_text(current(text), encoding="utf-8")
        print(PAGE)


if __name__ == "__main__":
    main()
