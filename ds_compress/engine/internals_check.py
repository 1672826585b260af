"""DeepSpeed's internals are checked once per process, when the installed version is none that we have tested."""

from __future__ import annotations

import functools
import logging

from ds_compress.engine.zero.internals_table import missing_internals

logger = logging.getLogger("ds_compress")

TESTED_VERSIONS = ("0.19.8",)


@functools.cache
def require_known_internals() -> None:
    """Looks at every private name that we rely on, where nobody has tried this version of DeepSpeed.

    Raises:
        RuntimeError: one of them is gone or takes other arguments; it says which, and which versions are tested.
    """
    import deepspeed

    version: str = deepspeed.__version__.split("+")[0]
    if version in TESTED_VERSIONS:
        return
    missing = missing_internals()
    if missing:
        raise RuntimeError(
            f"ds_compress was not made for DeepSpeed {version}, whose internals differ from those of "
            f"{TESTED_VERSIONS[-1]}: {'; '.join(missing)}. Install deepspeed=={TESTED_VERSIONS[-1]}"
        )
    logger.warning(
        "ds_compress was tested with DeepSpeed %s, this is %s; all internals that it relies on are there",
        " and ".join(TESTED_VERSIONS),
        version,
    )
