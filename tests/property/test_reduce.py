"""The pure parts of a reduction, on any sizes and any values."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given

from ds_compress.reduce.codec import BlockCodec, PlainCodec
from ds_compress.reduce.nodes import Layout, UnevenNodesError
from ds_compress.reduce.pipeline import pipelined
from ds_compress.reduce.residuals import Residuals
from ds_compress.reduce.rules import COORDINATES, WEIGHTS
from ds_compress.reduce.slices import Segment, Slices, packed, packed_numel, unpack
from ds_compress.reduce.sorting import comparators, sort_rows_

sizes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=12)
floats = st.floats(-1e6, 1e6, width=32)


@given(sizes, st.integers(1, 50), st.sampled_from([1, 4, 32]))
def test_slices_have_every_element_once_at_its_owner(
    layout: list[tuple[int, int]], chunk_numel: int, alignment: int
) -> None:
    total = sum(size for _, size in layout)
    everything = torch.arange(1, total + 1)
    segments, begin = [], 0
    for owner, size in layout:
        segments.append(Segment(everything[begin : begin + size], owner, "w", begin))
        begin += size
    slices = Slices(segments, 4, chunk_numel * alignment, alignment)
    for owner in range(4):
        expected = [value for s in segments if s.owner == owner for value in s.values.tolist()]
        got: list[int] = []
        for chunk in range(slices.chunks):
            parts = slices.parts(owner, chunk)
            assert packed_numel(parts) <= chunk_numel * alignment
            for part in parts:
                assert part.values.tolist() == list(range(part.start + 1, part.start + part.numel + 1))
            flat = packed(parts) if parts else torch.empty(0)
            assert flat.numel() == packed_numel(parts)
            for block in flat.split(alignment):
                owners = {i for i, s in enumerate(segments) for v in s.values.tolist() if v in block.tolist()}
                assert len(owners) == bool(block.numel()), "a block has elements of one segment"
            assert [v for own in unpack(flat, parts) for v in own.tolist()] == [v for v in flat.tolist() if v]
            got += [value for value in flat.tolist() if value]
        assert got == expected


@given(st.integers(0, 20), st.integers(1, 5))
def test_a_pipeline_starts_and_finishes_everything_in_order(chunks: int, in_flight: int) -> None:
    events: list[tuple[str, int]] = []

    def start(chunk: int) -> int:
        events.append(("start", chunk))
        return chunk * chunk

    def finish(chunk: int, started: int) -> None:
        assert started == chunk * chunk
        events.append(("finish", chunk))

    pipelined(range(chunks), start, finish, in_flight)
    for kind in ("start", "finish"):
        assert [chunk for event, chunk in events if event == kind] == list(range(chunks))
    for position, (kind, chunk) in enumerate(events):
        under_way = [p for k, p in events[:position] if k == "start"]
        if kind == "start":
            assert len(under_way) - sum(k == "finish" for k, _ in events[:position]) < in_flight
        else:
            assert chunk in under_way


@given(st.lists(floats, max_size=700), st.sampled_from([8, 4]), st.sampled_from([32, 64, 512]))
def test_a_message_is_right_within_half_a_step_of_its_block(
    values: list[float], bits: int, block: int
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    codec = BlockCodec(bits, block)
    payload = torch.empty(codec.payload_bytes(x.numel()), dtype=torch.uint8)
    codec.encode(x, payload)
    back = torch.empty_like(x)
    codec.decode(payload, back)
    steps = 127 if bits == 8 else 7
    for own, read in zip(x.split(block), back.split(block), strict=True):
        if own.numel():
            assert float((own - read).abs().max()) <= 0.5001 * float(own.abs().max()) / steps + 2**-126


@given(st.lists(st.lists(floats, min_size=9, max_size=9), min_size=1, max_size=5))
def test_a_plain_sum_is_the_sum(rows: list[list[float]]) -> None:
    x = torch.tensor(rows)
    payloads = torch.stack([row.view(torch.uint8) for row in x])
    total = torch.empty(9)
    PlainCodec(torch.float32).sum(payloads, total, 0.5)
    torch.testing.assert_close(
        total.double(), x.double().sum(0) * 0.5, rtol=1e-5, atol=1e-6 * float(x.abs().sum())
    )


@given(st.integers(1, 8))
def test_the_network_sorts_zeros_and_ones_hence_everything(n: int) -> None:
    """Knuth's 0-1 principle: a network that sorts all 2^n rows of bits sorts anything."""
    rows = torch.tensor([[float(bits >> i & 1) for bits in range(2**n)] for i in range(n)])
    assert sort_rows_(rows.clone()).equal(rows.sort(0).values)
    assert all(low < high for low, high in comparators(n))


@given(st.integers(1, 10), st.integers(1, 40), st.integers(0, 1000))
def test_rows_are_sorted_whatever_their_number(n: int, m: int, seed: int) -> None:
    rows = torch.randn((n, m), generator=torch.Generator().manual_seed(seed))
    assert sort_rows_(rows.clone()).equal(rows.sort(0).values)


@given(st.integers(1, 9), st.integers(0, 1000), st.data())
def test_rules_lie_between_the_workers(n: int, seed: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (n - 1) // 2))
    rows = torch.randn((n, 33), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ordered = rows.sort(0).values
    for rule in COORDINATES.values():
        result = rule(rows.clone(), f)
        assert bool((result >= ordered[f] - 1e-12).all() and (result <= ordered[n - 1 - f] + 1e-12).all())
    for rule in WEIGHTS.values():
        weights = rule(rows @ rows.T)
        assert bool((weights >= 0).all()) and float(weights.sum()) <= 1 + 1e-12
        # The order of the workers does not matter.
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        shuffled = rows[order]
        torch.testing.assert_close(rule(shuffled @ shuffled.T) @ shuffled, weights @ rows)


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 100)), max_size=8), st.integers(0, 500))
def test_residuals_hold_the_last_value_of_every_element(stores: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    residuals, expected = Residuals(16), torch.zeros(300)
    for start, numel in stores:
        values = torch.randn(numel, generator=generator).bfloat16().float()
        residuals.store("w", start, values)
        expected[start : start + numel] = values
    assert residuals.load("w", 0, 300, torch.device("cpu")).equal(expected)
    residuals.rollback()
    assert residuals.load("w", 0, 300, torch.device("cpu")).count_nonzero() == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_every_process_has_one_local_rank_on_one_node(names: list[int]) -> None:
    counts = {names.count(name) for name in names}
    if len(counts) > 1:
        try:
            Layout.of([str(name) for name in names])
        except UnevenNodesError as error:
            assert "as many processes" in str(error)
        else:
            raise AssertionError("uneven nodes were accepted")
        return
    layout = Layout.of([str(name) for name in names])
    assert sorted(rank for ranks in layout.ranks for rank in ranks) == list(range(len(names)))
    assert layout.num_nodes * layout.ranks_per_node == len(names)
    for rank, name in enumerate(names):
        node, local_rank = layout.locate(rank)
        assert layout.ranks[node][local_rank] == rank
        assert names[layout.ranks[node][0]] == name


def test_special_values_reach_every_receiver() -> None:
    for special in (math.nan, math.inf, -math.inf):
        x = torch.ones(1024)
        x[700] = special
        for bits in (8, 4):
            codec = BlockCodec(bits, 512)
            payload = torch.empty((1, codec.payload_bytes(1024)), dtype=torch.uint8)
            codec.encode(x, payload[0])
            total = torch.empty(1024)
            codec.sum(payload, total, 1.0)
            assert bool(total[512:].isnan().all()) and bool((total[:512] == 1).all())
