"""Makes transformers' `from_pretrained` know folders of `format="torch"`, without importing transformers.

Whichever of the two is imported first: where `transformers.quantizers.auto` is there already, the quantizer is
registered now; else as soon as it has been imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_quantizer() -> None:
    """Idempotent."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and not getattr(registry.__spec__, "_initializing", False):
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from ds_compress.hf import quantizer

    quantizer.register()


class _Finder(MetaPathFinder):
    """Finds one module, as all other finders do, and has something done once it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
