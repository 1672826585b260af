"""Gumbel top-k against drawing without replacement, as the papers define it."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch

from ds_compress.select.gumbel import PRUNED, GumbelNoise, commitment, ln
from ds_compress.select.units import global_counts, top_indices

TRIALS = 20_000


def probabilities_of_sets(scores: list[float], count: int, temperature: float) -> dict[frozenset[int], float]:
    """Of each set of `count` units, drawn one after the other with probability in proportion to score^(1/T)."""
    weights = [score ** (1 / temperature) for score in scores]
    found: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(len(scores)), count):
        probability, left = 1.0, sum(weights)
        for unit in order:
            probability *= weights[unit] / left
            left -= weights[unit]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + probability
    return found


def chi_square_is_plausible(observed: list[int], expected: list[float]) -> bool:
    """Whether chance alone is as far off in more than one of a million runs (Wilson & Hilferty 1931)."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(observed) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return z < 4.75


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("count", [1, 3])
def test_sets_are_drawn_without_replacement_in_proportion_to_scores(temperature: float, count: int) -> None:
    scores = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    noise = GumbelNoise("sparse_pruning", temperature, seed=7)
    keys = noise.perturbed(torch.tensor(scores).repeat(TRIALS), "w").view(TRIALS, -1)
    kept = keys.argsort(dim=1, descending=True)[:, :count].sort(dim=1).values
    observed: dict[frozenset[int], int] = {}
    for row in kept.tolist():
        observed[frozenset(row)] = observed.get(frozenset(row), 0) + 1
    expected = probabilities_of_sets(scores, count, temperature)
    likely = [units for units, p in expected.items() if p * TRIALS >= 5]
    rest = 1 - sum(expected[units] for units in likely)
    seen = [observed.get(units, 0) for units in likely]
    wanted = [expected[units] * TRIALS for units in likely]
    if rest * TRIALS >= 5:
        seen, wanted = [*seen, TRIALS - sum(seen)], [*wanted, rest * TRIALS]
    assert len(likely) > 2
    assert chi_square_is_plausible(seen, wanted)
    # The test has teeth: units drawn alike are not this distribution.
    uniform = [TRIALS / len(expected)] * len(likely) + [TRIALS * (1 - len(likely) / len(expected))]
    assert not chi_square_is_plausible(seen, [max(e, 1e-9) for e in uniform[: len(seen)]])


def test_the_noise_is_gumbel() -> None:
    noise = GumbelNoise("b", 1.0, seed=1).gumbel("w", 0, 1 << 20).double()
    edges = torch.linspace(-1.5, 6, 60, dtype=torch.float64)
    below = (noise[:, None] < edges).double().mean(0)
    assert float((below - torch.exp(-torch.exp(-edges))).abs().max()) < 2e-3


def test_an_element_has_the_same_noise_wherever_a_fragment_begins() -> None:
    noise = GumbelNoise("b", 0.7, seed=3)
    scores = torch.rand(70_001)
    full = noise.perturbed(scores, "w")
    for begin, end in ((0, 1), (1, 70_001), (12_345, 12_352), (32_767, 65_537), (69_999, 70_001)):
        assert torch.equal(noise.perturbed(scores[begin:end], "w", begin), full[begin:end])


def test_other_seeds_and_names_give_other_noise() -> None:
    drawn = [GumbelNoise("b", 1.0, seed).gumbel(name, 0, 8) for seed in (0, 1, 2**255) for name in ("v", "w")]
    assert len({tuple(noise.tolist()) for noise in drawn}) == 6


def test_the_logarithm() -> None:
    x = torch.cat([torch.logspace(-37.9, 38.5, 100_001), 1 - torch.arange(1, 5000) * 2.0**-24])
    exact = x.double().log()
    assert float(((ln(x).double() - exact) / exact).abs().max()) < 3e-7
    assert ln(torch.ones(1)).item() == 0


def test_zeros_are_kept_last_and_the_pruned_never() -> None:
    noise = GumbelNoise("b", 100.0, seed=5)
    scores = torch.tensor([0.0, 1e-30, PRUNED, 1e30, 0.0, torch.finfo(torch.float32).min]).repeat(500)
    order = scores[noise.perturbed(scores, "w").argsort(descending=True)]
    assert (order[:1000] > 0).all() and (order[1000:2000] == 0).all() and (order[2000:] <= PRUNED).all()
    assert noise.perturbed(scores, "w").isfinite().all()


def test_broken_scores_stay_visible() -> None:
    broken = GumbelNoise("b", 1.0, 0).perturbed(torch.tensor([1.0, math.nan, math.inf]), "w")
    assert broken.isfinite().tolist() == [True, False, False] and math.isnan(broken[1])


def test_groups_compete_with_their_noise_after_division_by_their_norm() -> None:
    torch.manual_seed(0)
    scores = [torch.rand(40), 1000 * torch.rand(40)]
    noise = [torch.randn(40) * 3, torch.randn(40) * 3 + 2]
    counts = global_counts(scores, 30, 1, noise)
    keys = torch.cat([(s / s.norm()).log() + z for s, z in zip(scores, noise, strict=True)])
    assert counts == torch.bincount(top_indices(keys, 30) // 40, minlength=2).tolist()
    assert counts != global_counts(scores, 30, 1)


class TestSecret:
    def test_it_is_drawn_once_and_comes_back(self) -> None:
        noise = GumbelNoise("b", 1.0, None)
        with pytest.raises(RuntimeError, match="drawn first"):
            noise.gumbel("w", 0, 1)
        assert noise.secret_seed is None
        noise.draw(lambda own: own)
        first = noise.secret_seed
        noise.draw(lambda own: own)
        assert noise.secret_seed == first and first is not None and len(first) == 64
        other = GumbelNoise("b", 1.0, None)
        other.draw(lambda own: own)
        assert other.secret_seed != first
        other.restore({"secret_seed": first})
        assert torch.equal(other.gumbel("w", 0, 9), noise.gumbel("w", 0, 9))
        # One that was revealed can be given in the JSON.
        assert torch.equal(GumbelNoise("b", 1.0, int(first, 16)).gumbel("w", 0, 9), noise.gumbel("w", 0, 9))

    def test_everybody_takes_that_of_the_first_process(self) -> None:
        noise = GumbelNoise("b", 1.0, None)
        noise.draw(lambda own: "ab" * 32)
        assert noise.secret_seed == "ab" * 32

    def test_a_seed_of_the_json_is_none(self) -> None:
        noise = GumbelNoise("b", 1.0, 5)
        noise.draw(lambda own: pytest.fail("nothing to draw"))
        noise.restore({"secret_seed": "ab" * 32})
        assert noise.secret_seed is None
        assert torch.equal(noise.gumbel("w", 0, 9), GumbelNoise("b", 1.0, 5).gumbel("w", 0, 9))

    def test_its_commitment_is_a_plain_hash(self) -> None:
        seed = "0123456789abcdef" * 4
        text = f"ds_compress row_pruning.randomize.seed {seed}"
        assert commitment("row_pruning", seed) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
        assert commitment("head_pruning", seed) != commitment("row_pruning", seed)
