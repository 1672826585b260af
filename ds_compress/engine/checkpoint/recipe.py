"""A resumed run and its recipe: a package that means something else by a name does not change the run."""

from __future__ import annotations

import logging
from pathlib import Path

from ds_compress.config.recipes.expand import Applied
from ds_compress.engine.checkpoint import model_file
from ds_compress.errors import CheckpointError

logger = logging.getLogger("ds_compress")


def refuse_newer_version(folder: Path, now: Applied | None) -> None:
    """Compares the recipe of the run with the one that wrote `folder`, the compression state of a checkpoint.

    Raises:
        CheckpointError: the JSON names a recipe without a version, and the last version was another one then.
    """
    saved = (model_file.read(folder) or {}).get("recipe")
    if saved is None or now is None or saved == now.recipe.label:
        return
    if saved.partition("@")[0] == now.recipe.name and not now.is_pinned:
        raise CheckpointError(
            f'{folder} was trained with the recipe "{saved}", and "{now.recipe.name}" means "{now.recipe.label}" in '
            f'this version of ds_compress: write "recipe": "{saved}" to go on as it began, or '
            f'"{now.recipe.label}" to go on with the new one'
        )
    logger.warning(
        '%s was trained with the recipe "%s"; it goes on with "%s"', folder, saved, now.recipe.label
    )
