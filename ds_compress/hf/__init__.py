"""For those who train with Hugging Face and want the explicit forms; `import ds_compress` alone needs none of them.

CompressionCallback      sparsity, bits and distillation losses in the Trainer's logs
DistillationTrainer      a Trainer that is given the teacher as an object
merge_and_unload         merges LoRA adapters into a sparse model and keeps it sparse
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_compress.hf.callback import CompressionCallback
    from ds_compress.hf.merge import merge_and_unload
    from ds_compress.hf.trainer import DistillationTrainer

__all__ = ["CompressionCallback", "DistillationTrainer", "merge_and_unload"]

_MODULES = {"CompressionCallback": "callback", "DistillationTrainer": "trainer", "merge_and_unload": "merge"}


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, and a plain DeepSpeed script never needs it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
