"""The tables of keys in `docs/blocks`, written from the descriptions, defaults and limits in the schema.

    python -m tests.docs.key_tables       # rewrites every table that is not current

A page marks the place of a table with `<!-- keys: BLOCK -->` and `<!-- end of keys -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import ds_compress
from ds_compress.config.schema.translate import in_words, slot_at
from tests.docs.pages import DOCS

CONFIG = type(ds_compress.parse_config({}))
_TABLE = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end of keys -->)", re.DOTALL)
_NAME = "NAME"
_A_REGEX = 'a Python regular expression, or "*" for every layer'
WHOLE = "compression_training"
"""Marks the table of the keys that belong to no block."""


def with_tables(text: str) -> str:
    """`text` of a page, its tables replaced by current ones."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def stale_pages() -> list[Path]:
    """Pages whose tables are not what the schema says."""
    return [page for page in DOCS.rglob("*.md") if with_tables(page.read_text()) != page.read_text()]


def tables_in(page: Path) -> list[str]:
    """The blocks whose keys a page lists."""
    return [found[2] for found in _TABLE.finditer(page.read_text())]


def table(block: str) -> str:
    """The table of one block; with `WHOLE`, of the keys beside the blocks."""
    if block == WHOLE:
        fields = {
            name: field for name, field in CONFIG.model_fields.items() if not _models_in(field.annotation)
        }
        return _keys((), fields)
    model = slot_at(CONFIG, (block,)).annotation
    parts = [f"{model.__doc__.strip().splitlines()[0]}\n"]
    for place, fields in _objects(model, (block,)):
        heading = f"`{'.'.join(place)}`"
        parts.append(f"**{heading}**\n\n{_keys(place, fields)}")
    return "\n".join(parts)


def _objects(
    model: type[BaseModel], place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, FieldInfo]]]:
    """Every object below a block with its fields, itself first."""
    plain = {name: field for name, field in model.model_fields.items() if not _models_in(field.annotation)}
    if plain:
        yield place, plain
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            is_dict = "dict" in str(field.annotation)
            yield from _objects(inner, (*place, name, _NAME) if is_dict else (*place, name))


def _keys(place: tuple[str, ...], fields: dict[str, FieldInfo]) -> str:
    """The table in a `div`, which a style sheet shows row below row on a phone."""
    return '<div class="keys" markdown>\n\n' + "\n".join(_lines(place, fields)) + "\n\n</div>\n"


def _lines(place: tuple[str, ...], fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield "| key | value | meaning |"
    yield "|---|---|---|"
    for name, field in fields.items():
        value = f"{_escaped(_value((*place, name)))}; {_default(field)}"
        yield f"| `{name}` | {value} | {_escaped(_description(field))} |"


def _value(place: tuple[str, ...]) -> str:
    words = in_words(slot_at(CONFIG, place))
    regexes = words.partition("each entry: ")[2].endswith(_A_REGEX)
    if not regexes:
        return words
    return "a list of lists of regexes" if words.count("each entry") > 1 else "a list of regexes"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        value = None if field.default is PydanticUndefined else field.default
    else:
        value = field.default
    if value is None or value is PydanticUndefined:
        return "absent by default"
    return f"default `{json.dumps(value)}`"


def _description(field: FieldInfo) -> str:
    if field.description:
        return field.description
    described = [item.description for item in field.metadata if isinstance(item, FieldInfo)]
    return next((text for text in described if text), "")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _escaped(text: str) -> str:
    """Text as the cell of a table: `*` and `<` are characters, a bar ends no cell, code stays code."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [part.replace("*", "\\*").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def main() -> None:
    for page in stale_pages():
        page.write_text(with_tables(page.read_text()))
        print(page)


if __name__ == "__main__":
    main()
