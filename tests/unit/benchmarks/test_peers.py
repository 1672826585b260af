"""The comparison with peers: its figures from made-up timings, and what a step of training is held to.

The environments of peers are not there; what runs in them is not run here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import encoder, environments, figures, training, training_inputs
from benchmarks.peers.jobs import JOBS
from benchmarks.timing import Timing


def timing(*milliseconds: float) -> Timing:
    """CPU times as given, and twice as much wall time."""
    return Timing([ms / 1e3 for ms in milliseconds], [2 * ms / 1e3 for ms in milliseconds])


TRAINING = {
    "ours, a step of 32 x 40": timing(5, 6, 7),
    "torch bf16 autocast, a step of 32 x 40": timing(2, 2, 2),
    "DeepSpeed fp32, a step of 32 x 40": timing(10, 12, 14),
    "torch fp32, a step of 32 x 40": timing(10, 10, 10),
}
LONG = "times as long as the fastest unquantized in fp32"


class TestFigures:
    def test_a_step_is_as_long_as_the_fastest_in_fp32_round_by_round(self) -> None:
        found = figures.figures_of(JOBS["training"], TRAINING, {})
        ours = found["ours, a step of 32 x 40"]
        assert ours == pytest.approx(
            {
                "CPU ms": 6,
                "wall ms": 12,
                LONG: 0.6,
                "times as long, lower quartile": 0.55,
                "times as long, upper quartile": 0.65,
            }
        )
        assert found["torch fp32, a step of 32 x 40"][LONG] == 1
        assert found["DeepSpeed fp32, a step of 32 x 40"][LONG] == pytest.approx(1.2)

    def test_the_fastest_come_first(self) -> None:
        found = figures.figures_of(JOBS["training"], TRAINING, {})
        names = [run.removesuffix(f", {training.SHAPE}") for run in found]
        assert names == ["torch bf16 autocast", "ours", "torch fp32", "DeepSpeed fp32"]

    def test_a_service_is_as_fast_as_the_best_of_any_kind_and_of_its_shape(self) -> None:
        timings = {
            "torch fp32, 32 x 40": timing(40, 40, 40),
            "torch bf16, 32 x 40": timing(20, 20, 20),
            "ours, 32 x 40": timing(10, 5, 10),
            "torch fp32, 1 x 40": timing(3, 3, 3),
            "ours, 1 x 40": timing(6, 6, 6),
        }
        found = figures.figures_of(JOBS["encoder"], timings, {"ours": {"bytes": 7.0}})
        fast = "times as fast as the best unquantized"
        assert found["ours, 32 x 40"][fast] == 2
        assert found["ours, 32 x 40"]["times as fast, upper quartile"] == 3
        assert found["ours, 1 x 40"][fast] == 0.5
        assert found["ours, 1 x 40"]["bytes"] == 7.0 and "bytes" not in found["torch fp32, 1 x 40"]
        assert len(found) == len(timings)

    def test_without_a_base_nothing_is_compared(self) -> None:
        found = figures.figures_of(JOBS["training"], {"ours, a step of 32 x 40": timing(5)}, {})
        assert found == {"ours, a step of 32 x 40": pytest.approx({"CPU ms": 5, "wall ms": 10})}

    def test_a_job_ignores_runs_of_another(self) -> None:
        assert figures.figures_of(JOBS["encoder"], TRAINING, {}) == {}

    @pytest.mark.parametrize("sizes", [{}, {"ours": {"bytes": 7e6}}])
    def test_the_table_has_a_row_each(self, sizes: dict[str, dict[str, float]]) -> None:
        found = figures.figures_of(JOBS["training"], TRAINING, sizes)
        shown = figures.table(JOBS["training"], found)
        assert shown.row_count == len(found)
        assert [column.header for column in shown.columns][-1] == ("MB" if sizes else "quartiles")


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_peer_has_a_file_and_a_pinned_environment(job: object) -> None:
    folder = Path(encoder.__file__).parent
    peers = JOBS["encoder"].peers if job is JOBS["encoder"] else JOBS["training"].peers
    for module, environment in peers.items():
        assert (folder / f"{module}.py").exists()
        assert environment == environments.OURS or environment in environments.PACKAGES


@pytest.mark.parametrize("name", ["training_ours", "training_torch"])
def test_peers_in_our_environment_can_be_imported(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.peers.{name}").main)


class TestChecked:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A model of one layer in place of the folder's, and its batch."""
        monkeypatch.setattr(training_inputs, "batch", lambda: {"x": torch.arange(6.0).reshape(2, 3)})
        monkeypatch.setattr(training_inputs, "model", Doubling)

    def test_falling_losses_pass(self) -> None:
        losses = iter((2.0, 1.0))
        name, step = training_inputs.checked("a", lambda: next(losses))
        assert name == f"a, {training.SHAPE}" and callable(step)

    @pytest.mark.parametrize("losses", [(1.0, 1.0), (1.0, 2.0), (1.0, float("nan")), (float("nan"), 1.0)])
    def test_losses_that_do_not_fall_are_an_error(self, losses: tuple[float, float]) -> None:
        given = iter(losses)
        with pytest.raises(RuntimeError, match="a: the loss does not fall"):
            training_inputs.checked("a", lambda: next(given))

    def test_a_model_that_computes_what_fp32_does_is_not_quantized(self) -> None:
        with pytest.raises(RuntimeError, match="a: nothing is quantized"):
            training_inputs.require_quantized("a", Doubling())
        training_inputs.require_quantized("a", Doubling(1e-3))

    def test_only_linear_layers_of_the_encoder_are_quantized(self) -> None:
        linear, norm = torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)
        assert training_inputs.is_quantized(linear, "bert.encoder.layer.0.output.dense")
        assert not training_inputs.is_quantized(norm, "bert.encoder.layer.0.output.LayerNorm")
        assert not training_inputs.is_quantized(linear, "bert.pooler.dense")


class Doubling:
    """logits = 2 x + error."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def __call__(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=2 * x + self.error)


def test_step_of_torch_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(3, 1)
    monkeypatch.setattr(training_inputs, "batch", lambda: {"x": torch.ones(4, 3)})

    def loss_of(x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=layer(x).square().mean())

    loss_of.parameters = layer.parameters  # type: ignore[attr-defined]
    step = training_inputs.torch_step(loss_of)
    first = step()
    assert step() < first
