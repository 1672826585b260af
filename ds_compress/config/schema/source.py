"""Where a block comes from: itself, a DeepSpeed config around it, or a JSON file with either."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from ds_compress.config.schema.compression_training import SCHEMA_KEY, config_model
from ds_compress.config.schema.placement import refuse_misplaced
from ds_compress.errors import ROOT, ConfigError, Problem, nearest, shown

_COMMENTS = ("//", "#", "/*")
_OF_DEEPSPEED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
        "zero_optimization",
        "bf16",
        "fp16",
        "torch_autocast",
        "gradient_clipping",
        "steps_per_print",
        "zero_allow_untested_optimizer",
    }
)
"""Keys by which an object shows that it is a DeepSpeed config rather than a block of ours."""


def block_of(config: Mapping[str, Any] | str | PathLike[str]) -> Mapping[str, Any]:
    """The `compression_training` block of `config`; raises ConfigError when there is none."""
    source = ROOT
    if isinstance(config, str | PathLike):
        source = fspath(config)
        config = read_json(source)
    if not isinstance(config, Mapping):
        raise ConfigError([Problem(source, shown(config), "an object, or the path of a JSON file with one")])
    keys = [key for key in config if isinstance(key, str) and key != SCHEMA_KEY]
    if ROOT in config or _OF_DEEPSPEED.intersection(keys):
        refuse_misplaced(config)
    if ROOT in config:
        block: Mapping[str, Any] = config[ROOT]
        return block
    if not keys:
        return config
    if not _OF_DEEPSPEED.intersection(keys) and any(
        nearest(key, config_model().model_fields) for key in keys
    ):
        return config
    near = next((key for key in keys if nearest(key, [ROOT])), None)
    raise ConfigError(
        [
            Problem(
                source,
                f"the keys {', '.join(map(shown, keys[:8]))}{' ...' if len(keys) > 8 else ''}",
                f'the key "{ROOT}", or its value by itself',
                f'did you mean "{ROOT}" where it says "{near}"?' if near else "",
            )
        ]
    )


def read_json(path: str) -> Any:
    """The content of a JSON file; raises ConfigError that says where it is broken."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(path, str(error), "the path of a JSON file that can be read")]) from None

    def objects(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _without_duplicates(path, pairs)

    try:
        return json.loads(text, object_pairs_hook=objects)
    except json.JSONDecodeError as error:
        commented = _read_hjson(text, objects)
        if not isinstance(commented, _Broken):
            return commented
        line = _line(text, error.lineno)
        message, lineno, column = error.msg, error.lineno, error.colno
        if line.startswith(_COMMENTS) and commented.line:
            # A comment is no JSON, but DeepSpeed reads it: what is wrong is what stops DeepSpeed too.
            message, lineno, column = commented.message, commented.line, commented.column
        place = f"{path}, line {lineno}, column {column}"
        raise ConfigError([Problem(place, shown(_line(text, lineno)), "JSON", message)]) from None
    except RecursionError:
        raise ConfigError([Problem(path, "very many objects or lists in one another", "JSON")]) from None
    except ValueError:
        raise ConfigError([Problem(path, "a number of more than 4,300 digits", "JSON")]) from None


class _Broken(NamedTuple):
    """Where and why a text is no Hjson either; line 0: it is, but no object."""

    message: str = ""
    line: int = 0
    column: int = 0


def _read_hjson(text: str, objects: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
    """DeepSpeed reads its config as Hjson, so comments and trailing commas are fine; `_Broken` if worse."""
    hjson = importlib.import_module("hjson")
    try:
        found = hjson.loads(text, object_pairs_hook=objects)
    except hjson.HjsonDecodeError as error:
        return _Broken(error.msg, error.lineno, error.colno)
    except (RecursionError, ValueError, IndexError):  # the last where a text ends too early
        return _Broken()
    return found if isinstance(found, Mapping) and found else _Broken()


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def _without_duplicates(path: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ConfigError([Problem(path, f"the key {shown(twice)} twice in one object", "each key once")])
    return found
