"""Any layout of the same scores over processes gives the mask of one stable sort."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_compress.config import parse_config
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.targets import exact_ceil
from ds_compress.ops import bitmask
from ds_compress.select import radix
from ds_compress.select.patterns import BlockGrid
from ds_compress.select.schedules import DensitySchedule
from ds_compress.techniques.sparse_pruning import SparsePruning
from tests.shard_ranks import RankShards, joined, run_ranks_of_shards
from tests.unit.select.test_radix import by_stable_sort, select

scores = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0]),
    min_size=1,
    max_size=60,
)


@given(data=st.data(), values=st.lists(scores, min_size=1, max_size=3))
def test_selection_equals_a_stable_sort(data: st.DataObject, values: list[list[float]]) -> None:
    full = {f"w{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    total = sum(map(len, values))
    keep = data.draw(st.integers(0, total))
    cuts = data.draw(st.lists(st.integers(0, total), max_size=3))
    masks = select(full, cuts, [radix.SelectionGroup(tuple(full), keep)])
    expected = by_stable_sort(torch.cat(list(full.values())), keep)
    assert torch.equal(torch.cat(list(masks.values())), expected)


@given(
    data=st.data(),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**31),
)
def test_block_masks_do_not_depend_on_the_layout(
    data: st.DataObject, rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    full = {"w": torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))}
    grid = BlockGrid(rows, columns, *block)
    keep = data.draw(st.integers(0, grid.units))
    cuts = data.draw(st.lists(st.integers(0, rows * columns), max_size=4))
    at_a_time = data.draw(st.integers(1, 2 * rows * columns))

    def work(shards: RankShards) -> dict[str, torch.Tensor]:
        values = {n: f.values for n, f in shards.fragments.items()}
        block_rows, numels = {"w": grid.block_row_numel}, {"w": rows * columns}
        whole = (
            values if grid.is_elementwise else shards.exchange_halos(values, block_rows, numels, at_a_time)
        )
        whole_rows = full["w"].flatten().split(grid.block_row_numel)
        for name, fragment in shards.fragments.items():
            first = fragment.start // grid.block_row_numel
            last = (fragment.start + fragment.numel - 1) // grid.block_row_numel
            assert torch.equal(whole[name], torch.cat(whole_rows[first : last + 1]))
        scores = {}
        for name, fragment in shards.fragments.items():
            num_halo = 0 if fragment.start % grid.block_row_numel == 0 else grid.blocks_per_row
            keys = radix.sort_keys_(grid.block_scores(whole[name]).clone())
            scores[name] = radix.ParameterScores(partial(torch.clone, keys), num_halo)
        kept = dict(radix.select(scores, [radix.SelectionGroup(("w",), keep)], shards))
        begins = {n: f.start % grid.block_row_numel for n, f in shards.fragments.items()}
        return {
            n: grid.expand_block_mask(m, whole[n].numel())[begins[n] : begins[n] + shards.fragments[n].numel]
            for n, m in kept.items()
        }

    spread = joined(full, run_ranks_of_shards(full, cuts, work))["w"]
    alone = joined(full, run_ranks_of_shards(full, [], work))["w"]
    assert torch.equal(spread, alone)
    # The plain definition, in float64.
    b0, b1 = block
    means = {
        (i, j): float(full["w"][i : i + b0, j : j + b1].double().mean())
        for i in range(0, rows, b0)
        for j in range(0, columns, b1)
    }
    alive = [means[i, j] for i, j in means if alone[i, j]]
    dead = [means[i, j] for i, j in means if not alone[i, j]]
    assert len(alive) == keep
    assert not alive or not dead or min(alive) >= max(dead) - 1e-6


@settings(deadline=None)
@given(
    data=st.data(),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pattern=st.sampled_from(["unstructured", "2x3", "3x4", "2:4"]),
    scope=st.sampled_from(["layer", "global"]),
    regrowth=st.booleans(),
    temperature=st.sampled_from([0.01, 1.0, 40.0]),
    seed=st.integers(0, 2**256 - 1),
)
def test_random_masks_do_not_depend_on_the_layout(
    data: st.DataObject,
    blocks: tuple[int, int],
    pattern: str,
    scope: str,
    regrowth: bool,
    temperature: float,
    seed: int,
) -> None:
    model = nn.Sequential(*(nn.Linear(4 * b, 5 * b, bias=False) for b in blocks))
    with torch.no_grad():
        model[0].weight.flatten()[::3] = 0.0  # ties
    shared = {"enabled": True, "pattern": pattern, "scope": "layer" if pattern == "2:4" else scope}
    shared |= {} if pattern == "2:4" else {"dense_ratio": data.draw(st.sampled_from([0.1, 0.5, 0.9]))}
    shared |= {"regrowth": regrowth, "randomize": {"temperature": temperature, "seed": seed}}
    plan = resolve(model, parse_config({"sparse_pruning": {"shared_parameters": shared}}))
    full = {name: parameter.detach() for name, parameter in model.named_parameters()}
    cuts = data.draw(st.lists(st.integers(0, sum(t.numel() for t in full.values())), max_size=4))

    def work(shards: RankShards) -> dict[str, torch.Tensor]:
        technique = SparsePruning(plan.techniques["sparse_pruning"])
        technique.attach(shards)
        technique.update_masks(1)
        technique.on_update(shards.fragments.values())
        technique.update_masks(2)
        return {n: bitmask.unpack(mask, shards.fragments[n].numel) for n, mask in technique.masks.items()}

    spread = joined(full, run_ranks_of_shards(full, cuts, work))
    alone = joined(full, run_ranks_of_shards(full, [], work))
    for name, mask in alone.items():
        assert torch.equal(spread[name], mask)


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    kept=st.integers(1, 4),
    extra=st.integers(0, 4),
    t=st.booleans(),
)
def test_n_of_m_keeps_the_largest_of_every_group(
    rows: int, groups: int, kept: int, extra: int, t: bool
) -> None:
    size = kept + extra
    matrix = torch.randn(rows, groups * size)
    stored = matrix.t().contiguous() if t else matrix
    grid = BlockGrid.of(f"{kept}:{size}", tuple(stored.shape), transposed=t)
    mask = grid.n_of_m_mask(stored.flatten()).view(stored.shape)
    mask = mask.t() if t else mask
    cells, alive = matrix.view(-1, size), mask.reshape(-1, size)
    assert (alive.sum(1) == kept).all()
    assert grid.num_kept == int(mask.sum())
    for row, keep in zip(cells, alive, strict=True):
        assert extra == 0 or row[keep].min() >= row[~keep].max()


@given(st.integers(0, 2000), st.randoms())
def test_bits_survive_packing(numel: int, random: object) -> None:
    keep = torch.rand(numel) < 0.5
    assert torch.equal(bitmask.unpack(bitmask.pack(keep), numel), keep)


@given(st.integers(1, 999), st.integers(1, 10**12))
def test_kept_counts_are_those_of_the_written_decimal(thousandths: int, units: int) -> None:
    density = thousandths / 1000
    assert exact_ceil(density, units) == math.ceil(Fraction(thousandths, 1000) * units)


@given(
    shape=st.sampled_from(["linear", "cubic"]),
    begin=st.integers(0, 50),
    length=st.integers(1, 100),
    stride=st.integers(1, 20),
    target=st.floats(0.01, 1.0),
)
def test_density_falls_monotonically_to_the_target(
    shape: str, begin: int, length: int, stride: int, target: float
) -> None:
    schedule = DensitySchedule(shape, begin, begin + length, stride)
    densities = [schedule.density(step, target) for step in range(begin + length + 3)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(densities))
    assert densities[-1] == target
    assert schedule.is_due(begin + length, mask_may_change=False)
    assert not schedule.is_due(begin + length + 1, mask_may_change=True)
