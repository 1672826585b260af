"""Patterns of `sparse_pruning`: which weights become zero together, as text of the JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from ds_compress.config.schema.fields import Conflict, Description

UNSTRUCTURED = "unstructured"
_PATTERN = re.compile(r"(?:([1-9][0-9]{0,3})(x|:)([1-9][0-9]{0,3}))")


class Pattern(NamedTuple):
    """A parsed pattern: blocks of `rows` x `columns` that live or die whole, or `rows` kept of `columns`."""

    kind: Literal["unstructured", "blocks", "n_of_m"]
    rows: int = 1
    columns: int = 1

    @property
    def density(self) -> float | None:
        """The share of weights that an N:M pattern keeps; None when the pattern leaves it open."""
        return self.rows / self.columns if self.kind == "n_of_m" else None


def parse_pattern(text: str) -> Pattern:
    """Reads "unstructured", "NxM" or "N:M" (N <= M); raises ValueError otherwise."""
    if text == UNSTRUCTURED:
        return Pattern("unstructured")
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise ValueError(f"not a pattern: {text!r}")
    rows, columns = int(found[1]), int(found[3])
    if found[2] == "x":
        return Pattern("blocks", rows, columns)
    if rows > columns:
        raise ValueError(f"{text!r} keeps more weights than there are")
    return Pattern("n_of_m", rows, columns)


def _pattern(text: str) -> str:
    try:
        parse_pattern(text)
    except ValueError:
        raise PydanticCustomError("pattern", "a pattern") from None
    return text


PatternText = Annotated[
    str,
    AfterValidator(_pattern),
    Description(
        '"unstructured", blocks "NxM" such as "4x1", or "N:M" such as "2:4" (N kept of each M, N <= M)'
    ),
]


def density_conflict(where: tuple[str, ...], ratio: float | None, pattern: str) -> Iterator[Conflict]:
    """An N:M pattern leaves no choice of density: any ratio but N/M is a conflict."""
    density = parse_pattern(pattern).density
    if density is not None and ratio is not None and not math.isclose(ratio, density, rel_tol=1e-6):
        yield Conflict(
            where, ratio, f"{density:g}, which is what pattern {pattern} keeps", 'remove "dense_ratio"'
        )
