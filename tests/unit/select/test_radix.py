from __future__ import annotations

from functools import partial

import pytest
import torch

from ds_compress.select import radix
from tests.shard_ranks import RankShards, joined, run_ranks_of_shards


def keys_of(scores: torch.Tensor) -> torch.Tensor:
    return radix.sort_keys_(scores.clone())


def scores_of(shards: RankShards) -> dict[str, radix.ParameterScores]:
    return {
        name: radix.ParameterScores(partial(keys_of, fragment.values))
        for name, fragment in shards.fragments.items()
    }


def select(
    full: dict[str, torch.Tensor], cuts: list[int], groups: list[radix.SelectionGroup]
) -> dict[str, torch.Tensor]:
    def work(shards: RankShards) -> dict[str, torch.Tensor]:
        return dict(radix.select(scores_of(shards), groups, shards))

    return joined(full, run_ranks_of_shards(full, cuts, work))


def by_stable_sort(scores: torch.Tensor, keep: int) -> torch.Tensor:
    order = (scores.flatten().double() + 0.0).argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask.view(scores.shape)


@pytest.mark.parametrize("keep", [0, 1, 500, 999, 1000])
@pytest.mark.parametrize(
    "scores",
    [
        torch.randn(1000, generator=torch.Generator().manual_seed(0)),
        torch.zeros(1000),
        torch.randint(-2, 3, (1000,), generator=torch.Generator().manual_seed(1)).float(),
        torch.linspace(-1e-42, 1e-42, 1000),
        torch.tensor([0.0, -0.0] * 500),
        torch.tensor([3e38, -3e38, 1e-38, -1e-38] * 250),
    ],
    ids=["normal", "zeros", "ties", "denormals", "signed zeros", "extremes"],
)
def test_equals_a_stable_sort(scores: torch.Tensor, keep: int) -> None:
    full = {"w": scores}
    mask = select(full, [300, 301, 777], [radix.SelectionGroup(("w",), keep)])["w"]
    assert torch.equal(mask, by_stable_sort(scores, keep))


def test_a_pool_spans_parameters_and_ties_go_to_the_first() -> None:
    full = {"a": torch.tensor([1.0, 2.0, 1.0]), "b": torch.tensor([1.0, 3.0])}
    masks = select(full, [2, 4], [radix.SelectionGroup(("a", "b"), 3)])
    assert masks["a"].tolist() == [True, True, False]
    assert masks["b"].tolist() == [False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -float("nan")])
def test_scores_that_are_not_finite_are_an_error_everywhere(bad: float) -> None:
    full = {"a": torch.ones(10), "b": torch.ones(10)}
    full["b"][9] = bad
    groups = [radix.SelectionGroup(("a",), 5), radix.SelectionGroup(("b",), 5)]
    with pytest.raises(radix.NonFiniteScoresError) as error:
        select(full, [10], groups)
    assert error.value.groups == (1,)


def test_many_groups_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    full = {str(i): torch.randint(-3, 4, (40 + i,), generator=generator).float() for i in range(7)}
    groups = [radix.SelectionGroup((str(i), str(i + 1)), 20 + i) for i in (0, 2, 4)]
    groups.append(radix.SelectionGroup(("6",), 13))
    at_once = select(full, [77, 130, 211], groups)
    monkeypatch.setattr(radix, "GROUPS_AT_A_TIME", 2)
    in_turns = select(full, [77, 130, 211], groups)
    assert all(torch.equal(mask, at_once[name]) for name, mask in in_turns.items()) and in_turns
    assert torch.equal(in_turns["6"], by_stable_sort(full["6"], 13))
    full["2"][3] = full["6"][0] = float("nan")
    with pytest.raises(radix.NonFiniteScoresError) as error:
        select(full, [77, 130, 211], groups)
    assert error.value.groups == (1, 3)


def test_the_largest_finite_score_is_not_taken_for_infinite() -> None:
    largest = torch.finfo(torch.float32).max
    full = {"w": torch.tensor([largest, -largest, 0.0])}
    assert select(full, [1], [radix.SelectionGroup(("w",), 1)])["w"].tolist() == [True, False, False]


@pytest.mark.parametrize("numel", [1000, 1_000_000])
def test_traffic_is_five_small_reductions_whatever_the_size(numel: int) -> None:
    def work(shards: RankShards) -> tuple[int, int]:
        radix.select(scores_of(shards), [radix.SelectionGroup(("w",), numel // 3)], shards)
        return shards.sums, shards.bytes

    for sums, total in run_ranks_of_shards({"w": torch.randint(0, 9, (numel,)).float()}, [numel // 2], work):
        assert sums <= 6
        assert total < 64 * 1024


def test_sort_keys_order_like_floats() -> None:
    values = torch.tensor([-float("inf"), -2.0, -1e-45, 0.0, 1e-45, 1.0, float("inf")])
    keys = keys_of(values)
    assert (keys[1:] > keys[:-1]).all()
    assert torch.equal(radix.sort_keys_(values.abs(), non_negative=True), keys_of(values.abs()))
