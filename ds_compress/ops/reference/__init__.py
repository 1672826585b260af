"""Every op in plain torch: what runs where nothing is compiled, and what the tests hold the kernels against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_compress.ops.reference import block_quantize, fake_quantize, linear, mask
from ds_compress.ops.schemas import SCHEMAS

_MODULES = (linear, fake_quantize, mask, block_quantize)
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    name: next(getattr(module, name) for module in _MODULES if hasattr(module, name)) for name in SCHEMAS
}
