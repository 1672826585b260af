"""A trained model to export, wherever its weights are; sources of sharded models are made by the engine package."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.structure.pruning_plan import PruningPlan

Modules = Iterator[tuple[str, nn.Module]]


def _nothing(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure


def _itself(value: Any) -> Any:
    return value


@dataclass
class ExportSource:
    """model: for its modules, quantizers and config; its parameters may be sharded.

    modules: yields (name, module) of every module, whose own parameters are gathered until the next one. A collective
    where weights are sharded, as is `broadcast_error`: every process iterates over all of it. writes: whether this
    process writes. pruning_plan: masked units, which the export removes. broadcast_error: raises, in every process, the
    error of the writing one. changed: a context in which parameters have other values, by name. steps: applied
    optimizer steps, if known. export_to: the format that the block names. parameters: of the model at the start of
    training, if known. metrics: the last numbers of the techniques. commitments: hashes of
    their secret seeds. run_record: what the training was (`engine.record`), if known. tokenizer: that of a Trainer.
    share: broadcasts an object of the writing process. description: what the source is, for the report.
    """

    model: nn.Module
    modules: Callable[[], Modules]
    writes: bool = True
    pruning_plan: PruningPlan | None = None
    broadcast_error: Callable[[BaseException | None], None] = _nothing
    changed: Callable[[Mapping[str, torch.Tensor]], contextlib.AbstractContextManager[None]] = field(
        default=lambda values: contextlib.nullcontext()
    )
    steps: int | None = None
    export_to: str | None = None
    parameters: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    commitments: dict[str, str] = field(default_factory=dict)
    run_record: dict[str, Any] | None = None
    tokenizer: Any = None
    share: Callable[[Any], Any] = _itself
    description: str = "model"

    @property
    def config(self) -> Any:
        """The transformers config, None when it is no such model."""
        config = getattr(self.model, "config", None)
        return config if hasattr(config, "to_diff_dict") else None


def of_module(model: nn.Module) -> ExportSource:
    """A model that is not sharded."""

    @contextlib.contextmanager
    def changed(values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        parameters = {name: model.get_parameter(name) for name in values}
        before = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]

    exported = [(name, module) for name, module in model.named_modules() if not is_auxiliary(name)]
    return ExportSource(model, modules=lambda: iter(exported), changed=changed)
