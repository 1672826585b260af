"""`randomize`, of all blocks that prune: a random choice by scores instead of the largest ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from ds_compress.config.schema.fields import Conflict, Description, StrictFloat, StrictModel
from ds_compress.errors import listed

SECRET = "secret"
_SEEDS = 2**256
"""Below it: as many as there are secret seeds, so that one that was revealed can be given."""
_UNABLE = ("topk", "movement", "random")
"""Methods whose scores may be negative, and so have no logarithm, or are random already."""


def _seed_or_secret(value: Any) -> Any:
    if value is None or value == SECRET or (type(value) is int and 0 <= value < _SEEDS):
        return value
    raise PydanticCustomError("seed_or_secret", "a seed")


RandomSeed = Annotated[
    Any,
    AfterValidator(_seed_or_secret),
    Description('"secret", or a whole number >= 0 (and < 2^256)'),
    WithJsonSchema({"anyOf": [{"const": SECRET}, {"type": "integer", "minimum": 0}, {"type": "null"}]}),
]


class Randomize(StrictModel):
    """Chooses what is kept at random, by scores: Gumbel top-k (Kool et al. 2019)."""

    temperature: Annotated[StrictFloat, Field(ge=0, le=100)] = Field(
        description=(
            "Of the noise: what is left is kept with a probability in proportion to score^(1 / temperature); 0: the "
            "largest scores, without noise."
        )
    )
    seed: RandomSeed = Field(
        default=None,
        description=(
            '"secret": drawn from the operating system, kept in checkpoints only, its hash in the report of an export; '
            "absent: the seed of the whole block."
        ),
    )

    def describe(self) -> str:
        """For the plan."""
        secret = ", by a secret seed" if self.seed == SECRET else ""
        return f"chosen at random at temperature {self.temperature:g}{secret}"


def randomize_conflicts(
    randomize: Randomize | None, method: str, methods: Sequence[str]
) -> Iterator[Conflict]:
    """Methods that cannot be randomized; `methods`: all of the block."""
    if randomize is not None and method in _UNABLE:
        able = listed([known for known in methods if known not in _UNABLE])
        why = (
            "random chooses at random already"
            if method == "random"
            else f"scores of {method} may be negative"
        )
        yield Conflict(
            ("randomize",), randomize.model_dump(), f"nothing, unless method is {able}", f"{why}: remove it"
        )
