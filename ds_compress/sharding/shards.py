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

from ds_compress.sharding.fragment import Fragment, plain_fragments
from ds_compress.sharding.layer_shards import LayerShards


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
        self._layout = self._exchange_layout()

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

    def exclusive_prefix_sum(self, counts: torch.Tensor) -> torch.Tensor:
        """For each entry, the sum of `counts` over the ranks with *earlier* elements; int64, same shape."""
        if self._group is None:
            return torch.zeros_like(counts)
        size, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        table = torch.zeros((size, counts.numel()), dtype=torch.int64, device=self._device)
        table[rank] = counts.flatten().to(self._device)
        dist.all_reduce(table, group=self._group)
        return table[:rank].sum(0).view(counts.shape).to(counts.device)

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

    def _exchange_layout(self) -> dict[str, list[int]]:
        """{parameter name: start offsets of all its fragments}, the same in every process."""
        own = {name: f.start for name, f in self.fragments.items()}
        layout: dict[str, list[int]] = {}
        for starts in self.all_gather_object(own):
            for name, start in starts.items():
                layout.setdefault(name, []).append(start)
        return {name: sorted(starts) for name, starts in layout.items()}

    def exchange_halos(
        self, values: Mapping[str, torch.Tensor], block_row_numel: Mapping[str, int], numel: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """Extends each fragment to whole bands of `band_numel[name]` elements, asking others for the rest.

        `values[name]` is fp32, aligned with the fragment of `name`; parameters that this process does not
        hold may be absent, but `block_row_numel` and `numel` list every parameter, in the same order everywhere.
        The result covers every band that the fragment touches, its last one cut at the parameter's end.
        Bands that are whole already cost nothing; the others are summed from disjoint parts, so the result
        is exact and equal in every process that sees the band.
        """
        split = {
            name: sorted({start // block_row for start in self._layout.get(name, ()) if start % block_row})
            for name, block_row in block_row_numel.items()
        }
        offsets, total = {}, 0
        for name, block_rows in split.items():
            for index in block_rows:
                offsets[name, index] = total
                total += min(block_row_numel[name], numel[name] - index * block_row_numel[name])
        shared = torch.zeros(total, dtype=torch.float32)
        for name, own in values.items():
            fragment, block_row = self.fragments[name], block_row_numel[name]
            for index in split[name]:
                low = max(fragment.start, index * block_row)
                high = min(fragment.start + fragment.numel, (index + 1) * block_row)
                if low < high:
                    at = offsets[name, index] + low - index * block_row
                    shared[at : at + high - low] = own[low - fragment.start : high - fragment.start]
        if total:
            shared = self.sum(shared)
        return {
            name: self._extend(name, own, block_row_numel[name], numel[name], shared, offsets, split[name])
            for name, own in values.items()
        }

    def _extend(
        self,
        name: str,
        own: torch.Tensor,
        block_row: int,
        numel: int,
        shared: torch.Tensor,
        offsets: Mapping[tuple[str, int], int],
        split: Sequence[int],
    ) -> torch.Tensor:
        fragment = self.fragments[name]
        begin = fragment.start // block_row * block_row
        end = min(-(-(fragment.start + fragment.numel) // block_row) * block_row, numel)
        if (begin, end) == (fragment.start, fragment.start + fragment.numel):
            return own
        whole = own.new_zeros(end - begin)
        whole[fragment.start - begin : fragment.start - begin + fragment.numel] = own
        for index in split:
            low, high = index * block_row, min((index + 1) * block_row, numel)
            if begin <= low < end:
                at = offsets[name, index]
                whole[low - begin : high - begin] = shared[at : at + high - low].to(own.device)
        return whole
