"""Guessed thresholds select what radix selection selects, at every step of any sequence and in any layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_compress.ops import bitmask
from ds_compress.select import moving, radix
from ds_compress.select.moving import Candidates, MovingThresholds
from tests.shard_ranks import RankShards, joined, run_ranks_of_shards
from tests.unit.select.test_radix import by_stable_sort

STEPS = 6


def candidates_of(values: torch.Tensor, magnitude: bool, competing: torch.Tensor | None = None) -> Candidates:
    return Candidates(lambda: (values, magnitude), competing)


def drifting(seed: int, numel: int, drift: float) -> list[torch.Tensor]:
    """Scores of successive steps: with ties, zeros of both signs, and jumps where `drift` is large."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(numel, generator=generator)
    scores[::7] = 0.25
    scores[::11] = -0.0
    steps = []
    for _ in range(STEPS):
        scores = scores + drift * torch.randn(numel, generator=generator) * (torch.arange(numel) % 3 > 0)
        steps.append(scores)
    return steps


@settings(deadline=None)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    together=st.booleans(),
    drift=st.sampled_from([0.0, 1e-4, 1e-2, 3.0]),
    magnitude=st.booleans(),
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_step_is_a_stable_sort(
    data: st.DataObject,
    sizes: list[int],
    together: bool,
    drift: float,
    magnitude: bool,
    nested: bool,
    seed: int,
) -> None:
    names = [f"w{i}" for i in range(len(sizes))]
    steps = dict(zip(names, (drifting(seed + i, n, drift) for i, n in enumerate(sizes)), strict=True))
    members = [tuple(names)] if together else [(name,) for name in names]
    total = {m: sum(len(steps[name][0]) for name in m) for m in members}
    density = sorted((data.draw(st.floats(0, 1)) for _ in range(STEPS)), reverse=True)
    full = {name: values[0] for name, values in steps.items()}
    cuts = data.draw(st.lists(st.integers(0, sum(sizes)), max_size=3))
    at_a_time = data.draw(st.sampled_from([1, 2, radix.GROUPS_AT_A_TIME]))

    def work(shards: RankShards) -> list[dict[str, torch.Tensor]]:
        thresholds, masks, results = MovingThresholds(), dict[str, torch.Tensor](), []
        for step in range(STEPS):
            candidates = {}
            for name, fragment in shards.fragments.items():
                values = steps[name][step][fragment.start : fragment.start + fragment.numel].clone()
                competing = masks.get(name) if nested else None
                candidates[name] = candidates_of(values, magnitude, competing)
            groups = [radix.SelectionGroup(m, int(density[step] * total[m])) for m in members]
            masks = dict(thresholds.select(candidates, groups, shards))
            results.append({n: bitmask.unpack(m, shards.fragments[n].numel) for n, m in masks.items()})
        return results

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(radix, "GROUPS_AT_A_TIME", at_a_time)
        parts = run_ranks_of_shards(full, cuts, work)
    before: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        masks = joined(full, [part[step] for part in parts])
        for group in members:
            scores = torch.cat([steps[name][step] for name in group])
            scores = scores.abs() if magnitude else scores
            if nested and before:
                scores = scores.where(torch.cat([before[name] for name in group]), torch.tensor(-1e30))
            expected = by_stable_sort(scores, int(density[step] * total[group]))
            assert torch.equal(torch.cat([masks[name] for name in group]), expected)
        before = masks


def test_a_slow_schedule_is_followed_by_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second selection is a guess already, and hardly one goes wrong: what is claimed of speed rests on it."""
    calls = []
    original = radix.find_cuts

    def counted(*args: object) -> object:
        calls.append(args)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(moving.radix, "find_cuts", counted)
    torch.manual_seed(0)
    scores, thresholds = torch.randn(40_000), MovingThresholds()

    def work(shards: RankShards) -> None:
        for step in range(60):
            values = scores + 1e-4 * step
            group = radix.SelectionGroup(("w",), 30_000 - 100 * step)
            ((_, packed),) = thresholds.select({"w": candidates_of(values, True)}, [group], shards)
            mask = bitmask.unpack(packed, 40_000)
            assert torch.equal(mask, by_stable_sort(values.abs(), group.num_kept))

    run_ranks_of_shards({"w": scores}, [], work)
    assert len(calls) <= 3


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_score_is_told_with_the_index_of_its_group(broken: float) -> None:
    thresholds = MovingThresholds()
    full = {"a": torch.rand(4000), "b": torch.rand(4000)}  # so many that the guess is right all the same
    groups = [radix.SelectionGroup((name,), 2000) for name in full]

    def work(shards: RankShards) -> tuple[int, ...]:
        dict(thresholds.select({n: candidates_of(v, False) for n, v in full.items()}, groups, shards))
        full["b"][7] = broken
        with pytest.raises(radix.NonFiniteScoresError) as caught:
            thresholds.select({n: candidates_of(v, False) for n, v in full.items()}, groups, shards)
        return caught.value.groups

    assert run_ranks_of_shards(full, [], work) == [(1,)]


def test_more_scores_inside_than_there_is_room_for() -> None:
    """Half of all scores are equal, and the threshold is among them: the guess is right, and of no use."""
    torch.manual_seed(0)
    scores, thresholds = torch.randn(40_000), MovingThresholds()
    scores[::2] = 0.5

    def work(shards: RankShards) -> None:
        for kept in (12_000, 11_900, 11_000, 9_000):
            group = radix.SelectionGroup(("w",), kept)
            ((_, packed),) = thresholds.select({"w": candidates_of(scores, False)}, [group], shards)
            assert torch.equal(bitmask.unpack(packed, 40_000), by_stable_sort(scores, kept))

    run_ranks_of_shards({"w": scores}, [], work)
