"""Residuals of error feedback: kept in few bits, by element, undone with a skipped step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_compress.reduce.residuals import Residuals

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[8, 16])
def residuals(request: pytest.FixtureRequest) -> Residuals:
    return Residuals(request.param)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within half a step of 8 bits for values up to 4.5, twice: what is cut is stored anew."""
    assert float(b.abs().max()) < 4.5
    return float((a - b).abs().max()) <= 4.5 / 127


def test_what_was_stored_comes_back_within_its_bits(residuals: Residuals) -> None:
    values = torch.randn(1234)
    residuals.store("w", 100, values)
    assert close(residuals.load("w", 100, 1234, CPU), values)
    assert residuals.load("v", 0, 7, CPU).equal(torch.zeros(7))
    assert residuals.nbytes <= 1.03 * 1234 * residuals.bits / 8 + 520


def test_small_parameters_do_not_pay_for_large_blocks() -> None:
    residuals = Residuals(8)
    residuals.store("bias", 0, torch.randn(32))
    assert residuals.nbytes == 36


def test_runs_that_are_cut_otherwise_are_joined(residuals: Residuals) -> None:
    values = torch.randn(1000)
    residuals.store("w", 0, values[:300])
    residuals.store("w", 300, values[300:])
    assert close(residuals.load("w", 100, 600, CPU), values[100:700])
    changed = values.clone()
    changed[250:350] = torch.randn(100).clamp(-4, 4)
    residuals.store("w", 250, changed[250:350])
    assert close(residuals.load("w", 0, 1000, CPU), changed)
    assert close(residuals.load("w", 900, 200, CPU), torch.cat([changed[900:], torch.zeros(100)]))


def test_a_skipped_step_is_undone_an_applied_one_is_not(residuals: Residuals) -> None:
    values, other = torch.randn(600), torch.randn(600)
    residuals.store("w", 0, values)
    residuals.commit()
    residuals.store("w", 0, other)
    residuals.store("w", 100, other[:50])
    residuals.store("new", 0, other)
    residuals.rollback()
    assert close(residuals.load("w", 0, 600, CPU), values)
    assert residuals.load("new", 0, 600, CPU).count_nonzero() == 0
    residuals.store("w", 0, other)
    residuals.commit()
    residuals.rollback()
    assert close(residuals.load("w", 0, 600, CPU), other)


def test_a_new_loss_scale_rescales_what_is_stored(residuals: Residuals) -> None:
    values = torch.randn(600)
    residuals.store("w", 0, values, loss_scale=1024.0)
    assert close(residuals.load("w", 0, 600, CPU, loss_scale=512.0), values / 2)
    assert close(residuals.load("w", 10, 50, CPU, loss_scale=2048.0) / 2, values[10:60])
    assert close(residuals.load("w", 0, 600, CPU, loss_scale=1024.0), values)


def test_a_checkpoint_has_the_same_bits(residuals: Residuals) -> None:
    residuals.store("w", 3, torch.randn(700), loss_scale=4.0)
    residuals.store("w", 703, torch.randn(30), loss_scale=2.0)
    restored = Residuals(residuals.bits)
    for run, stored in residuals.state():
        restored.restore(run, stored.clone())
    assert restored.load("w", 3, 730, CPU).equal(residuals.load("w", 3, 730, CPU))


def stored(residuals: Residuals) -> list[dict[str, Any]]:
    """As a checkpoint gives it: tensors are read when they are asked for."""
    return [{"run": dict(run), "stored": lambda values=values: values} for run, values in residuals.state()]


def test_other_processes_go_on_with_the_mean_whatever_buckets_these_were(residuals: Residuals) -> None:
    """So the mean over all of them is what it was, for any number of processes."""
    theirs = [Residuals(residuals.bits) for _ in range(3)]
    values = torch.randn(3, 100)
    theirs[0].store("w", 0, values[0])
    theirs[1].store("w", 0, values[1, :60])
    theirs[1].store("w", 60, values[1, 60:])
    theirs[2].store("w", 0, values[2] * 8, loss_scale=8.0)
    theirs[2].store("v", 5, values[2, :7])
    for item in residuals.mean_of([stored(own) for own in theirs]):
        residuals.restore(item["run"], item["stored"])
    assert close(residuals.load("w", 0, 100, CPU), values.mean(0))
    assert residuals.covers("w", 0, 100) and not residuals.covers("w", 0, 101)
    assert close(residuals.load("v", 5, 7, CPU), values[2, :7] / 3), "the others lost nothing there"
    assert residuals.covers("v", 5, 7) and not residuals.covers("v", 4, 2)
