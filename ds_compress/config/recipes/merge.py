"""Overrides over a recipe, as a JSON merge patch (RFC 7396)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any


def merged(below: Any, over: Any) -> Any:
    """`over` over `below`: objects merge key by key, null removes a key, any other value (a list, too) replaces.

    Both stay as they are.
    """
    if not isinstance(over, Mapping):
        return copy.deepcopy(over)
    result: dict[Any, Any] = copy.deepcopy(dict(below)) if isinstance(below, Mapping) else {}
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def holds(value: Any, path: str) -> bool:
    """Whether `value` has something at `path`, e.g. `a.b[0].c`; the name of a group may have dots in it."""
    if not path:
        return True
    if isinstance(value, Mapping):
        return any(
            holds(item, path[len(key) :].removeprefix("."))
            for key, item in value.items()
            if isinstance(key, str)
            and path.startswith(key)
            and path[len(key) : len(key) + 1] in ("", ".", "[")
        )
    if isinstance(value, list | tuple) and path.startswith("["):
        number, _, rest = path[1:].partition("]")
        return (
            number.isdigit()
            and int(number) < len(value)
            and holds(value[int(number)], rest.removeprefix("."))
        )
    return False


def leaves(value: Any, outer: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted paths of everything below `value` that is no object."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*outer, str(key)))
    else:
        yield ".".join(outer)
