"""Heavy modules: doing something when one is imported, without importing it for that; and where none is wanted yet.

`transformers` takes seconds to import and a plain DeepSpeed script may never need it; a Trainer script does, before
or after it imports us.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action(module)` now if the module `name` is imported already, else right after its code has run."""
    if _is_imported(name):
        action(sys.modules[name])
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.actions.setdefault(name, []).append(action)


def not_compiled(function: _Function) -> _Function:
    """`torch.compiler.disable` for a function of a module or a method, without the seconds that its import takes.

    That decorator imports `torch._dynamo` (and with it sympy and distributed tensors). Nothing can be compiled before
    that is imported, so the function is replaced by its disabled self only then.
    """
    if _is_imported("torch._dynamo"):
        return _disabled(function)

    def replace(_: ModuleType) -> None:
        owner: Any = sys.modules[function.__module__]
        *above, name = function.__qualname__.split(".")
        for part in above:
            owner = getattr(owner, part)
        setattr(owner, name, _disabled(function))

    when_imported("torch._dynamo", replace)
    return function


def _disabled(function: _Function) -> _Function:
    import torch

    disabled: _Function = torch.compiler.disable(function)
    return disabled


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def is_command_line() -> bool:
    """Whether this process is the command `ds_compress` (or `python -m ds_compress`), and no script or worker.

    By what the interpreter was started with: `sys.argv` is that of the parent in a spawned worker.
    """
    arguments, given = sys.argv[1:], list(sys.orig_argv)
    head = given[: len(given) - len(arguments)]
    if len(head) < 2 or given[len(head) :] != arguments:
        return False
    script = Path(head[-1])
    return head[-2:] == ["-m", "ds_compress"] or (script.stem == "ds_compress" and script.is_file())


class _Finder:
    """Finds nothing itself: it lets the other finders find a module that somebody waits for, and runs the actions."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._looking_for: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions or name in self._looking_for:
            return None
        self._looking_for.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking_for.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for action in self.actions.pop(name, ()):
                action(module)

        loader: Any = spec.loader
        loader.exec_module = exec_module
        return spec


_finder = _Finder()
