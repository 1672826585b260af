"""What really leaves a host, by the counters of its network interface, in network namespaces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import netlab

pytestmark = pytest.mark.skipif(netlab.unavailable() is not None, reason=str(netlab.unavailable()))


@pytest.fixture(scope="module")
def sent() -> dict[str, dict[str, float]]:
    """Bytes per parameter and step by "stage, bits of gradients, bits of weights"."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with netlab.Lab(nodes=2) as lab:
        output = lab.run_all([sys.executable, "-m", "tests.e2e.wire_script"], 200, environment)
    (line,) = (line for line in output.splitlines() if line.startswith("RESULT "))
    found: dict[str, dict[str, float]] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_take_a_quarter_or_an_eighth_of_the_bytes(
    sent: dict[str, dict[str, float]], stage: int
) -> None:
    assert sent[f"{stage} None None"]["gradients"] == pytest.approx(2.0, rel=0.05)
    assert 0.49 < sent[f"{stage} 8 None"]["gradients"] <= 0.52
    assert 0.25 < sent[f"{stage} 4 None"]["gradients"] <= 0.27


def test_with_weights_compressed_too_zero_2_sends_less_than_a_third(
    sent: dict[str, dict[str, float]],
) -> None:
    stock = sent["2 None None"]["total"]
    assert stock == pytest.approx(3.0, rel=0.05)
    assert sent["2 4 8"]["total"] <= 0.30 * stock
    assert sent["2 8 4"]["total"] <= 0.30 * stock
    assert sent["2 8 8"]["total"] <= 0.35 * stock
