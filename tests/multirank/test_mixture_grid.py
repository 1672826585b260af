"""Mixtures with zeros, W4A16, FP8, fewer experts, fewer rows, and all at once, on ZeRO 0, 2, 3 and reloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.grids import in_turn
from tests.multirank import experts, mixture_grid
from tests.multirank.launch import run_ranks
from tests.multirank.mixture_grid import BLOCKS, QUANTIZED, STAGES
from tests.zoo.mixtures import ARCHITECTURES

NAMES = tuple(ARCHITECTURES)
CELLS = [
    (name, block)
    for number, name in enumerate(NAMES)
    for block in (*in_turn([block for block in BLOCKS if block != "all"], number), "all")
]
FUSED_ON_HUB = ("gpt_oss", "llama4", "granite_moe")
ONE_WIDTH = ("llama4", "hunyuan_moe", "jamba")
"""A shared expert, or a dense layer, has its size from the same key of the config, and keeps it here."""
NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LOADER = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
assert "ds_compress" not in sys.modules
ids = torch.load(sys.argv[2])
found = {}
for expected in sorted(Path(sys.argv[1]).glob("*/*/expected.pt")):
    folder = expected.parent
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float()
    wanted = torch.load(expected)
    difference = (logits - wanted).abs().max() / wanted.abs().max()
    found[f"{folder.parent.name} {folder.name}"] = [difference.item(), sorted(info["missing_keys"])]
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


@pytest.fixture(scope="module")
def grid(folder: Path) -> dict[Any, Any]:
    return run_ranks(
        2, "tests.multirank.mixture_grid:compressed", timeout_s=1200, cells=CELLS, folder=str(folder)
    )[0]


@pytest.fixture(scope="module")
def reloaded(grid: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """{"architecture block": (difference of logits over the largest, missing keys)} of a process of its own."""
    ids = tmp_path_factory.mktemp("ids") / "ids.pt"
    torch.save(experts.tokens(3, 10, seed=9), ids)
    command = [sys.executable, "-c", LOADER, str(folder), str(ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.split("FOUND")[1])
    return found


@pytest.mark.parametrize(("name", "block"), CELLS)
class TestGrid:
    def test_the_same_is_left_at_every_stage(self, grid: Any, name: str, block: str) -> None:
        first = grid[name, block, STAGES[0]]
        for other in (grid[name, block, stage] for stage in STAGES[1:]):
            assert other["kept"] == first["kept"]
            assert other["losses"] == pytest.approx(first["losses"], rel=1e-4)
            for weight, nonzero in first["nonzero"].items():
                assert torch.equal(nonzero, other["nonzero"][weight]), weight

    def test_removed_equals_masked(self, grid: Any, name: str, block: str) -> None:
        for result in (grid[name, block, stage] for stage in STAGES):
            largest = float(result["masked"].abs().max())
            torch.testing.assert_close(result["final"], result["masked"], rtol=0, atol=1e-5 * largest)

    def test_half_is_gone(self, grid: Any, name: str, block: str) -> None:
        result = grid[name, block, 3]
        if "sparse_pruning" in BLOCKS[block]:
            assert result["metrics"]["sparse_pruning/sparsity"] == pytest.approx(0.5, abs=2e-3)
        structured = {"expert_pruning", "row_pruning"} & BLOCKS[block].keys()
        assert bool(result["kept"]) == bool(structured)
        full = sum(p.numel() for p in mixture_grid.built(name).parameters())
        assert (result["parameters"] < full) == bool(structured)

    def test_stock_transformers_loads_it_or_it_is_refused_by_name(
        self, grid: Any, reloaded: dict[str, Any], name: str, block: str
    ) -> None:
        refused, reason = grid[name, block, 3]["refused"], _no_way(name, block)
        if reason is not None:
            assert reason in refused and ".experts." in refused
            return
        assert refused is None
        difference, missing = reloaded[f"{name} {block}"]
        assert not missing and difference < 1e-5

    def test_config_says_how_many_experts_there_are(self, grid: Any, name: str, block: str) -> None:
        before = mixture_grid.built(name).config.to_dict()
        now = grid[name, block, 3]["config"]
        known = [key for key in NUMBERS_OF_EXPERTS if key in before]
        share = 2 if "expert_pruning" in BLOCKS[block] else 1
        assert known and [now[key] * share for key in known] == [before[key] for key in known]


def _no_way(name: str, block: str) -> str | None:
    """What says that stock transformers cannot load it."""
    if name in ONE_WIDTH and "row_pruning" in BLOCKS[block]:
        return "would load another model"
    return "fused on the hub" if name in FUSED_ON_HUB and block in QUANTIZED else None
