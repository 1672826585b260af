"""What is learned beside a model without being part of it."""

from __future__ import annotations

AUXILIARY = "ds_compress_auxiliary"
"""Name of the submodule that holds it while the model trains; nothing compresses, counts or exports it."""


def is_auxiliary(name: str) -> bool:
    """Whether `name`, of a module or parameter, lies in it."""
    return name == AUXILIARY or name.startswith(AUXILIARY + ".")
