"""The runs of the benchmark of formats: configs that the library accepts, and what is made of their figures."""

from __future__ import annotations

from pathlib import Path

import pytest

import ds_compress
from benchmarks.float_formats import all_runs, summary
from benchmarks.float_formats_runs import PLAIN, SCHEMES, Run
from benchmarks.kept_runs import finished, keep

RUNS = all_runs((0, 1), 48)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_config_is_accepted(run: Run) -> None:
    block = run.config().get("compression_training", {})
    parsed = ds_compress.parse_config(block)
    if run.method == "qad":
        assert parsed.distillation is not None and parsed.distillation.task_loss_weight == 0
    assert (run.scheme == PLAIN) == (not block)


def test_every_scheme_is_run_and_names_of_files_differ() -> None:
    assert {run.scheme for run in RUNS} == set(SCHEMES)
    assert len({run.name for run in RUNS}) == len(RUNS)


def test_what_is_recovered_comes_from_the_means_of_what_is_finished(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()

    def done(scheme: str, method: str, seed: int, perplexity: float, divergence: float) -> None:
        figures = {"perplexity": perplexity, "KL to the unquantized model": divergence}
        keep(tmp_path, Run(scheme, method, seed, 48).name, figures)

    done(PLAIN, "ptq", 0, 20.0, 0.0)
    done("NVFP4", "ptq", 0, 30.0, 0.4)
    done("NVFP4", "qad", 0, 21.0, 0.1)
    done("NVFP4", "qad", 1, 23.0, 0.3)
    result = summary(tmp_path, RUNS)
    assert set(result) == {f"{PLAIN}, ptq", "NVFP4, ptq", "NVFP4, qad"}
    trained = result["NVFP4, qad"]
    assert trained["perplexity"] == 22.0 and trained["seeds"] == 2.0
    assert trained["perplexity, percent recovered"] == pytest.approx(80.0)
    assert trained["KL to the unquantized model, percent recovered"] == pytest.approx(50.0)
    assert trained["perplexity, standard deviation"] == pytest.approx(2**0.5)
    assert "perplexity, percent recovered" not in result["NVFP4, ptq"]
    assert finished(tmp_path, Run("NVFP4", "qat", 0, 48).name) is None
