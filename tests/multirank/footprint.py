"""What a training really sends and holds, counted for test_footprint.py: bytes of collectives and of live tensors."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ds_compress.engine.zero import internals
from ds_compress.reduce.nodes import NODE_VARIABLE
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of

SMALL = {"reduce_bucket_size": 150_000}
"""So that a model of 370,000 parameters has several buckets."""


def model() -> torch.nn.Module:
    """370,000 parameters."""
    return tiny_bert(hidden=128)


@dataclass
class Sent:
    """Bytes that one process sends. reduced: by all-reduce, reduce-scatter, all-to-all. gathered: by all-gather.
    leaving: of both, those to another node. collectives: how many there were."""

    reduced: float = 0.0
    gathered: float = 0.0
    leaving: float = 0.0
    collectives: float = 0.0


class Wire:
    """Counts collectives as `estimate.traffic` does: rings over the ranks in order, except an all-to-all."""

    def __init__(self, ranks_per_node: int) -> None:
        self.sum = Sent()
        self._per_node = ranks_per_node

    def ring(self, kind: str, group: Any, nbytes: float) -> None:
        """nbytes: to the next process of the ring."""
        ranks = dist.get_process_group_ranks(group)
        follower = (ranks.index(dist.get_rank()) + 1) % len(ranks)
        self.all_to_all(kind, group, {follower: nbytes})

    def all_to_all(self, kind: str, group: Any, nbytes: dict[int, float]) -> None:
        """nbytes: to each other process of the group."""
        ranks, node = dist.get_process_group_ranks(group), dist.get_rank() // self._per_node
        setattr(self.sum, kind, getattr(self.sum, kind) + sum(nbytes.values()))
        self.sum.leaving += sum(size for to, size in nbytes.items() if ranks[to] // self._per_node != node)
        self.sum.collectives += 1


@contextmanager
def counting(ranks_per_node: int) -> Iterator[Wire]:
    """Every collective goes through a method of `ProcessGroup`, whoever calls it; newer torch has other names."""
    wire = Wire(ranks_per_node)

    def reduced(group: Any, tensors: Any, *_: Any) -> None:
        size = group.size()
        wire.ring("reduced", group, 2 * (size - 1) / size * sum(t.nbytes for t in tensors))

    def gathered(group: Any, output: Any, given: Any, *_: Any) -> None:
        nbytes = given.nbytes if torch.is_tensor(given) else sum(t.nbytes for t in given)
        wire.ring("gathered", group, (group.size() - 1) * nbytes)

    def scattered(group: Any, output: Any, given: Any, *_: Any) -> None:
        wire.ring("reduced", group, (group.size() - 1) / group.size() * given.nbytes)

    def exchanged(group: Any, output: Any, given: Any, outs: Any, ins: Any, *_: Any) -> None:
        size, item = group.size(), given.element_size()
        sizes = [rows * item for rows in ins] if len(ins) else [given.nbytes / size] * size
        others = {peer: nbytes for peer, nbytes in enumerate(sizes) if peer != group.rank()}
        wire.all_to_all("reduced", group, others)

    counters = {
        "allreduce": reduced,
        "allgather": gathered,
        "all_gather_single": gathered,
        "_allgather_base": gathered,
        "reduce_scatter_single": scattered,
        "_reduce_scatter_base": scattered,
        "all_to_all_single": exchanged,
        "alltoall_base": exchanged,
    }
    # getattr would unwrap a method, which could not be put back then.
    originals = {name: vars(ProcessGroup)[name] for name in counters if name in vars(ProcessGroup)}

    def counted(name: str) -> Any:
        call = getattr(ProcessGroup, name)

        def method(group: Any, *args: Any, **kwargs: Any) -> Any:
            counters[name](group, *args)
            return call(group, *args, **kwargs)

        return method

    for name in originals:
        setattr(ProcessGroup, name, counted(name))
    try:
        yield wire
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON of a case: stage, and what differs from small buckets and bf16."""
    case = dict(case)
    case.pop("ranks_per_node", None)
    stage, block, dtype = case.pop("stage"), case.pop("block", None), case.pop("dtype", "bf16")
    return ds_config(stage, block, dtype, SMALL | case.pop("zero", {}), **case)


@contextmanager
def nodes_of(ranks_per_node: int | None) -> Iterator[None]:
    """As if so many processes shared a host; None: all do."""
    if ranks_per_node is None:
        yield
        return
    os.environ[NODE_VARIABLE] = f"node{dist.get_rank() // ranks_per_node}"
    try:
        yield
    finally:
        del os.environ[NODE_VARIABLE]


def step(engine: Any, data: Iterator[Any]) -> None:
    """One optimizer step."""
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(**next(data)).loss)
        engine.step()


def live() -> dict[int, int]:
    """Bytes by address of all storages on the CPU that some tensor of Python has."""
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def held(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each case the bytes that live between the fourth backward and its step, and of the parts that have names."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    found = {}
    for name, case in cases.items():
        gc.collect()
        before = live()
        with engine_of(model(), config_of(case)) as engine:
            data = batches(40, rank=dist.get_rank())
            for _ in range(3):
                step(engine, data)
            for micro in range(engine.gradient_accumulation_steps()):
                if micro:
                    engine.step()
                engine.backward(engine(**next(data)).loss)
            # A thread of gloo holds what it has sent for a moment longer.
            dist.barrier()
            time.sleep(0.1)
            gc.collect()
            made = {address: nbytes for address, nbytes in live().items() if address not in before}
            moments = [
                tensor.nbytes
                for optimizer in internals.torch_optimizers(engine)
                for state in optimizer.state.values()
                for tensor in state.values()
                if torch.is_tensor(tensor) and tensor.numel() > 1
            ]
            found[name] = {"total": sum(made.values()), "moments": sum(moments)}
            compression = getattr(engine, "compression", None)
            if compression is not None:
                found[name] |= _of_pruning(compression)
            engine.step()
    return found


def _of_pruning(compression: Any) -> dict[str, int]:
    pruning = compression.techniques.get("sparse_pruning")
    if pruning is None:
        return {}
    tensors = {"masks": pruning.masks, "latent": pruning.latent, "scores": pruning.score.tensors}
    return {kind: sum(t.nbytes for t in by_name.values()) for kind, by_name in tensors.items()}


def sent(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each case what this process sends in a step of a training that is under way, the mean of two."""
    deepspeed.utils.logger.setLevel(logging.ERROR)
    found = {}
    for name, case in cases.items():
        per_node = case.get("ranks_per_node")
        with nodes_of(per_node), engine_of(model(), config_of(case)) as engine:
            data = batches(20, rank=dist.get_rank())
            step(engine, data)
            step(engine, data)
            with counting(per_node or dist.get_world_size()) as wire:
                step(engine, data)
                step(engine, data)
        found[name] = {key: value / 2 for key, value in vars(wire.sum).items()}
    return found


def run(wire: dict[str, dict[str, Any]], memory: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both, in one launch."""
    return {"sent": sent(wire), "held": held(memory)}
