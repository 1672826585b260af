"""Thousands of processes without thousands: one of them alone, or few of them as threads.

`one_of` is a process of a group whose other members do not exist: collectives return at once, with values that mean
nothing. So it shows what a process sends, receives and allocates, and no results. `as_threads` runs all processes, and
shows the results.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg, multi_threaded_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.multirank.footprint import counting

ResultT = TypeVar("ResultT")


@dataclass
class Cost:
    """Of one process. sent: bytes. collectives: how many there were. peak: bytes of tensors that were made and lived at
    one time. result: what the work returned."""

    sent: float
    collectives: float
    peak: int
    result: Any = None


@contextmanager
def one_of(world_size: int, rank: int) -> Iterator[None]:
    """This process as one of so many that are not there; takes the place of the group that it is in."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def cost(work: Callable[[], Any]) -> Cost:
    """Of a call in one process of `one_of`."""
    with counting(dist.get_world_size()) as wire, _Peak() as memory:
        result = work()
    return Cost(wire.sum.reduced + wire.sum.gathered, wire.sum.collectives, memory.peak, result)


class _Peak(TorchDispatchMode):
    """Bytes of the storages that ops have made and that live, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if torch.is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._alive:
                    self._now += storage.nbytes()
                    forget = partial(self._forget, id(storage), storage.nbytes())
                    self._alive[id(storage)] = weakref.ref(storage, forget)
        self.peak = max(self.peak, self._now)
        return result

    def _forget(self, key: int, nbytes: int, _: Any) -> None:
        del self._alive[key]
        self._now -= nbytes


def as_threads(world_size: int, work: Callable[[int], ResultT]) -> list[ResultT]:
    """What `work(rank)` returns in each of so many threads, which are the processes of the default group meanwhile."""
    dist.destroy_process_group()
    multi_threaded_pg._install_threaded_pg()
    isolate: Any = vars(torch._C._distributed_c10d)["_set_thread_isolation_mode"]
    isolate(True)
    store = dist.HashStore()
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = work(rank)
        except BaseException as error:
            failures.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    isolate(False)
    multi_threaded_pg._uninstall_threaded_pg()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if failures:
        raise failures[0]
    return results
