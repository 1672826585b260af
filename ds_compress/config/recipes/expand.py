"""What a block with the key `recipe` means, and whose value it is that an error complains of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_compress.config.recipes.catalog import KEY, Recipe, find
from ds_compress.config.recipes.merge import holds, leaves, merged
from ds_compress.errors import ROOT, ConfigError, Problem, listed

_MOST_PATHS_TOLD = 4


@dataclass(frozen=True)
class Applied:
    """A recipe and what the JSON says beside it. is_pinned: whether the JSON names the version."""

    recipe: Recipe
    own: Mapping[str, Any]
    is_pinned: bool = False

    @property
    def block(self) -> dict[str, Any]:
        """The two merged; without the key `recipe`."""
        result: dict[str, Any] = merged(self.recipe.block, self.own)
        return result

    def describe(self) -> str:
        """`w4a16@1; weight_quantization.shared_parameters.schedule_offset of the JSON`."""
        paths = list(leaves(self.own)) if self.own else []
        more = f" and {len(paths) - _MOST_PATHS_TOLD} more" if len(paths) > _MOST_PATHS_TOLD else ""
        own = f"; {', '.join(paths[:_MOST_PATHS_TOLD])}{more} of the JSON" if paths else ""
        return f"{self.recipe.label}{own}"

    def told(self, problems: Iterable[Problem]) -> list[Problem]:
        """The problems, each with a word on whose value it is about."""
        return [self._told(problem) for problem in problems]

    def _told(self, problem: Problem) -> Problem:
        if not problem.path.startswith(ROOT) or self.recipe.label in problem.hint:
            return problem
        path = problem.path.removeprefix(ROOT).removeprefix(".")
        if path and holds(self.recipe.block, path) and not holds(self.own, path):
            note = (
                f'the value comes from the recipe "{self.recipe.label}": write the key beside "{KEY}" to replace '
                "it, or with null to remove it"
            )
        elif problem.got.startswith("the unknown key"):
            return problem
        else:
            note = (
                f'merged over the recipe "{self.recipe.label}", which sets {listed(self.recipe.block, "and")}'
            )
        return replace(problem, hint=f"{problem.hint}; {note}" if problem.hint else note)


def applied(block: Mapping[str, Any]) -> Applied | None:
    """The recipe of a block, None where it names none.

    Raises:
        ConfigError: it names one that does not exist.
    """
    if block.get(KEY) is None:
        return None
    own = {key: value for key, value in block.items() if key != KEY}
    return Applied(find(block[KEY]), own, "@" in block[KEY])


def expanded(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block with its recipe written out; without one, as it is.

    Raises:
        ConfigError: it names one that does not exist.
    """
    found = applied(block)
    return block if found is None else found.block


@contextlib.contextmanager
def telling(found: Applied | None) -> Iterator[None]:
    """In this block of code, a ConfigError says which values come from the recipe."""
    try:
        yield
    except ConfigError as error:
        if found is None:
            raise
        raise ConfigError(found.told(error.problems)) from None


def recipe(name: str, **overrides: Any) -> dict[str, Any]:
    """The value of `compression_training` that a recipe is, as a dict of your own.

    Args:
        name: `"w4a16"`, the last version, or `"w4a16@1"`. `docs/recipes.md` and `ds_compress init --list` have all.
        **overrides: keys of the block, merged over it: objects merge, any other value replaces, None removes a key.

    Returns:
        The block, written out; it names no recipe.

    Raises:
        ConfigError: there is no such recipe, or what the overrides make of it is no valid block.
    """
    from ds_compress.config.schema.compression_training import parse_config

    found = Applied(find(name), overrides)
    parse_config({KEY: found.recipe.label, **overrides})
    return found.block
