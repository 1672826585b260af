"""What `import ds_compress` adds to transformers and accelerate, without importing them: whichever comes first.

Trainers get a callback and resume from checkpoints that are whole, `from_pretrained` knows folders of `format="torch"`,
and an Accelerator of accelerate does not leave a block unused.
"""

from __future__ import annotations

from types import ModuleType

from ds_compress.imports import when_imported


def join_transformers() -> None:
    """Once, when the package is imported."""
    when_imported("transformers.trainer", _join_trainers)
    when_imported("transformers.quantizers.auto", _register_quantizer)
    when_imported("accelerate.accelerator", _check_accelerators)


def _join_trainers(module: ModuleType) -> None:
    from ds_compress.hf import resume
    from ds_compress.hf.callback import CompressionCallback

    CompressionCallback.join_every_trainer(module)
    resume.join_every_trainer(module)


def _check_accelerators(module: ModuleType) -> None:
    from ds_compress.hf import accelerators

    accelerators.check_every(module.Accelerator)


def _register_quantizer(module: ModuleType) -> None:
    from ds_compress.hf import quantizer

    quantizer.register()
