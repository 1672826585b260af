"""The example of every block's page trains, and does what the page says that it does."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_compress import secure
from tests.docs.pages import DOCS
from tests.docs.training import STEPS, example_of, save_teacher, train_example
from tests.multirank.launch import run_ranks
from tests.single import init_single_process

ON_THE_WIRE = ["gradient_compression", "parameter_compression", "robust_reduction"]
"""Blocks that need several processes."""
WORKERS = 3

REACHED: dict[str, dict[str, float]] = {
    "sparse_pruning": {"sparse_pruning/sparsity": 0.5},
    "weight_quantization": {"weight_quantization/mean_bits": 8},
    "activation_quantization": {"activation_quantization/mean_bits": 8},
    "kv_cache": {"kv_cache/layers_with_range": 2.0, "weight_quantization/mean_bits": 8},
    "row_pruning": {"row_pruning/density": 0.5},
    "head_pruning": {"head_pruning/density": 0.5},
    "channel_pruning": {"channel_pruning/density": 0.5},
    "depth_pruning": {"depth_pruning/density": 4 / 6},
    "hidden_pruning": {"hidden_pruning/density": 0.75},
    "expert_pruning": {"expert_pruning/density": 0.5},
    "layer_reduction": {},
    "distillation": {},
    "security": {},
}
"""What the examples reach, by metric. No metric: see the test of its own."""


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_with_a_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    init_single_process()
    folder = tmp_path_factory.mktemp("blocks")
    save_teacher(folder / "path" / "to" / "teacher")
    (folder / "keys").mkdir()
    signer = secure.generate(folder / "keys" / "release")
    secure.sign(folder / "path" / "to" / "teacher", signer.private)
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def test_every_page_is_trained() -> None:
    pages = {page.stem for page in (DOCS / "blocks").glob("*.md")} - {"index"}
    assert pages == {*REACHED, *ON_THE_WIRE}


@pytest.mark.parametrize("block", REACHED)
def test_the_example_trains_and_reaches_what_it_asks_for(block: str) -> None:
    result = train_example(block, example_of(block))
    assert result["applied"] == STEPS
    assert all(map(math.isfinite, result["losses"]))
    assert {name: result["metrics"][name] for name in REACHED[block]} == pytest.approx(
        REACHED[block], abs=1e-3
    )
    if block in ("layer_reduction", "distillation"):
        assert result["layers"] == 3
    if block == "depth_pruning":
        assert result["layers"] == 4
    if block == "security":
        assert result["layers"] == 6 and result["metrics"]["distillation/logits"] > 0
    if block == "distillation":
        losses = {
            name: value for name, value in result["metrics"].items() if name.startswith("distillation/")
        }
        assert set(losses) == {"distillation/logits", "distillation/attention", "distillation/hidden"}
        assert all(value > 0 for value in losses.values())


def test_the_examples_between_processes_train() -> None:
    results = run_ranks(WORKERS, "tests.docs.training:train_examples", blocks=ON_THE_WIRE)
    for result in results:
        for block in ON_THE_WIRE:
            assert result[block]["applied"] == STEPS
            assert all(map(math.isfinite, result[block]["losses"]))
        sent = [
            [value for name, value in result[block]["metrics"].items() if name.endswith("quantized_elements")]
            for block in ("gradient_compression", "parameter_compression")
        ]
        assert [len(counts) for counts in sent] == [1, 2]  # gradients; gradients and weights
        assert all(value > 0 for counts in sent for value in counts)
    norms = [name for name in results[0]["robust_reduction"]["metrics"] if name.endswith("_norm")]
    assert len(norms) == WORKERS
