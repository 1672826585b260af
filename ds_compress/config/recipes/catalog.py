"""The recipes that the package ships, by name and version."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_compress.errors import ConfigError, Problem, dotted, listed, nearest, shown

KEY = "recipe"
FOLDER = Path(__file__).parent
STEPS = 1000
"""Optimizer steps of the run that the schedules of all recipes are written for; see `schedule.scaled`."""


@dataclass(frozen=True)
class Recipe:
    """One version of one recipe.

    use: when to take it. does: what happens to the model. needs: of the model; empty: nothing. models: the kinds of
    models it is for, "encoder", "decoder" (one that generates) and "mixture" (of experts). processes: the fewest.
    loads_in: who reads the result. deepspeed: what it wants of the DeepSpeed config around the block, merged over
    `deepspeed.base`. block: the value of `compression_training`.
    """

    name: str
    version: int
    use: str
    does: str
    needs: str
    models: tuple[str, ...]
    processes: int
    loads_in: str
    deepspeed: Mapping[str, Any]
    block: Mapping[str, Any]

    @property
    def label(self) -> str:
        """`w4a16@1`: what the JSON says to mean this version and no other."""
        return f"{self.name}@{self.version}"


def newest() -> dict[str, Recipe]:
    """The last version of every recipe, by name, in alphabetical order."""
    return {name: by_version[max(by_version)] for name, by_version in sorted(_catalog().items())}


def find(label: Any) -> Recipe:
    """The recipe that `"recipe": label` means: its last version, unless the label has one.

    Raises:
        ConfigError: there is no such recipe, or no such version of it; names those that there are.
    """
    known = _catalog()
    if not isinstance(label, str):
        raise _refused(label, "the name of a recipe", 'e.g. "w4a16", or "w4a16@1"')
    name, _, version = label.strip().partition("@")
    if name not in known:
        close = nearest(name, known)
        hint = f'did you mean "{close}"?' if close else "ds_compress init --list says what each is for"
        raise _refused(label, f"one of {listed(sorted(known))}", hint)
    versions = known[name]
    if "@" not in label:
        return versions[max(versions)]
    if not (version.isascii() and version.isdigit()) or int(version) not in versions:
        labels = [versions[number].label for number in sorted(versions)]
        newer = " (a newer one needs a newer ds_compress)" if version.isdigit() else ""
        raise _refused(label, listed(labels), f'"{name}" means the last version of this package{newer}')
    return versions[int(version)]


def _refused(label: Any, allowed: str, hint: str) -> ConfigError:
    return ConfigError([Problem(dotted(KEY), shown(label), allowed, hint)])


@functools.cache
def _catalog() -> dict[str, dict[int, Recipe]]:
    found: dict[str, dict[int, Recipe]] = {}
    for path in sorted(FOLDER.glob("*@*.json")):
        name, _, version = path.stem.partition("@")
        written = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(name, {})[int(version)] = Recipe(
            name,
            int(version),
            written["use"],
            written["does"],
            written["needs"],
            tuple(written["models"]),
            written["processes"],
            written["loads_in"],
            written["deepspeed"],
            written["compression_training"],
        )
    return found
