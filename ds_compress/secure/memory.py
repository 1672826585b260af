"""Bytes under a path without a file on disk, for libraries that read keys and signatures from paths only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ds_compress.secure.errors import KeyUnavailableError


@contextlib.contextmanager
def in_memory(content: bytes) -> Iterator[str]:
    """A path that this process reads `content` from; the memory behind it goes with the block.

    Raises:
        KeyUnavailableError: the system has no such files. Linux has.
    """
    if not hasattr(os, "memfd_create"):
        raise KeyUnavailableError("signatures and keys are held in memory by memfd_create, which Linux has")
    descriptor = os.memfd_create("ds_compress", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
