"""What a technique sees of the distributed world: its fragments, a few reductions, and halos of its block rows.

A technique never learns how many processes there are or which one it runs in. It names parameters, gets the fragments
that this process owns, and calls reductions that are the identity when nothing is sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.sharding import halos
from ds_compress.sharding.fragment import Fragment, plain_fragments
from ds_compress.sharding.layer_shards import LayerShards

_TABLE_AT_MOST = 1 << 14
"""Numbers of all processes that each of them may receive at once, 128 KiB: one collective, where more takes two."""


class Shards:
    """Fragments of the parameters named in `names`, with the collectives over their common group.

    `device` is where collectives run (NCCL needs GPU tensors although offloaded masters live on the CPU).
    `layer_shards`: where its shards lie, when layers are sharded.
    """

    def __init__(
        self,
        fragments: Iterable[Fragment],
        data_parallel_group: Any,
        device: torch.device | str = "cpu",
        layer_shards: LayerShards | None = None,
    ) -> None:
        every = [layer_shards.place(f) if layer_shards is not None else f for f in fragments]
        self.fragments: dict[str, Fragment] = {f.name: f for f in every if f.numel > 0}
        self.frozen: tuple[Fragment, ...] = tuple(f for f in every if not f.has_optimizer)
        """Of all weights without a master, in model order, the same weights in every process; some may be empty."""
        self._dp_group = data_parallel_group
        self._device = torch.device(device)
        sharded = any(f.group is not None for f in self.fragments.values())
        if data_parallel_group is not None and dist.is_initialized():
            sharded = self._any(sharded)
        self._group = data_parallel_group if sharded else None
        if layer_shards is not None:
            self._group = layer_shards.shard_group(sharded)
        self.is_first_copy = sharded or data_parallel_group is None or dist.get_rank(data_parallel_group) == 0
        """Whether what this process holds has not been counted in another one."""

    @classmethod
    def of_model(cls, model: nn.Module) -> Shards:
        """The parameters themselves, whole in every process: a training loop without an engine, alone or in DDP."""
        fragments = list(plain_fragments(model))
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        return cls(fragments, group, fragments[0].values.device if fragments else "cpu")

    def select(self, names: Sequence[str]) -> dict[str, Fragment]:
        """The fragments of `names` that this process owns, in the order of `names`."""
        return {name: self.fragments[name] for name in names if name in self.fragments}

    @property
    def is_sharded(self) -> bool:
        """False when every process holds every weight whole."""
        return self._group is not None

    # -- reductions over the shard group -----------------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the shard group; unchanged when every process holds everything."""
        return self._reduce(tensor, dist.ReduceOp.SUM, self._group)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over the shard group."""
        return self._reduce(tensor, dist.ReduceOp.MAX, self._group)

    def exclusive_prefix_sum(self, counts: torch.Tensor) -> torch.Tensor:
        """For each entry, the sum of `counts` over the ranks with *earlier* elements; int64, same shape."""
        if self._group is None:
            return torch.zeros_like(counts)
        size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        own = counts.flatten().to(self._device, torch.int64)
        if size * own.numel() <= _TABLE_AT_MOST:
            table = own.new_empty((size, own.numel()))
            dist.all_gather_into_tensor(table.view(-1), own, group=self._group)
            before = table[:rank].sum(0)
        else:
            # Process i adds up the i-th share of the entries for all: nobody receives the counts of all processes.
            share = -(-own.numel() // size)
            mine = own.new_zeros(size * share)
            mine[: own.numel()] = own
            of_share = torch.empty_like(mine)
            dist.all_to_all_single(of_share, mine, group=self._group)
            of_share = of_share.view(size, share)
            dist.all_to_all_single(mine, (of_share.cumsum(0) - of_share).flatten(), group=self._group)
            before = mine[: own.numel()]
        return before.view(counts.shape).to(counts.device)

    # -- reductions over all data-parallel processes (each has seen other data) ------------------------

    def reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over all data-parallel processes."""
        return self._reduce(tensor, dist.ReduceOp.MAX, self._dp_group)

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all data-parallel processes, whoever holds the weights."""
        return self._reduce(tensor, dist.ReduceOp.SUM, self._dp_group)

    def all_gather_object(self, own: Any) -> list[Any]:
        """The objects of all ranks of the shard group, small and picklable; only the own one where nothing is."""
        if self._group is None:
            return [own]
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, own, group=self._group)
        return everyone

    def from_first_process(self, own: Any) -> Any:
        """The object of process 0 of all, small and picklable; a collective of every process."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return own
        held = [own]
        dist.broadcast_object_list(held, src=0, device=self._device)
        return held[0]

    def _any(self, flag: bool) -> bool:
        return bool(self.reduce_max(torch.tensor(int(flag))).item())

    def _reduce(self, tensor: torch.Tensor, op: Any, group: Any) -> torch.Tensor:
        if group is None or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return tensor
        result = tensor.detach().to(self._device, copy=True)
        dist.all_reduce(result, op=op, group=group)
        return result.to(tensor.device)

    # -- edges -------------------------------------------------------------------------------------

    def exchange_halos(
        self,
        values: Mapping[str, torch.Tensor],
        block_row_numel: Mapping[str, int],
        numel: Mapping[str, int],
        at_a_time: int = halos.AT_A_TIME,
    ) -> dict[str, torch.Tensor]:
        """Extends each fragment to whole block rows of `block_row_numel[name]` elements, asking others for the rest.

        `values[name]` is fp32, aligned with the fragment of `name`; parameters that this process does not
        hold may be absent, but `block_row_numel` and `numel` list every parameter, in the same order everywhere.
        The result covers every block row that the fragment touches, its last one cut at the parameter's end.
        Block rows that are whole already cost a flag; the others are summed from disjoint parts, so the result
        is exact and equal in every process that sees the block row. at_a_time: elements of the parameters, for which
        two collectives are made at a time.
        """
        if self._group is None:
            return dict(values)
        return halos.exchange(self.fragments, values, block_row_numel, numel, self.sum, self.max, at_a_time)
