"""Turns pydantic's errors into `Problem`s: our words, the JSON path, and the nearest allowed thing."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ds_compress.config.schema.fields import CONFLICTS, Description
from ds_compress.errors import Problem, dotted, listed, nearest, shown

Where = tuple[str | int, ...]
NOTHING = "nothing"
_KEY_OF_OBJECT = "[key]"
_MOST = 500
"""Problems that are told one by one: nobody reads more, and each takes a millisecond."""
_AUTO_IS_NO_VALUE = '"auto" counts as left out, and there is no default: give a value'


class Slot(NamedTuple):
    """What the models say about one place of the JSON: its type and the constraints on it."""

    annotation: Any
    constraints: tuple[Any, ...] = ()


def translate(error: ValidationError, root: type[BaseModel], raw: Any) -> list[Problem]:
    """All problems of one validation of `raw` against `root`; unknown keys first, they explain the rest."""
    problems: list[Problem] = []
    suggested: set[Where] = set()
    details = _causes(error.errors(include_url=False))
    details, more = details[:_MOST], details[_MOST:]
    for detail in details:
        if detail["type"] in ("extra_forbidden", "invalid_key"):
            problem, instead = _unknown_key(detail, root, raw)
            problems.append(problem)
            suggested.add((*_where(detail)[:-1], instead) if instead else ())
    for detail in details:
        if detail["type"] == CONFLICTS:
            problems.extend(_conflicts(detail, raw))
        elif detail["type"] == "missing":
            # A misspelt required key is one mistake, not two.
            if _where(detail) not in suggested:
                problems.append(_missing(detail, root, raw))
        elif detail["type"] not in ("extra_forbidden", "invalid_key"):
            problems.append(_bad_value(detail, root))
    if more:
        problems.append(
            Problem(dotted(*_where(more[0])), f"{len(more):,} more problems, this is the first", "none")
        )
    return problems


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without lists called too short because their bad entries were dropped, and defaults made of what is bad."""
    details = [detail for detail in details if detail["type"] != "default_factory_not_called"]
    places = {_where(detail) for detail in details}
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any((*_where(detail), at) in places for at in range(len(detail["input"])))
    ]


def _where(detail: ErrorDetails) -> Where:
    return tuple(detail["loc"])


def _unknown_key(detail: ErrorDetails, root: type[BaseModel], raw: Any) -> tuple[Problem, str | None]:
    *outer, key = _where(detail)
    owner = slot_at(root, tuple(outer)).annotation
    keys = list(owner.model_fields) if _is_model(owner) else []
    name = str(key)
    home = _home_of(name, root, tuple(outer), raw)
    instead = None if home else nearest(name, keys)
    if home:
        hint = f'"{name}" belongs under "{home}"'
    elif instead:
        hint = f'did you mean "{instead}"?'
    else:
        hint = "remove it"
    path = dotted(*(str(step) if not isinstance(step, int) else step for step in outer), name)
    return Problem(path, f"the unknown key {shown(name)}", f"the keys {listed(keys, 'and')}", hint), instead


def _home_of(name: str, root: type[BaseModel], outer: Where, raw: Any) -> str | None:
    """Where a misplaced key belongs: in the same block, e.g. "shared_parameters"; or in a block that is there."""
    if not outer:
        homes = [
            f"{block}.{'.'.join(place)}".rstrip(".")
            for block in root.model_fields
            if isinstance(raw, Mapping) and block in raw
            for place, model in _models_below(slot_at(root, (block,)).annotation)
            if name in model.model_fields
        ]
        return homes[0] if homes else None
    for start in (outer, outer[:1]):
        for place, model in _models_below(slot_at(root, start).annotation):
            if name in model.model_fields and place:
                return ".".join(place)
    return None


@functools.cache
def _models_below(model: Any) -> tuple[tuple[tuple[str, ...], type[BaseModel]], ...]:
    return tuple(_walk(model, ()))


