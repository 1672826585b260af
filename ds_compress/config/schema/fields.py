"""Types that the blocks share: strict numbers, regexes, and models that report all conflicts at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ds_compress.modelinfo.inventory import EVERY_LAYER
from ds_compress.regexes import problem_of

CONFLICTS = "conflicts"
"""Type of the pydantic error whose context carries `Conflict`s; `translate` unpacks it."""


class Conflict(NamedTuple):
    """A rule between fields that the values break; `where` is relative to the model that reports it."""

    where: tuple[str | int, ...]
    got: Any
    allowed: str
    hint: str = ""


class Description(NamedTuple):
    """Marks an annotated type with what is allowed, in words, where its constraints do not say it."""

    text: str


class StrictModel(BaseModel):
    """A frozen JSON object without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _read_whole_floats(cls, value: Any) -> Any:
        """JSON writes a thousand as 1000, 1000.0 or 1e3."""
        return [_as_whole(item) for item in value] if isinstance(value, list) else _as_whole(value)

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between fields that are each fine; called when all of them are."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> StrictModel:
        found = list(self.conflicts())
        if found:
            raise PydanticCustomError(CONFLICTS, "conflicting values", {CONFLICTS: found})
        return self

    def given(self, field: str) -> bool:
        """Whether the JSON had the field, with any value but "auto"."""
        return field in self.model_fields_set


def without_effect(
    section: StrictModel, key: str, when: bool, needed: str, path: tuple[str | int, ...] = ()
) -> Iterator[Conflict]:
    """A conflict if the JSON has `key` where, `when` being true, it changes nothing; `needed`: what would use it."""
    if when and section.given(key) and getattr(section, key) is not None:
        yield Conflict((*path, key), getattr(section, key), f"nothing, unless {needed}", f'remove "{key}"')


def _as_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no_look_alike(value: Any) -> Any:
    # Literal[0, 3] compares by ==, and false == 0.
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "a number, not a boolean")
    return value


def _one_regex(value: str) -> str:
    if value != EVERY_LAYER:
        problem = problem_of(value)
        if problem:
            raise PydanticCustomError("regex", "a regex", {"problem": problem})
    return value


StrictBool = Annotated[bool, Strict()]
StrictInt = Annotated[int, Strict()]
StrictFloat = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Choice = BeforeValidator(_no_look_alike)
Regex = Annotated[
    str, AfterValidator(_one_regex), Description('a Python regular expression, or "*" for every layer')
]
Ratio = Annotated[StrictFloat, Field(gt=0, le=1)]
Step = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63), Description("a whole number >= 0 (and < 2^63)")]
_MOST_REGEXES = 1000
"""In one list; each is searched in the names of all modules."""
Patterns = Annotated[tuple[Regex, ...], Field(min_length=1, max_length=_MOST_REGEXES)]
ExcludedModules = Annotated[
    tuple[Regex, ...],
    Field(
        max_length=_MOST_REGEXES,
        description="Regexes (re.search) of module names that this block leaves alone.",
    ),
]


class Group(StrictModel):
    """One entry of `different_groups`: some layers and how they are treated."""

    modules: Patterns = Field(
        default=(EVERY_LAYER,),
        description='Regexes (re.search) on module names; absent or "*": every Linear, Conv1D, Conv2d and expert.',
    )
    related_modules: tuple[Patterns, ...] | None = Field(
        default=None,
        description=(
            "For each regex of modules, the regexes of the modules whose other dimension shrinks with it; "
            "row_pruning, head_pruning and channel_pruning only, elsewhere accepted without effect as ever."
        ),
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.related_modules is not None and len(self.related_modules) != len(self.modules):
            yield Conflict(
                ("related_modules",),
                self.related_modules,
                f"one list for each entry of modules, that is {len(self.modules)}",
            )


GroupT = TypeVar("GroupT", bound=Group)
Groups = Annotated[dict[str, GroupT], Field(description="Groups of layers, each with a name of your choice.")]
