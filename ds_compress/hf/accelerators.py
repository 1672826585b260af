"""An Accelerator that was given a block and leaves DeepSpeed out would train an uncompressed model without a word."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from ds_compress.errors import ROOT, ConfigError, Problem


def check_every(accelerator_class: Any) -> None:
    """Each Accelerator made from now on is checked by `refuse_unused`; idempotent."""
    original = accelerator_class.__init__
    if getattr(original, "_checks_deepspeed", False):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        refuse_unused(self, given.get("deepspeed_plugin", given.get("deepspeed_plugins")))

    __init__._checks_deepspeed = True  # type: ignore[attr-defined]
    accelerator_class.__init__ = __init__


def refuse_unused(accelerator: Any, plugins: Any) -> None:
    """Raises ConfigError for a plugin with a block whose Accelerator does not use DeepSpeed."""
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        return
    if any(ROOT in config for config in _configs(plugins)):
        got = "an Accelerator that leaves DeepSpeed out, and the block with it"
        hint = "cpu=True does so, also on a machine without a GPU: remove it"
        raise ConfigError([Problem(ROOT, got, "an Accelerator that uses DeepSpeed", hint)])


def _configs(plugins: Any) -> Iterator[Mapping[str, Any]]:
    for plugin in plugins.values() if isinstance(plugins, dict) else [plugins]:
        config = getattr(getattr(plugin, "hf_ds_config", None), "config", None)
        if isinstance(config, Mapping):
            yield config
