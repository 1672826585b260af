"""Bytes of gradients between processes: what `reduce.exchange`, `reduce.robust` and DeepSpeed's own reductions send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ds_compress.config.schema.gradient_compression import GradientCompressionConfig
from ds_compress.config.targets import Weight
from ds_compress.estimate.buckets import Bucket, Run, buckets
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.estimate.traffic import Collectives, Traffic
from ds_compress.ops.sizes import chunk_elements, payload_bytes
from ds_compress.reduce.lopsided import is_lopsided

_INNER_PRODUCT_BYTES = 8


@dataclass(frozen=True)
class GradientTraffic:
    """Of one step.

    compression: None: as they are. robust: whether a robust rule compares the gradients of all workers.
    """

    layout: RunLayout
    compression: GradientCompressionConfig | None = None
    robust: bool = False

    def of_step(self, weights: Sequence[Weight]) -> Traffic:
        """weights: that train, in the order of the model."""
        if self.layout.world_size == 1:
            return Traffic()
        parts = (self._of_bucket(bucket, weights[0].itemsize) for bucket in buckets(weights, self.layout))
        return sum(parts, Traffic()) * self.layout.reductions

    @property
    def _scatters(self) -> bool:
        layout = self.layout
        return layout.stage >= 1 and not layout.is_bf16_optimizer and not layout.reduces_whole

    def _of_bucket(self, bucket: Bucket, itemsize: int) -> Traffic:
        item = self.layout.wire_bytes or itemsize
        compressed = self.compression if self._quantizes(bucket) else None
        if self.robust:
            return self._robust(bucket, item, compressed)
        if compressed is None:
            return self._plain(bucket, item)
        of_owner = [0] * self.layout.world_size
        if self._scatters and self.layout.stage < 3:
            for run in bucket.runs:
                of_owner[run.owner] += run.numel
        if self._scatters and not is_lopsided(of_owner):
            return self._reduce_scatter(bucket, item, compressed)
        return self._all_reduce(bucket, item, compressed)

    def _quantizes(self, bucket: Bucket) -> bool:
        block = self.compression
        if block is None or bucket.numel < block.min_elements:
            return False
        return not (block.hierarchical and self.layout.nodes == 1 and self.layout.world_size > 1)

    @property
    def _collectives(self) -> Collectives:
        return Collectives(self.layout)

    def _plain(self, bucket: Bucket, item: int) -> Traffic:
        # Stages 1 and 2 all-reduce, too, and copy the slices of the owner out of the result.
        if self.layout.stage == 3:
            return self._collectives.reduce_scatter(bucket.numel * item)
        return self._collectives.all_reduce(bucket.numel * item)

    def _is_hierarchical(self, block: GradientCompressionConfig) -> bool:
        return block.hierarchical and self.layout.ranks_per_node > 1

    def _chunk(self, block: GradientCompressionConfig) -> int:
        """Elements of one slice that are sent at a time."""
        size = block.effective_block_size
        world = self.layout.world_size
        return max(1, block.chunk_elements(world) // world // size) * size

    def _reduce_scatter(self, bucket: Bucket, item: int, block: GradientCompressionConfig) -> Traffic:
        size, chunk = block.effective_block_size, self._chunk(block)
        quantized = [run for run in bucket.runs if not run.exact]
        exact = [run for run in bucket.runs if run.exact]
        blocks = sum(-(-run.numel // size) * run.count for run in quantized)
        lanes = [
            (blocks * payload_bytes(size, block.bits, size), _numel(quantized), _longest(quantized, size)),
            (_numel(exact) * item, _numel(exact), _longest(exact, 1)),
        ]
        traffic = Traffic()
        for payload, numel, longest in lanes:
            count = -(-longest // chunk)
            if self._is_hierarchical(block):
                layout = self.layout
                traffic += self._collectives.within_node(numel * item, count)
                traffic += self._collectives.between_nodes(payload / layout.ranks_per_node, count)
            else:
                traffic += self._collectives.all_to_all(payload, count)
        return traffic

    def _all_reduce(self, bucket: Bucket, item: int, block: GradientCompressionConfig) -> Traffic:
        world, size = self.layout.world_size, block.effective_block_size
        chunk = self._chunk(block) * world
        padded = sum(-(-run.numel // size) * size * run.count for run in bucket.runs if not run.exact)
        full, rest = divmod(padded, chunk)
        traffic = self._exchange(chunk, item, block) * full
        if rest:
            traffic += self._exchange(rest, item, block)
        exact = _numel(run for run in bucket.runs if run.exact)
        return traffic + (self._collectives.all_reduce(exact * item) if exact else Traffic())

    def _exchange(self, numel: int, item: int, block: GradientCompressionConfig) -> Traffic:
        """One chunk of an all-reduce: every process gets its part from all, and sends the sum to all."""
        layout, collectives, size = self.layout, self._collectives, block.effective_block_size
        shard = -(-numel // (layout.world_size * size)) * size
        payloads = layout.world_size * payload_bytes(shard, block.bits, size)
        if not self._is_hierarchical(block):
            return collectives.all_to_all(payloads) + collectives.all_gather(payloads)
        between = collectives.between_nodes(payloads / layout.ranks_per_node)
        # The sums go the way back: as many bytes to the nodes, and all of them to every process.
        return collectives.within_node(numel * item) + between * 2 + collectives.within_node(payloads)

    def _robust(self, bucket: Bucket, item: int, block: GradientCompressionConfig | None) -> Traffic:
        world, collectives = self.layout.world_size, self._collectives
        quantized = [run for run in bucket.runs if block is not None and not run.exact]
        plain = [run for run in bucket.runs if block is None or run.exact]
        products = world**2 * _INNER_PRODUCT_BYTES
        traffic = collectives.all_to_all(products) + collectives.all_gather(products)
        if block is not None:
            size = block.effective_block_size
            blocks = sum(-(-run.numel // size) * run.count for run in quantized)
            count = self._count(quantized, self._chunk(block), size)
            traffic += collectives.all_to_all(blocks * payload_bytes(size, block.bits, size), count)
        of_all = chunk_elements(None, world, 8 * item) if block is None else block.chunk_elements(world)
        chunk = max(1, of_all // world)
        traffic += collectives.all_to_all(_numel(plain) * item, self._count(plain, chunk, 1))
        if not self._scatters:
            traffic += collectives.all_gather(-(-bucket.numel // world) * world * item)
        return traffic

    def _count(self, runs: Sequence[Run], chunk: int, size: int) -> int:
        """Chunks of the longest slice; of equal slices where every process gets everything."""
        world = self.layout.world_size
        longest = _longest(runs, size) if self._scatters else -(-_numel(runs) // world)
        return -(-longest // chunk)


def _numel(runs: Iterable[Run]) -> int:
    return sum(run.numel * run.count for run in runs)


def _longest(runs: Iterable[Run], alignment: int) -> int:
    """Elements of the longest slice, padded to `alignment`."""
    of_owner: dict[int, int] = {}
    for run in runs:
        of_owner[run.owner] = of_owner.get(run.owner, 0) + -(-run.numel // alignment) * alignment
    return max(of_owner.values(), default=0)
