"""`parameter_compression`: weights travel between processes as int8 or int4 values.

    "parameter_compression": {"enabled": true, "bits": 8, "refresh_interval": 100}

**Stages 1 and 2** (BF16_Optimizer too): after a step every process holds new fp32 weights of its own slice, and the
16-bit copies of all slices. What travels is the difference (see `reduce.weight_deltas`). Copies are equal in all
processes at any time, and exactly the rounded fp32 weights after a refresh: every `refresh_interval` steps, whenever a
weight has become zero (a new mask), and before a checkpoint, an export or the end of the compression. Between
refreshes they are within half a quantization step of them, and the fp32 weights, which the optimizer moves, are exact
always.

**Stage 3**: nobody keeps a copy, and a layer fetches its weights before its forward and its backward. While the
model trains they travel quantized themselves (ZeRO++'s qwZ, Wang et al. 2023, on any device): forward and backward see
weights rounded to 127 steps per block, zeros exactly. Small and one-dimensional parameters (see `reduce.uncompressed`),
those whose slice is shorter than a block, and those that DeepSpeed keeps between steps travel as they are, in the same
payload. In eval mode, and for whoever reads weights otherwise, they are exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.errors import Problem
from ds_compress.reduce.codec import BlockCodec
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.base import Technique, TechniqueContext, engine_only
from ds_compress.techniques.gradient_reduction import ALONE
from ds_compress.techniques.link_verdict import LinkVerdict, log_once
from ds_compress.techniques.training_engine import TrainingEngine, WeightTransport


class ParameterCompression(Technique):
    name = "parameter_compression"

    @classmethod
    def of(cls, context: TechniqueContext) -> ParameterCompression | None:
        block = context.config.parameter_compression
        return cls(block) if block is not None and block.enabled else None

    def __init__(self, block: ParameterCompressionConfig) -> None:
        self.block = block
        self._verdict = LinkVerdict(block.key, block.measure_link)
        self._engine: TrainingEngine | None = None
        self._transport: WeightTransport | None = None

    def follow(self, predecessor: Technique) -> None:
        if isinstance(predecessor, ParameterCompression):
            self._verdict.follow(predecessor._verdict)

    def attach_engine(self, engine: TrainingEngine) -> None:
        """Takes over the all-gathers of `engine`; a collective."""
        group = engine.data_parallel_group
        if dist.get_world_size(group) == 1:
            log_once(group, f"parameter_compression: {ALONE}", logging.WARNING)
            return
        self._engine = engine
        self._verdict.take(lambda: engine.compare_all_gathers(self._codec), group)
        self._use_verdict()

    @property
    def _codec(self) -> BlockCodec:
        return BlockCodec(self.block.bits, self.block.effective_block_size)

    def _use_verdict(self) -> None:
        """Quantizes from now on, or not; the same in every process, between two steps."""
        assert self._engine is not None
        if self._verdict.is_worthwhile and self._transport is None:
            self._transport = self._engine.quantize_weight_transport(self.block, self._codec)
        elif not self._verdict.is_worthwhile and self._transport is not None:
            self._transport.close()
            self._transport = None

    def attach(self, shards: Shards) -> None:
        # Called again when weights were loaded: what the other processes have is what is there now.
        if self._transport is not None:
            self._transport.start()

    def refresh(self) -> None:
        if self._transport is not None:
            self._transport.refresh()

    def detach(self) -> None:
        if self._transport is not None:
            self._transport.refresh()
            self._transport.close()
            self._transport = None

    def state_dict(self) -> dict[str, Any]:
        return {"link": self._verdict.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._engine is not None:
            # Weights were loaded just now: all copies are exact, and a transport begins or ends with them.
            self._verdict.restore(state.get("link"), self._engine.data_parallel_group)
            self._use_verdict()

    def without_engine(self) -> Iterator[Problem]:
        yield engine_only(self.name, "enabled", "true", "false")

    def metrics(self) -> dict[str, float]:
        return {} if self._transport is None else dict(self._transport.counts)