def _walk(model: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    if not _is_model(model):
        return
    yield place, model
    for name, field in model.model_fields.items():
        inner, _ = _unwrap(field.annotation, ())
        if get_origin(inner) is dict:
            yield from _walk(get_args(inner)[1], (*place, name, "NAME"))
        else:
            yield from _walk(inner, (*place, name))


def _missing(detail: ErrorDetails, root: type[BaseModel], raw: Any) -> Problem:
    where = _where(detail)
    was_auto = _value_at(raw, where) == "auto"
    hint = _AUTO_IS_NO_VALUE if was_auto else "add it"
    return Problem(dotted(*where), '"auto"' if was_auto else NOTHING, in_words(slot_at(root, where)), hint)


def _conflicts(detail: ErrorDetails, raw: Any) -> Iterator[Problem]:
    for conflict in detail["ctx"][CONFLICTS]:
        where = (*_where(detail), *conflict.where)
        got, hint = NOTHING if conflict.got is None else shown(conflict.got), conflict.hint
        if conflict.got is None and _value_at(raw, where) == "auto":
            got, hint = '"auto"', _AUTO_IS_NO_VALUE
        yield Problem(dotted(*where), got, conflict.allowed, hint)


def _bad_value(detail: ErrorDetails, root: type[BaseModel]) -> Problem:
    where = _where(detail)
    if where and where[-1] == _KEY_OF_OBJECT:
        return Problem(dotted(*where[:-1]), shown(detail["input"]), "a name in quotes as the key")
    slot = slot_at(root, where)
    got = detail["input"]
    return Problem(dotted(*where), shown(got), in_words(slot), _hint(detail, slot, got))


def _hint(detail: ErrorDetails, slot: Slot, got: Any) -> str:
    if detail["type"] == "regex":
        return f"it does not compile: {detail['ctx']['problem']}" + _glob_hint(got)
    if not isinstance(got, str):
        return ""
    kind = get_origin(slot.annotation)
    if kind is Literal:
        close = nearest(got, [value for value in get_args(slot.annotation) if isinstance(value, str)])
        return f'did you mean "{close}"?' if close else ""
    if kind is tuple:
        return f"write it as a list: [{shown(got)}]"
    if slot.annotation in (int, float, bool) and _is_quoted(slot.annotation, got):
        return f"write {got.lower()} without quotes"
    return ""


def _glob_hint(pattern: str) -> str:
    return ' (in a regex, "anything" is written ".*")' if pattern.startswith("*") else ""


def _is_quoted(kind: type, text: str) -> bool:
    try:
        value = json.loads(text.lower())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, bool) if kind is bool else isinstance(value, int | float)


def slot_at(root: Any, where: Where) -> Slot:
    """Type and constraints of the place `where` below the model `root`."""
    slot = Slot(root)
    for step in where:
        annotation, constraints = slot
        if _is_model(annotation):
            field = annotation.model_fields.get(step)
            slot = Slot(*_unwrap(field.annotation, field.metadata)) if field else Slot(Any)
        elif get_origin(annotation) is dict:
            slot = Slot(*_unwrap(get_args(annotation)[1], ()))
        elif get_origin(annotation) is tuple:
            slot = Slot(*_unwrap(get_args(annotation)[0], ()))
        else:
            return Slot(Any, constraints)
    return slot


def _unwrap(annotation: Any, metadata: Any) -> tuple[Any, tuple[Any, ...]]:
    constraints: list[Any] = []
    for item in metadata:
        constraints.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        unwrapped, inner_constraints = _unwrap(inner, more)
        return unwrapped, (*inner_constraints, *constraints)
    if get_origin(annotation) in (Union, types.UnionType):
        (only,) = (option for option in get_args(annotation) if option is not types.NoneType)
        unwrapped, inner_constraints = _unwrap(only, ())
        return unwrapped, (*inner_constraints, *constraints)
    return annotation, tuple(constraints)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _value_at(raw: Any, where: Where) -> Any:
    for step in where:
        raw = raw.get(step) if isinstance(raw, Mapping) else None
    return raw


def in_words(slot: Slot) -> str:
    """What may stand at a place, e.g. "a number > 0 and <= 1"."""
    annotation, constraints = slot
    for constraint in constraints:
        if isinstance(constraint, Description):
            return constraint.text
    if _is_model(annotation):
        return f"an object with the keys {listed(annotation.model_fields, 'and')}"
    kind = get_origin(annotation)
    if kind is Literal:
        values = get_args(annotation)
        return listed(values) if isinstance(values[0], str) else " or ".join(map(str, values))
    if kind is dict:
        return 'an object of groups: {"name of your choice": {"params": {...}, "modules": [...]}}'
    if kind is tuple:
        item = in_words(Slot(*_unwrap(get_args(annotation)[0], ())))
        length = "".join(f" of at most {most:,}" for most in _most_entries(constraints))
        return f"a list{length}{', not empty' if _needs_entries(constraints) else ''}; each entry: {item}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    return " and ".join([names.get(annotation, "nothing"), *_bounds(constraints)]).replace(" and ", " ", 1)


def _needs_entries(constraints: tuple[Any, ...]) -> bool:
    return any(isinstance(constraint, annotated_types.MinLen) for constraint in constraints)


def _most_entries(constraints: tuple[Any, ...]) -> Iterator[int]:
    return (c.max_length for c in constraints if isinstance(c, annotated_types.MaxLen))


def _bounds(constraints: tuple[Any, ...]) -> Iterator[str]:
    for constraint in constraints:
        match constraint:
            case annotated_types.Gt(gt=bound):
                yield f"> {bound}"
            case annotated_types.Ge(ge=bound):
                yield f">= {bound}"
            case annotated_types.Lt(lt=bound):
                yield f"< {bound}"
            case annotated_types.Le(le=bound):
                yield f"<= {bound}"
