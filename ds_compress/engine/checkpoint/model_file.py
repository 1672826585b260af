"""`model.json` beside a checkpoint's compression state: what the folder alone must say for an export.

    {"format": 1, "class": "BertModel", "config": {...} or null, "dtype": "float32", "recipe": "w8a8@1" or null,
     "compression_training": {...}}

The block is written out, as the recipe made it, and does not name the recipe: a later version cannot change it.
`config` is that of the model as it was saved, in transformers' form; null for other models, whose class an export must
be given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_compress.files import atomic_write

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

FILE_NAME = "model.json"


def write(folder: Path, run: CompressionRun) -> None:
    """Writes the file; appears only when complete."""
    config: Any = getattr(run.model, "config", None)
    data = {
        "format": 1,
        "class": type(run.model).__name__,
        "config": config.to_dict() if hasattr(config, "to_diff_dict") else None,
        "dtype": str(next(p.dtype for p in run.model.parameters())).removeprefix("torch."),
        "recipe": run.given.recipe,
        "compression_training": run.block,
    }
    atomic_write(folder / FILE_NAME, json.dumps(data, indent=1, default=str) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """None where there is no such file.

    Raises:
        ValueError: it is damaged, or of a newer version.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        if data["format"] != 1:
            raise ValueError(f"{path} was written by a newer version of ds_compress")
        data["class"], data["config"], data["dtype"], data["compression_training"]
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return data
