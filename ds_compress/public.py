"""All that `import ds_compress` brings: the public names, and a DeepSpeed that knows the block.

`ds_compress/__init__.py` imports this file at once, except in the command `ds_compress`, where `--help` has to answer
without torch and `doctor` where torch is broken.
"""

from __future__ import annotations

from ds_compress import log
from ds_compress.api import export, plan
from ds_compress.config import ConfigError, parse_config
from ds_compress.config.recipes import recipe
from ds_compress.config.report.plan import Plan
from ds_compress.distill.cache_write import cache_teacher
from ds_compress.engine.api import export_state_dict, initialize
from ds_compress.engine.checkpoint.universal import to_universal
from ds_compress.engine.finalize import finalize, redundancy_clean
from ds_compress.engine.layerwise import distill_layers
from ds_compress.engine.registration import register, unregister
from ds_compress.errors import CheckpointError, ExportError
from ds_compress.export.load import from_pretrained
from ds_compress.hf.auto import join_transformers
from ds_compress.secure import load_verified

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "Plan",
    "cache_teacher",
    "distill_layers",
    "export",
    "export_state_dict",
    "finalize",
    "from_pretrained",
    "initialize",
    "load_verified",
    "parse_config",
    "plan",
    "recipe",
    "redundancy_clean",
    "register",
    "to_universal",
    "unregister",
]

log.set_up()
log.print_one_traceback()
register()
join_transformers()
