"""`python -m ds_compress.config.recipes FOLDER`: writes the configs that are made from the recipes, or checks them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ds_compress.config.recipes.catalog import newest
from ds_compress.config.recipes.deepspeed import json_text, whole_config
from ds_compress.files import atomic_write

ZERO_STAGES = (2, 3)


def files() -> Iterator[tuple[str, str]]:
    """(name, content) of every file."""
    for name, recipe in newest().items():
        for stage in ZERO_STAGES:
            yield f"{name}_zero{stage}.json", json_text(whole_config(recipe, stage))


def main(arguments: Sequence[str]) -> int:
    """Writes FOLDER, usually `ds_configs/recipes`; with --check says what is stale instead (exit status 1)."""
    check = "--check" in arguments
    folders = [argument for argument in arguments if argument != "--check"]
    if len(folders) != 1 or folders[0].startswith("-"):
        print("usage: python -m ds_compress.config.recipes [--check] FOLDER", file=sys.stderr)
        return 2
    folder, wanted = Path(folders[0]), dict(files())
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    stale = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
    if check:
        for name in stale:
            print(
                f"{folder / name} is stale: run python -m ds_compress.config.recipes {folder}",
                file=sys.stderr,
            )
        return 1 if stale else 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in stale:
        if name in wanted:
            atomic_write(folder / name, wanted[name])
        else:
            (folder / name).unlink()
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
