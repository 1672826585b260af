"""AutoTP training: the processes of a tensor-parallel group hold different shards of a layer's weight.

AutoTP replaces modules and keeps the names of their parameters, so what a block means is worked out on the whole model
before, and masks need nothing but fragments. A sharded weight counts its elements shard by shard: the elements of
process r of the group follow those of the processes before it. Split by rows (`LinearLayer`) that is the usual order;
split by columns (`LinearAllreduce`) it is another one, which tells only where scores tie exactly.

Scores compare elements, so a selection reduces over all processes that hold parts: the tensor-parallel group, and the
data-parallel ones, too, where ZeRO spreads the masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.engine.zero import internals
from ds_compress.engine.zero.fragments import Fragment
from ds_compress.errors import ROOT, ConfigError, Problem, dotted, listed, shown
from ds_compress.modelinfo.inventory import few
from ds_compress.techniques.sparse_pruning import SparsePruning

if TYPE_CHECKING:
    from ds_compress.engine.run import CompressionRun

_SIZE = "tensor_parallel.autotp_size"
_METHODS = ("l1", "taylor", "movement", "snip_momentum")


@dataclass(frozen=True)
class TensorParallel:
    """The group of this process, and where its shard of each sharded parameter begins: {name: (start, whole numel)}."""

    group: Any
    places: Mapping[str, tuple[int, int]]

    @classmethod
    def of_engine(cls, engine: Any) -> TensorParallel | None:
        """None without tensor parallelism; a collective otherwise."""
        group = internals.tensor_parallel_group(engine)
        if group is None:
            return None
        own = {
            name: _numel(parameter)
            for name, parameter in engine.module.named_parameters()
            if internals.is_tensor_parallel_shard(parameter)
        }
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group=group)
        rank = dist.get_rank(group)
        before = {name: sum(numels[name] for numels in everyone[:rank]) for name in own}
        return cls(group, {name: (before[name], sum(numels[name] for numels in everyone)) for name in own})

    def start_of(self, name: str) -> int:
        """Where the shard of the parameter begins in the whole weight; 0 for one that is not sharded."""
        return self.places.get(name, (0, 0))[0]

    def placed(self, fragment: Fragment) -> Fragment:
        """The fragment of a shard, in the coordinates of the whole weight."""
        start = self.start_of(fragment.name)
        return replace(fragment, start=fragment.start + start) if start else fragment

    def shard_group(self, is_sharded_over_data: bool) -> Any:
        """The processes that together hold each element of each weight once."""
        return dist.group.WORLD if is_sharded_over_data else self.group


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def refuse_unsupported(run: CompressionRun, size: int) -> None:
    """Raises ConfigError for what compression cannot do while `size` processes share each layer."""
    problems = list(_unsupported(run)) if size > 1 else []
    if problems:
        raise ConfigError(problems)


def _unsupported(run: CompressionRun) -> Iterator[Problem]:
    hint = "or train without tensor parallelism, with ZeRO alone"
    others = [name for name, technique in run.techniques.items() if not isinstance(technique, SparsePruning)]
    reduction = run.config.layer_reduction
    if reduction is not None and reduction.enabled:
        others.append("layer_reduction")
    reasons = {
        name: "AutoTP replaces layers that fake quantization has changed by its own, which would drop it silently"
        for name in ("weight_quantization", "activation_quantization")
    }
    for name in others:
        reason = reasons.get(name, "it was not made for layers of which each process holds a shard")
        yield Problem(dotted(name), f"enabled beside {_SIZE}", "sparse_pruning alone", f"{reason}; {hint}")
    technique = run.techniques.get(SparsePruning.name)
    if not isinstance(technique, SparsePruning):
        return
    shared = run.plan.techniques[SparsePruning.name].shared
    if shared.method not in _METHODS:
        yield Problem(
            dotted(technique.name, "shared_parameters", "method"),
            f"{shown(shared.method)} beside {_SIZE}",
            listed(_METHODS),
            f"its numbers are drawn by the position in the whole weight; {hint}",
        )
    if any(not grid.is_elementwise for grid in technique.grids.values()):
        yield Problem(
            dotted(technique.name, "shared_parameters", "pattern"),
            f"{shown(shared.effective_pattern)} beside {_SIZE}",
            '"unstructured"',
            f"a block may lie across two processes; {hint}",
        )


def refuse_replicated(run: CompressionRun, shared: TensorParallel) -> None:
    """Raises ConfigError for pruned weights of which every process of the tensor-parallel group has all, or some."""
    whole = {weight.name: weight.numel for weight in run.plan.weights}
    masked = [name for technique in run.techniques.values() for name in technique.masked_weights()]
    wrong = [name for name in masked if shared.places.get(name, (0, 0))[1] != whole[name]]
    if wrong:
        raise ConfigError(
            [
                Problem(
                    f"{ROOT}.{SparsePruning.name}",
                    f"{few(wrong)}, which tensor parallelism leaves whole, or partly the same, in each process",
                    "weights that it shards",
                    "add them to shared_parameters.excluded_modules",
                )
            ]
        )


def require_full_layers(engine: Any, what: str) -> None:
    """Raises ValueError where a process would take its shards for the model."""
    if hasattr(engine, "autotp_size") and internals.tensor_parallel_group(engine) is not None:
        raise ValueError(
            f"{what}: AutoTP has sharded the layers of this engine; load ds_compress.export_state_dict(engine), the "
            "whole masked weights, into a model, and go on from that"
        )


def any_in_group(flag: bool, group: Any, device: torch.device) -> bool:
    """Whether `flag` is set in any process of the group."""
    told = torch.tensor(int(flag), device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    return bool(told.item())
