"""`import ds_compress` is all it takes: two constructors of DeepSpeed learn the key `compression_training`.

Wrapping constructors rather than `deepspeed.initialize` works whatever name the user imported it under, for
every way of passing the JSON, for `zero.Init` (which parses the JSON first) and for Hugging Face. Without the
block both wrappers hand everything through untouched: the caller's own config object included, because
DeepSpeed and accelerate edit it in place.
"""

from __future__ import annotations

import base64
import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ds_compress.engine.op_builder import register_builder
from ds_compress.engine.patches import GLOBALS

if TYPE_CHECKING:
    from ds_compress.config.schema.compression_training import CompressionConfig

logger = logging.getLogger("ds_compress")

KEY = "compression_training"
_CONFIG = "_ds_compress_config"


def register() -> None:
    """Teaches DeepSpeed the key; idempotent."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    if GLOBALS.has(DeepSpeedConfig, "__init__"):
        return
    _replace(DeepSpeedConfig, _wrap_config)
    _replace(DeepSpeedEngine, _wrap_engine)
    register_builder()


def unregister() -> None:
    """Gives DeepSpeed back all that was replaced: its constructors, and globals of its modules (for tests)."""
    GLOBALS.close()


def _replace(cls: type, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    original: Callable[..., None] = cls.__init__  # type: ignore[misc]
    GLOBALS.install(cls, "__init__", wrap(original))


def read_config(config: str | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The DeepSpeed JSON as a mapping, from a dict, a path or base64; None for what DeepSpeed must judge itself."""
    if isinstance(config, Mapping):
        return config
    import hjson
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    if os.path.exists(config):
        with open(config) as file:
            return hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    try:
        return hjson.loads(base64.urlsafe_b64decode(config).decode())
    except (ValueError, TypeError, AttributeError):
        return None


def _wrap_config(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def config_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        mapping = read_config(config)
        parsed = None
        if mapping is not None:
            # Bad input is an error before any model is partitioned or any process group is asked.
            from ds_compress.config.schema.compression_training import SCHEMA_KEY, parse_config
            from ds_compress.config.schema.placement import refuse_misplaced

            refuse_misplaced(mapping)
            if KEY in mapping:
                block = mapping[KEY]
                if block is None:
                    logger.warning("%s is null: nothing is enabled, and the model trains uncompressed", KEY)
                else:
                    parsed = parse_config(block)
                config = {key: value for key, value in mapping.items() if key not in (KEY, SCHEMA_KEY)}
        original(self, config, *args, **kwargs)
        setattr(self, _CONFIG, parsed)

    return config_init


def _wrap_engine(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def engine_init(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        engine, config_class = call.arguments["self"], call.arguments["config_class"]
        config = getattr(config_class, _CONFIG, None) or _config_of_prepared(call.arguments["model"])
        trains = _trains(call.arguments["optimizer"], config_class)
        if config is not None and trains:
            from ds_compress.config.recipes.expand import telling
            from ds_compress.engine import attach, internals_check
            from ds_compress.engine.announce import announce_start
            from ds_compress.engine.construction import construct
            from ds_compress.engine.run_end import warn_if_alone

            internals_check.require_known_internals()
            warn_if_alone()
            with telling(config.applied_recipe):
                run = attach.prepare(call.arguments, config, type(engine).__name__)
            arguments = {name: value for name, value in call.arguments.items() if name != "self"}
            construct(run, engine, arguments, original, attach.attach)
            announce_start(run, engine)
        else:
            original(*args, **kwargs)
            if trains:
                logger.info("no %s block in this DeepSpeed config: the model trains uncompressed", KEY)
            elif config is not None:
                logger.info("this engine has no optimizer; %s does nothing in it", KEY)

    return engine_init


def _config_of_prepared(model: Any) -> CompressionConfig | None:
    """Of a model that `compat.init_compression` prepared and whose DeepSpeed JSON came without the block."""
    from ds_compress.engine.registry import run_of

    run = run_of(model)
    return run.given if run is not None and run.engine is None else None


def _trains(optimizer: Any, config_class: Any) -> bool:
    """False for an inference engine (a teacher, an evaluation under ZeRO-3): nothing there can be compressed."""
    return bool(optimizer is not None or config_class.optimizer_name is not None)
