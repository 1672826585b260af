"""`init_compression`, `redundancy_clean` and `student_initialization` of the removed library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from ds_compress.compat import basic_layer
from ds_compress.compat.config import (
    SHARED_KEYS,
    block_of_config,
    deepspeed_config,
    enabled_blocks,
    get_compression_config,
)
from ds_compress.compat.constants import (
    DIFFERENT_GROUPS,
    DIFFERENT_GROUPS_MODULE_SCOPE,
    DIFFERENT_GROUPS_PARAMETERS,
    DIFFERENT_GROUPS_RELATED_MODULE_SCOPE,
    LAYER_REDUCTION,
    SHARED_PARAMETERS,
)
from ds_compress.config.schema.compression_training import parse_config
from ds_compress.engine.build import prepare_model
from ds_compress.engine.finalize import finalize
from ds_compress.engine.registry import keep, means_the_same, run_of
from ds_compress.engine.zero.parameters import copy_parameters
from ds_compress.errors import ROOT, ConfigError, Problem, dotted
from ds_compress.modelinfo.inventory import EVERY_LAYER
from ds_compress.regexes import occurs
from ds_compress.techniques.layer_reduction import reduce_layers

logger = logging.getLogger("ds_compress")

Config = Mapping[str, Any] | str | PathLike[str]
_TEACHES = (LAYER_REDUCTION, "distillation")


def init_compression(
    model: Any, deepspeed_config: Config, teacher_model: nn.Module | None = None, mpu: Any = None
) -> Any:
    """Prepares a model for training under the `compression_training` block of a DeepSpeed JSON.

    Call it before `deepspeed.initialize(model=model, config=<the same JSON>)`, which takes the prepared model over;
    or before `compression_scheduler(model, config)` in a training loop without DeepSpeed's engine.

    Args:
        model: an nn.Module, or a wrapper with one in `.module`. Layers change in place: parameters stay the same
            objects. Under `layer_reduction` the layers that are not kept go.
        deepspeed_config: a dict or the path of a JSON file: the DeepSpeed config, or the block by itself.
        teacher_model: what `layer_reduction` copies layers from (without one the model is cut from itself) and
            `distillation` imitates, whatever `distillation.teacher` names; frozen, and set to eval, if one of the two
            is enabled, otherwise not looked at.
        mpu: accepted if its model-parallel world size is 1: there are no layers here that are split over processes.

    Returns:
        `model`, the object that was given; untouched when nothing is enabled or there is no block.

    Raises:
        ConfigError: everything that is wrong with the block, or with what it asks of this model.
    """
    block = block_of_config(deepspeed_config)
    enabled = [] if block is None else enabled_blocks(block)
    if block is None or not enabled:
        logger.info("ds_compress: nothing is enabled in %s; the model stays as it is", ROOT)
        return model
    _refuse_model_parallel(mpu)
    prepare(unwrapped(model), block, teacher_model if set(enabled) & set(_TEACHES) else None)
    return model


def redundancy_clean(model: Any, deepspeed_config: Config, mpu: Any = None) -> Any:
    """Ends training: the structures that were masked are removed, and the smaller model comes back.

    Args:
        model: the engine, the model that it trains, or that of a loop with `compression_scheduler`: the masks in
            force decide what goes. Or a model that was trained elsewhere: its weights and the config decide.
        deepspeed_config: as for `init_compression`.
        mpu: as for `init_compression`.

    Returns:
        The module that `init_compression` was given (not its wrapper), plain and whole; `model` itself, untouched,
        when it was not compressed and nothing is enabled. Single weights that were pruned are zeros in it. Its
        quantizers are still attached, so that `ds_compress.export(model, folder)` stores integers and scales, which
        the old function could not.

    Raises:
        ConfigError: the config does not fit the model.
    """
    if hasattr(model, "compression"):
        return finalize(model)
    inner = unwrapped(model)
    if run_of(inner) is not None:
        return finalize(inner)
    block = block_of_config(deepspeed_config)
    if block is None or not enabled_blocks(block):
        logger.info("ds_compress: nothing is enabled in %s; the model stays as it is", ROOT)
        return model
    _refuse_model_parallel(mpu)
    return finalize(inner, block)


def student_initialization(
    student_model: nn.Module, teacher_model: nn.Module, deepspeed_config: Config
) -> None:
    """Copies layers of the teacher into the student as `layer_reduction` says, wherever ZeRO keeps the weights.

    A student that still has all layers is cut. The old function worked whether or not the block was `enabled`; so
    does this one.

    Raises:
        ConfigError: no such block, layers that do not exist, or shapes that differ.
    """
    block = dict((block_of_config(deepspeed_config) or {}).get(LAYER_REDUCTION, {}))
    if not block:
        raise ConfigError([Problem(dotted(LAYER_REDUCTION), "absent", "a block that names teacher layers")])
    config = parse_config({LAYER_REDUCTION: {**block, "enabled": True}})
    reduce_layers(unwrapped(student_model), config, unwrapped(teacher_model), copy_parameters)


def check_deepspeed_config(config: Config) -> Mapping[str, Any]:
    """The config as a mapping; raises ConfigError where the old function raised ValueError (which it also is)."""
    return deepspeed_config(config)


def get_module_name(
    group_name: str,
    model: nn.Module,
    key_word: str,
    exist_module_name: set[str],
    mpu: Any = None,
    verbose: bool = True,
) -> tuple[list[str], set[str]]:
    """The Linear, Conv2d, Embedding and BatchNorm2d layers whose names `key_word` (re.search) reaches.

    Returns the names that are not in `exist_module_name` yet, in model order, and that set with them added. "*" is
    for every Linear and Conv2d, as in the JSON.

    Raises:
        ValueError: with `verbose`, a layer is in `exist_module_name` already.
    """
    names = []
    for name, module in model.named_modules():
        if not basic_layer.is_module_compressible(module, mpu) or not _reaches(key_word, name, module):
            continue
        if name not in exist_module_name:
            exist_module_name.add(name)
            names.append(name)
        elif verbose:
            raise ValueError(f"{name} is claimed twice: look at the modules of group {group_name}")
    return names, exist_module_name


def get_compress_methods(
    model: nn.Module, compress_methods: Mapping[str, Any], mpu: Any = None
) -> list[list[Any]]:
    """[names by pattern, related names by pattern, {technique: its settings}] of each group.

    `compress_methods`: what `get_compression_config` returns.
    """
    items = []
    for method, content in compress_methods.items():
        if method not in SHARED_KEYS:
            continue
        claimed: set[str] = set()
        for group_name, group in content[DIFFERENT_GROUPS].items():
            names, related = [], []
            patterns = group[DIFFERENT_GROUPS_MODULE_SCOPE]
            for position, pattern in enumerate(patterns):
                found, claimed = get_module_name(group_name, model, pattern, claimed, mpu)
                names.append(found)
                for others in (group[DIFFERENT_GROUPS_RELATED_MODULE_SCOPE] or ())[position : position + 1]:
                    related.append([get_module_name(group_name, model, r, set(), mpu)[0] for r in others])
            settings = {**group[DIFFERENT_GROUPS_PARAMETERS], **content[SHARED_PARAMETERS]}
            items.append([names, related, {method: settings}])
    return items


# -- shared with `helper` and `scheduler` ------------------------------------------------------------------------


def unwrapped(model: Any) -> nn.Module:
    """The model in an engine or a DistributedDataParallel."""
    inner: nn.Module = getattr(model, "module", model)
    return inner


def prepare(model: nn.Module, block: Mapping[str, Any], teacher: nn.Module | None = None) -> None:
    """Puts `model` under a run that waits for an engine or a scheduler; once, however often it is called."""
    run = run_of(model)
    if run is not None:
        if means_the_same(run.given, parse_config(block)):
            logger.info("ds_compress: the model is prepared already")
            return
        got = "a model that is under another block already"
        raise ConfigError([Problem(ROOT, got, "one block for one model", "give the same config everywhere")])
    run = prepare_model(model, parse_config(block), teacher)
    keep(model, run)
    basic_layer.mark_prepared(run)


def _refuse_model_parallel(mpu: Any) -> None:
    world_size = 1 if mpu is None else mpu.get_model_parallel_world_size()
    if world_size > 1:
        allowed = "1: layers that are split over processes cannot be compressed"
        raise ConfigError([Problem("mpu.get_model_parallel_world_size()", str(world_size), allowed)])


def _reaches(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern == EVERY_LAYER:
        return isinstance(module, nn.Linear | nn.Conv2d)
    return occurs(pattern, name)


__all__ = [
    "check_deepspeed_config",
    "get_compress_methods",
    "get_compression_config",
    "get_module_name",
    "init_compression",
    "redundancy_clean",
    "student_initialization",
]
