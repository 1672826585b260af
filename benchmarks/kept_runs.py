"""Figures of finished runs, one file each, so that a benchmark of hours goes on where it was cut off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def path_of(folder: Path, name: str) -> Path:
    """Of the run `name` of a benchmark that keeps its things in `folder`."""
    return folder / "runs" / f"{name}.json"


def keep(folder: Path, name: str, figures: Mapping[str, float]) -> None:
    """So that a reader sees a whole file or none."""
    path = path_of(folder, name)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    temporary.replace(path)


def finished(folder: Path, name: str) -> dict[str, float] | None:
    """Its figures; None: it is not done yet."""
    path = path_of(folder, name)
    return json.loads(path.read_text()) if path.exists() else None
