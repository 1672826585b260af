"""DeepSpeed's own constructor around a prepared model, in a form that can be run again on another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_compress.engine.run import CompressionRun
from ds_compress.engine.zero import internals, parameters


@dataclass(frozen=True)
class Construction:
    """How an engine was constructed.

    arguments: of the constructor, edited for the prepared model. constructor: DeepSpeed's own, which takes the engine
    first. client_groups: the parameters that the caller's optimizer had in each group before ZeRO flattened them.
    attach: what connects a run to an engine afterwards.
    """

    arguments: Mapping[str, Any]
    constructor: Callable[..., None]
    client_groups: list[list[nn.Parameter]]
    attach: Callable[[CompressionRun, Any], None]


def adopt(run: CompressionRun, arguments: dict[str, Any]) -> None:
    """Edits the constructor's arguments for the model that `run` has prepared."""
    internals.reduce_in_autocast_dtype(arguments["config_class"], run.model)
    internals.tag_parameters(arguments["config_class"], run.model, run.added)
    parameters.adopt_parameters(arguments, [*run.removed, *run.frozen], run.added)


def construct(
    run: CompressionRun,
    engine: Any,
    arguments: Mapping[str, Any],
    constructor: Callable[..., None],
    attach: Callable[[CompressionRun, Any], None],
) -> None:
    """Runs DeepSpeed's constructor on `engine`, and attaches `run` to it."""
    optimizer, listed = arguments["optimizer"], arguments["model_parameters"]
    if listed and isinstance(listed[0], dict):
        # The optimizer takes these dictionaries for its own, and ZeRO then puts flat tensors into them.
        listed = [{**group, "params": list(group["params"])} for group in listed]
    run.construction = Construction(
        {**arguments, "model_parameters": listed},
        constructor,
        [list(group["params"]) for group in getattr(optimizer, "param_groups", ())],
        attach,
    )
    with internals.groups_of_replaced_optimizers():
        constructor(engine, **arguments)
    attach(run, engine)
