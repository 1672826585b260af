"""The benchmark of removed experts: what it starts from, configs that the library accepts, and its means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ds_compress
from benchmarks import upcycle
from benchmarks.experts import METHODS, WHOLE, Run, exported, latencies, sizes, summary
from benchmarks.kept_runs import keep
from tests.models import tiny_llama


@pytest.mark.parametrize("method", METHODS)
def test_every_config_is_accepted(method: str) -> None:
    parsed = ds_compress.parse_config(Run(method, 0, 48).block())
    assert parsed.expert_pruning is not None and parsed.distillation is not None
    assert parsed.distillation.task_loss_weight == 0


def test_without_noise_the_mixture_computes_what_the_dense_model_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upcycle, "NOISE", 0.0)
    dense = tiny_llama().eval()
    mixture = upcycle.mixture_of(dense).eval()
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            mixture(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )
    assert upcycle.similarity(mixture) == pytest.approx(1.0, abs=1e-5)


def test_noise_makes_experts_differ() -> None:
    mixture = upcycle.mixture_of(tiny_llama())
    assert upcycle.similarity(mixture) == pytest.approx(1 / (1 + upcycle.NOISE**2), abs=0.02)


def test_active_parameters_are_those_of_the_chosen_experts() -> None:
    dense = tiny_llama()
    mixture = upcycle.mixture_of(dense)
    experts = sum(p.numel() for name, p in mixture.named_parameters() if ".experts." in name)
    found = sizes(mixture)
    rest = found["resident parameters"] - experts
    assert found["active parameters"] == rest + experts * upcycle.TOP_K / upcycle.EXPERTS


def test_means_are_over_the_seeds_that_are_finished(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    keep(tmp_path, WHOLE, {"perplexity": 10.0})
    keep(tmp_path, Run("reap", 0, 48).name, {"perplexity": 10.2})
    for seed, perplexity in ((0, 12.0), (1, 14.0)):
        keep(tmp_path, Run("random", seed, 48).name, {"perplexity": perplexity})
    runs = [Run("reap", 0, 48), Run("frequency", 0, 48), *(Run("random", seed, 48) for seed in range(3))]
    result = summary(tmp_path, runs)
    assert set(result) == {WHOLE, "reap", "random"}
    assert result["reap"]["perplexity, percent of the whole"] == pytest.approx(102.0)
    assert result["random"]["perplexity"] == 13.0 and result["random"]["seeds"] == 2.0
    assert result["random"]["perplexity, standard deviation"] == pytest.approx(2**0.5)


def test_latencies_are_of_the_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.smollm2.rows", lambda folder, name: torch.randint(3, 128, (2, 12)))
    for name in (WHOLE, "reap"):
        upcycle.mixture_of(tiny_llama()).save_pretrained(exported(tmp_path, name))
    found = latencies(tmp_path, [WHOLE, "reap"], tokens=(12, 1), rounds=2)
    assert found.keys() == {WHOLE, "reap"}
    assert all(set(f) == {"milliseconds of 12 tokens", "milliseconds of 1 token"} for f in found.values())
    assert all(value > 0 for figures in found.values() for value in figures.values())
