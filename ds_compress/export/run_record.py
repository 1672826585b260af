"""The record of a run beside an export, `ds_compress_run.json`: what the training was, for `ds_compress report`.

It is written by `engine.record`. An export is given away, so that paths of the machine, keys and seeds are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

FILE_NAME = "ds_compress_run.json"
FORMAT = 1
_PRIVATE = ("security", "seed")
"""Keys of the block, at any depth."""


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """The part of `record` that anybody may see."""
    shown = {**record, "compression_training": _published(record.get("compression_training") or {})}
    (folder / FILE_NAME).write_text(json.dumps(shown) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any] | None:
    """None where there is no such file.

    Raises:
        ValueError: it is damaged, or of a newer version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError(f"{path} is damaged: it is no record of a run")
    if data["format"] != FORMAT:
        raise ValueError(f"{path} was written by a newer version of ds_compress")
    return data


def _published(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _published(item) for key, item in value.items() if key not in _PRIVATE}
    if isinstance(value, list):
        return [_published(item) for item in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute():
                return path.name
    return value
