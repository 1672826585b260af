"""Named presets of the block: `"compression_training": {"recipe": "w4a16", ...overrides}`.

`<name>@<version>.json` beside this file is one recipe, and the only place that it is written down: the configs of
`ds_configs/recipes`, the table of `docs/recipes.md` and `ds_compress init` are made from it. A version that was
released is not edited: a change is a new file, and the old one stays for those who wrote its version.
"""

from __future__ import annotations

from ds_compress.config.recipes.catalog import Recipe, find, newest
from ds_compress.config.recipes.expand import recipe

__all__ = ["Recipe", "find", "newest", "recipe"]
