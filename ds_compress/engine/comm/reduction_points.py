"""Where DeepSpeed reduces gradients, and how a `GradientReducer` of ours gets there.

| ZeRO | place | form |
|---|---|---|
| 0 | `DeepSpeedEngine.allreduce_bucket` | all-reduce |
| 1, BF16_Optimizer | the same: its norm wants the whole gradient everywhere | all-reduce |
| 1, 2 | `allreduce_and_copy_with_multiple_ranks`, below `average_tensor` | reduce-scatter of slices of any size |
| 1, 2, `reduce_scatter: false` | `gradient_reduction_w_predivide` | all-reduce |
| 1, 2, `contiguous_gradients: false`; Muon's matrices with several owners | `allreduce_bucket` | all-reduce |
| 3 | `reduce_scatter_coalesced`, below `__avg_scatter_grads` | reduce-scatter of equal slices |

Methods are replaced on the one engine or optimizer that compresses, never on a class; `reduce_scatter_coalesced` is a
global of its module, so there a switch is put in that is on only while our optimizer is inside
`__avg_scatter_grads`. What DeepSpeed divides by before or after it sums goes into one multiplier of an fp32 sum.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.engine.patches import GLOBALS, Patches
from ds_compress.engine.zero import internals
from ds_compress.reduce.slices import Part, Segment
from ds_compress.reduce.uncompressed import is_sent_uncompressed
from ds_compress.techniques.training_engine import GradientReducer


def connect(engine: Any, reduction: GradientReducer) -> Callable[[], None]:
    """Replaces the reductions of `engine`; returns what gives them back."""
    wrapper = engine.optimizer
    if internals.is_zero12(wrapper):
        return _Partitioned(engine, wrapper, reduction).undo
    if internals.is_zero3(wrapper):
        return _Sharded(engine, wrapper, reduction).undo
    return _Whole(engine, reduction).undo


@dataclass(frozen=True)
class _Run:
    """Elements that lie together in a bucket: those of one parameter from `start` on; see `Segment`."""

    key: str
    exact: bool
    numel: int
    start: int = 0


@dataclass(frozen=True)
class _Known:
    """What a reduction has to know of a parameter."""

    name: str
    exact: bool

    def run(self, numel: int, start: int = 0) -> _Run:
        return _Run(self.name, self.exact, numel, start)


def _known(module: torch.nn.Module) -> Mapping[int, _Known]:
    """By the id of the parameter."""
    return {
        id(p): _Known(name, is_sent_uncompressed(getattr(p, "ds_shape", p.shape)))
        for name, p in module.named_parameters()
    }


class _Whole:
    """Stage 0 and BF16_Optimizer: every process needs every gradient."""

    def __init__(self, engine: Any, reduction: GradientReducer) -> None:
        self._engine, self._reduction = engine, reduction
        self._known = _known(engine.module)
        self._patches = Patches()
        self._original = self._patches.install(engine, "allreduce_bucket", self._allreduce_bucket)
        self.undo = self._patches.close

    @torch.no_grad()
    def _allreduce_bucket(
        self, bucket: list[torch.Tensor], dp_group: Any, dp_world_size: Any = None
    ) -> torch.Tensor:
        numel = sum(tensor.numel() for tensor in bucket)
        if not self._reduction.handles(numel, bucket[0].dtype):
            return self._original(bucket, dp_group, dp_world_size)
        size = dist.get_world_size(dp_group) if dp_world_size is None else dp_world_size
        flat: torch.Tensor = self._engine.flatten(bucket)
        multiplier = 1 / size if self._engine.gradient_average else 1.0
        self._reduction.all_reduce(dp_group, self._segments(bucket, flat), multiplier)
        return flat

    def _segments(self, bucket: list[torch.Tensor], flat: torch.Tensor) -> list[Segment]:
        if not self._reduction.needs_keys:
            return [Segment(flat, 0)]
        gradients = sorted(self._gradients(), key=lambda gradient: gradient[0])
        addresses = [address for address, _, _ in gradients]
        runs: list[_Run] = []
        for tensor in bucket:
            at, end, size = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, tensor.element_size()
            for address, nbytes, known in gradients[bisect.bisect_left(addresses, at) :]:
                if address >= end:
                    break
                if address > at:
                    runs.append(_padding((address - at) // size))
                runs.append(known.run(nbytes // size))
                at = address + nbytes
            if at < end:
                runs.append(_padding((end - at) // size))
        return list(_cut(flat, 0, runs))

    def _gradients(self) -> Iterator[tuple[int, int, _Known]]:
        """(address, bytes, parameter) of every gradient."""
        wrapper = self._engine.optimizer
        if internals.is_bf16_optimizer(wrapper):
            for group, gradients in zip(wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True):
                for parameter, gradient in zip(group, gradients, strict=True):
                    yield gradient.data_ptr(), gradient.nbytes, self._known[id(parameter)]
            return
        for parameter in self._engine.module.parameters():
            if parameter.grad is not None:
                yield parameter.grad.data_ptr(), parameter.grad.nbytes, self._known[id(parameter)]


class _Partitioned:
    """Stages 1 and 2: of each bucket a process needs the slices of its own partition."""

    def __init__(self, engine: Any, wrapper: Any, reduction: GradientReducer) -> None:
        self._wrapper, self._reduction = wrapper, reduction
        self._known = _known(engine.module)
        self._bucket: tuple[torch.Tensor, torch.dtype] | None = None
        self._patches = Patches()
        self._average = self._patches.install(wrapper, "average_tensor", self._average_tensor)
        self._scatter = self._patches.install(
            wrapper, "allreduce_and_copy_with_multiple_ranks", self._reduce_slices
        )
        self._predivide = self._patches.install(wrapper, "gradient_reduction_w_predivide", self._reduce_whole)
        self._allreduce = self._patches.install(wrapper, "allreduce_bucket", self._allreduce_bucket)
        self.undo = self._patches.close

    def _average_tensor(self, tensor: torch.Tensor, communication_data_type: torch.dtype) -> None:
        self._bucket = (tensor, communication_data_type)
        try:
            self._average(tensor, communication_data_type)
        finally:
            self._bucket = None

    @torch.no_grad()
    def _reduce_slices(
        self,
        small_bucket: list[torch.Tensor],
        communication_data_type: torch.dtype,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
        bucket_ranks: Sequence[Any] = (),
        output_bucket: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        group = self._wrapper.dp_process_group if process_group is None else process_group
        owners = [_only_owner(ranks) for ranks in bucket_ranks]
        numel = sum(tensor.numel() for tensor in small_bucket)
        if None in owners or not self._reduction.handles(numel, small_bucket[0].dtype):
            self._scatter(
                small_bucket,
                communication_data_type,
                log=log,
                divide=divide,
                process_group=process_group,
                bucket_ranks=bucket_ranks,
                output_bucket=output_bucket,
            )
            return
        outputs = [None] * len(small_bucket) if output_bucket is None else output_bucket
        place: dict[Segment, tuple[int, torch.Tensor | None]] = {}
        for tensor, owner, output in zip(small_bucket, owners, outputs, strict=True):
            assert owner is not None
            offset = 0
            for segment in self._segments(tensor, owner):
                place[segment] = (offset, output)
                offset += segment.numel

        def deliver(part: Part, values: torch.Tensor) -> None:
            offset, output = place[part.segment]
            part.values.copy_(values)
            if output is not None:
                self._wrapper._add_to_grad_partition_buffer(
                    output.view(-1)[offset + part.begin : offset + part.end], values
                )

        self._reduction.reduce_scatter(
            group, list(place), deliver, self._multiplier(group) if divide else 1.0
        )

    @torch.no_grad()
    def _reduce_whole(self, tensor: torch.Tensor, communication_data_type: torch.dtype) -> torch.Tensor:
        if not tensor.numel() or not self._reduction.handles(tensor.numel(), tensor.dtype):
            reduced: torch.Tensor = self._predivide(tensor, communication_data_type)
            return reduced
        group = self._wrapper.dp_process_group
        self._reduction.all_reduce(group, self._segments(tensor, 0), self._multiplier(group))
        return tensor

    @torch.no_grad()
    def _allreduce_bucket(
        self,
        bucket: list[torch.Tensor],
        communication_data_type: torch.dtype,
        rank: int | None = None,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
    ) -> torch.Tensor:
        numel = sum(tensor.numel() for tensor in bucket)
        if rank is not None or not self._reduction.handles(numel, bucket[0].dtype):
            return self._allreduce(
                bucket,
                communication_data_type,
                rank=rank,
                log=log,
                divide=divide,
                process_group=process_group,
            )
        group = self._wrapper.dp_process_group if process_group is None else process_group
        flat: torch.Tensor = self._wrapper.flatten(bucket)
        segments = [Segment(flat, 0)]
        if self._reduction.needs_keys:
            segments = list(_cut(flat, 0, self._runs_of_bucket(bucket)))
        self._reduction.all_reduce(group, segments, self._multiplier(group) if divide else 1.0)
        return flat

    def _runs_of_bucket(self, bucket: Sequence[torch.Tensor]) -> Iterator[_Run]:
        """Of tensors that are pieces of the bucket in the making, or the gradients of parameters."""
        gradients = {} if self._bucket else self._gradients()
        for position, tensor in enumerate(bucket):
            known = gradients.get(tensor.data_ptr())
            if self._bucket is not None:
                yield from self._runs(tensor)
            elif known is not None:
                yield known.run(tensor.numel())
            else:
                yield _padding(tensor.numel(), position)

    def _gradients(self) -> dict[int, _Known]:
        """By address."""
        found = {}
        for group in self._wrapper.bit16_groups:
            for parameter in group:
                gradient = self._wrapper.get_gradient_for_reduction(parameter)
                if gradient is not None:
                    found[gradient.data_ptr()] = self._known[id(parameter)]
        return found

    def _multiplier(self, group: Any) -> float:
        if not self._wrapper.gradient_average:
            return 1.0
        return float(self._wrapper.sequence_parallel_size) / dist.get_world_size(group)

    def _segments(self, tensor: torch.Tensor, owner: int) -> list[Segment]:
        """A run of the bucket, cut where another parameter begins if that is of interest."""
        if not self._reduction.needs_keys or self._bucket is None:
            return [Segment(tensor, owner)]
        return list(_cut(tensor, owner, self._runs(tensor)))

    def _runs(self, tensor: torch.Tensor) -> Iterator[_Run]:
        """Of a piece of the bucket in the making; what is none, or of no parameter, is padding."""
        assert self._bucket is not None
        whole, dtype = self._bucket
        begin = (tensor.data_ptr() - whole.data_ptr()) // whole.element_size()
        end, at, done = begin + tensor.numel(), 0, 0
        for index, position, _ in self._wrapper.ipg_buckets[dtype].params:
            parameter = self._wrapper.bit16_groups[index][position]
            low, high = max(begin, at), min(end, at + parameter.numel())
            if low < high:
                yield self._known[id(parameter)].run(high - low, low - at)
                done += high - low
            at += parameter.numel()
        if done < tensor.numel():
            yield _padding(tensor.numel() - done)


class _Sharded:
    """Stage 3: of each gradient a process needs one of W equal slices."""

    _current: _Sharded | None = None
    """The optimizer that is averaging now; the switch of `reduce_scatter_coalesced`."""

    def __init__(self, engine: Any, wrapper: Any, reduction: GradientReducer) -> None:
        self._reduction = reduction
        self._known = _known(engine.module)
        self._parameters: list[Any] = []
        _switch_reduce_scatter_coalesced()
        self._patches = Patches()
        self._average = self._patches.install(wrapper, internals.AVERAGE_OF_STAGE_3, self._avg_scatter_grads)
        self.undo = self._patches.close

    def _avg_scatter_grads(self, params_to_reduce: list[Any], communication_data_type: torch.dtype) -> Any:
        previous, _Sharded._current = _Sharded._current, self
        self._parameters = params_to_reduce
        try:
            return self._average(params_to_reduce, communication_data_type)
        finally:
            _Sharded._current, self._parameters = previous, []

    @torch.no_grad()
    def reduce(
        self, tensors: list[torch.Tensor], group: Any, original: Callable[..., list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """In place of `reduce_scatter_coalesced`: fp32 slices of the mean."""
        if not self._reduction.handles(sum(tensor.numel() for tensor in tensors), tensors[0].dtype):
            return original(tensors, group)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        results: list[torch.Tensor] = []
        place: dict[Segment, torch.Tensor] = {}
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            flat, chunk = tensor.reshape(-1), -(-tensor.numel() // size)
            for owner in range(size):
                values = flat[owner * chunk : (owner + 1) * chunk]
                known = self._known.get(id(parameter), _Known("", False))
                segment = Segment(values, owner, known.name, owner * chunk, known.exact)
                if owner == rank:
                    results.append(torch.empty(values.numel(), device=values.device))
                    place[segment] = results[-1]
                else:
                    place[segment] = _NOT_OURS

        def deliver(part: Part, values: torch.Tensor) -> None:
            place[part.segment][part.begin : part.end] = values

        self._reduction.reduce_scatter(group, list(place), deliver, 1 / size)
        return results


_NOT_OURS = torch.empty(0)
_PADDING = "(padding)"


def _switch_reduce_scatter_coalesced() -> None:
    """Once: the global of stage3.py asks whose turn it is, and is DeepSpeed's own when it is nobody's."""
    from deepspeed.runtime.zero import stage3

    if GLOBALS.has(stage3, "reduce_scatter_coalesced"):
        return

    def reduce_scatter_coalesced(tensors: list[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
        current = _Sharded._current
        if current is None:
            scattered: list[torch.Tensor] = original(tensors, group)
            return scattered
        return current.reduce(tensors, group, original)

    original = GLOBALS.install(stage3, "reduce_scatter_coalesced", reduce_scatter_coalesced)


def _only_owner(ranks: Any) -> int | None:
    """The process that a slice is for; None when there are several."""
    if not isinstance(ranks, frozenset):
        return int(ranks)
    return next(iter(ranks)) if len(ranks) == 1 else None


def _padding(numel: int, position: int = 0) -> _Run:
    """What belongs to no parameter."""
    return _Run(f"{_PADDING} {position}", False, numel)


def _cut(tensor: torch.Tensor, owner: int, runs: Iterable[_Run]) -> Iterator[Segment]:
    """A flat tensor as the segments that `runs`, one after the other, make of it."""
    offset = 0
    for run in runs:
        yield Segment(tensor[offset : offset + run.numel], owner, run.key, run.start, run.exact)
        offset += run.numel
