"""What `import ds_compress` adds to transformers, without importing it: whichever of the two is imported first.

Trainers get a callback, and `from_pretrained` knows folders of `format="torch"`.
"""

from __future__ import annotations

from types import ModuleType

from ds_compress.imports import when_imported


def join_transformers() -> None:
    """Once, when the package is imported."""
    when_imported("transformers.trainer", _join_trainers)
    when_imported("transformers.quantizers.auto", _register_quantizer)


def _join_trainers(module: ModuleType) -> None:
    from ds_compress.hf.callback import CompressionCallback

    CompressionCallback.join_every_trainer(module)


def _register_quantizer(module: ModuleType) -> None:
    from ds_compress.hf import quantizer

    quantizer.register()
