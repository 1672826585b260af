"""Where DeepSpeed sends weights, and how quantized ones go instead: see `techniques.parameter_compression`.

| ZeRO | place |
|---|---|
| 1, 2, BF16_Optimizer | `all_gather_dp_groups`, a global of two modules, while our optimizer is in its `step` |
| 3 | `all_gather_coalesced` of each parameter |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.engine.patches import GLOBALS, Patches
from ds_compress.engine.zero import internals
from ds_compress.reduce.codec import BlockCodec, Codec, PlainCodec
from ds_compress.reduce.uncompressed import is_sent_uncompressed
from ds_compress.reduce.weight_deltas import ReplicatedWeights
from ds_compress.techniques.training_engine import WeightTransport

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def connect(engine: Any, block: ParameterCompressionConfig, codec: BlockCodec) -> WeightTransport:
    """Replaces the all-gathers of weights of `engine`."""
    way = _Fetches if internals.is_zero3(engine.optimizer) else _Copies
    return way(engine, block, codec)


class _Copies:
    """Stages 1 and 2."""

    _current: _Copies | None = None
    """The optimizer that is in its step now; the switch of `all_gather_dp_groups`."""

    def __init__(self, engine: Any, block: ParameterCompressionConfig, codec: BlockCodec) -> None:
        self._engine, self._wrapper, self._block, self._codec = engine, engine.optimizer, block, codec
        self.counts = {"quantized_elements": 0.0, "refreshes": 0.0}
        for module in internals.modules_with_all_gather():
            _switch_all_gather(module)
        self._patches = Patches()
        self._step = self._patches.install(self._wrapper, "step", self._step_and_gather)
        self.start()

    def close(self) -> None:
        self._patches.close()

    def start(self) -> None:
        """Begins with the copies as they are now, which have to be equal in all processes."""
        flats = internals.flat_16bit_groups(self._wrapper) or []
        groups = self._wrapper.real_dp_process_group
        self._weights = [
            ReplicatedWeights(
                flat, group, self._codec, self._block.chunk_elements(dist.get_world_size(group))
            )
            if flat.numel() >= self._block.min_elements and flat.dtype in _FLOATS
            else None
            for flat, group in zip(flats, groups, strict=True)
        ]

    def refresh(self) -> None:
        for weights, exact in zip(
            self._weights, internals.flat_master_partitions(self._wrapper), strict=True
        ):
            if weights is not None:
                weights.refresh(exact.data)
        self.counts["refreshes"] += 1

    def _step_and_gather(self, *args: Any, **kwargs: Any) -> Any:
        previous, _Copies._current = _Copies._current, self
        try:
            return self._step(*args, **kwargs)
        finally:
            _Copies._current = previous

    @torch.no_grad()
    def gather(
        self, partitions: Sequence[Any], groups: Sequence[Any], original: Callable[..., None], **settings: Any
    ) -> None:
        """In place of `all_gather_dp_groups`, for the groups of our optimizer."""
        masters = [master.data for master in internals.flat_master_partitions(self._wrapper)]
        exact = self._is_refresh(masters)
        for index, weights in enumerate(self._weights):
            if weights is None:
                flat = (internals.flat_16bit_groups(self._wrapper) or [])[index]
                original(
                    groups_flat=[flat],
                    partitioned_param_groups=[partitions[index]],
                    dp_process_group=[groups[index]],
                    **settings,
                )
            elif exact:
                weights.refresh(masters[index])
            else:
                weights.update(masters[index])
                self.counts["quantized_elements"] += weights.replicas.numel()
        self.counts["refreshes"] += exact

    def _is_refresh(self, masters: Sequence[torch.Tensor]) -> bool:
        """The same in every process."""
        step = self._engine.compression.applied_steps + 1  # the one that is being applied
        if step <= self._block.warmup_steps or step % self._block.refresh_interval == 0:
            return True
        zeros = any(
            weights.has_new_zeros(exact)
            for weights, exact in zip(self._weights, masters, strict=True)
            if weights is not None
        )
        flag = torch.tensor(float(zeros), device=self._engine.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, internals.data_parallel_group(self._engine))
        return bool(flag.item())


class _Fetches:
    """Stage 3."""

    def __init__(self, engine: Any, block: ParameterCompressionConfig, codec: BlockCodec) -> None:
        self._engine, self._block, self._codec = engine, block, codec
        self.counts = {"quantized_elements": 0.0}
        self._originals: dict[Any, Callable[..., Any]] = {}
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.dtype in _FLOATS:
                self._originals[parameter] = parameter.all_gather_coalesced
                parameter.all_gather_coalesced = self._gather

    def start(self) -> None:
        """Nobody keeps a copy."""

    def refresh(self) -> None:
        """Nobody keeps a copy."""

    def close(self) -> None:
        for parameter, original in self._originals.items():
            parameter.all_gather_coalesced = original

    def _gather(self, params: Any, safe_mode: bool = False, quantize: bool = False) -> Any:
        params = sorted(params, key=lambda p: p.ds_id)
        if quantize or not self._takes(params):
            original = next(self._originals[p] for p in params if p in self._originals)
            return original(params, safe_mode=safe_mode, quantize=quantize)
        return _Fetch(params, self._codec_of, self.counts)

    def _takes(self, params: Sequence[Any]) -> bool:
        return (
            self._engine.module.training
            and sum(p.ds_numel for p in params) >= self._block.min_elements
            and self._engine.compression.applied_steps >= self._block.warmup_steps
            and all(p.requires_grad and p.dtype in _FLOATS for p in params)
            and len({id(p.ds_process_group) for p in params}) == 1
        )

    def _codec_of(self, parameter: Any) -> Codec:
        small = parameter.ds_tensor.ds_numel < self._codec.block or is_sent_uncompressed(parameter.ds_shape)
        return PlainCodec(parameter.ds_tensor.dtype) if small or parameter.ds_persist else self._codec


class _Fetch:
    """The weights of some layers under way; `wait` makes them whole. What DeepSpeed's coordinator calls a handle."""

    def __init__(
        self, params: Sequence[Any], codec_of: Callable[[Any], Codec], counts: dict[str, float]
    ) -> None:
        self._params, self._codec_of = params, codec_of
        group = params[0].ds_process_group
        self._world_size, rank = dist.get_world_size(group), dist.get_rank(group)
        for parameter in params:
            internals.mark_in_flight(parameter)
        device = torch.device(internals.current_device())
        self._sizes = [codec_of(p).payload_bytes(p.ds_tensor.ds_numel) for p in params]
        self._sent = torch.zeros(sum(self._sizes), dtype=torch.uint8, device=device)
        for parameter, message in zip(params, self._sent.split(self._sizes), strict=True):
            # What lies behind the end of the parameter is not part of it, and may be anything.
            shard = parameter.ds_tensor
            owned = max(0, min(shard.ds_numel, parameter.ds_numel - rank * shard.ds_numel))
            values = torch.zeros(shard.ds_numel, dtype=shard.dtype, device=device)
            values[:owned] = shard.data.view(-1)[:owned]
            codec_of(parameter).encode(values, message)
            if isinstance(codec_of(parameter), BlockCodec):
                counts["quantized_elements"] += parameter.ds_numel
        self._received = self._sent.new_empty((self._world_size, self._sent.numel()))
        self._work = dist.all_gather_into_tensor(
            self._received.view(-1), self._sent, group=group, async_op=True
        )
        self._done = False

    def wait(self, handle_dependency: bool = True) -> None:
        if self._done:
            return
        self._work.wait()
        for parameter, messages in zip(self._params, self._received.split(self._sizes, dim=1), strict=True):
            shard = parameter.ds_tensor
            whole = torch.empty(
                self._world_size * shard.ds_numel, dtype=shard.dtype, device=self._received.device
            )
            for message, values in zip(messages, whole.split(shard.ds_numel), strict=True):
                self._codec_of(parameter).decode(message, values)
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            internals.mark_available(parameter)
        self._done = True


def _switch_all_gather(module: Any) -> None:
    """Once: the global asks whose step it is, and is DeepSpeed's own when it is nobody's of ours."""
    if GLOBALS.has(module, "all_gather_dp_groups"):
        return

    def all_gather_dp_groups(
        groups_flat: Any, partitioned_param_groups: Any, dp_process_group: Any, **settings: Any
    ) -> None:
        current = _Copies._current
        if current is None or groups_flat is not internals.flat_16bit_groups(current._wrapper):
            original(groups_flat, partitioned_param_groups, dp_process_group, **settings)
        else:
            current.gather(partitioned_param_groups, dp_process_group, original, **settings)

    original = GLOBALS.install(module, "all_gather_dp_groups", all_gather_dp_groups)
