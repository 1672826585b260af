"""DeepSpeed's pickles are read as data: code in them does not run, and what scripts store beside is no code."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ds_compress
from ds_compress.engine.checkpoint.pickles import only_data
from ds_compress.errors import CheckpointError, ExportError
from ds_compress.manifest import Manifest
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.folder), 0o777, True)


def config(stage: int, **security: Any) -> dict[str, Any]:
    block = pruning_block("topk")
    return ds_config(stage, block | ({"security": security} if security else {}))


def poisoned(root: Path, pattern: str, payload: Any) -> None:
    """The newest checkpoint, with a payload in one file and a manifest that fits."""
    (path,) = (root / "tag").glob(f"{pattern}_states.pt")
    content = torch.load(path, weights_only=False)
    torch.save(content | {"poison": payload}, path)
    Manifest.of(root / "tag", {}).write(root / "tag")


@pytest.mark.parametrize(
    ("stage", "pattern"), [(0, "*model*"), (2, "*model*"), (2, "*optim*"), (3, "*optim*")]
)
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, stage: int, pattern: str) -> None:
    root, trace = tmp_path / "checkpoints", tmp_path / "it ran"
    with engine_of(tiny_bert(), config(stage)) as engine:
        train(engine, batches(1))
        engine.save_checkpoint(str(root), tag="tag")
    poisoned(root, pattern, Payload(trace))
    with (
        engine_of(tiny_bert(1), config(stage)) as engine,
        pytest.raises(CheckpointError, match=r"more than data.*makedirs.*trust_pickle"),
    ):
        engine.load_checkpoint(str(root))
    with pytest.raises(ExportError, match="more than data"):
        ds_compress.export(root, tmp_path / "out", check=False)
    assert not trace.exists()
    # Those who say so get what they asked for.
    with engine_of(tiny_bert(1), config(stage, verify="off", trust_pickle=True)) as engine:
        engine.load_checkpoint(str(root))
    assert trace.exists()
    trace.rmdir()
    ds_compress.export(root, tmp_path / "out", check=False, trust_pickle=True)
    assert trace.exists()


def test_what_scripts_store_beside_is_read(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    state: dict[str, Any] = {
        "numpy": np.random.get_state(),
        "generator": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
        "args": argparse.Namespace(lr=0.1, name="x"),
        "loss": np.float64(0.5),
        "history": np.arange(6.0).reshape(2, 3),
    }
    with engine_of(tiny_bert(), config(2)) as engine:
        train(engine, batches(1))
        engine.save_checkpoint(str(tmp_path), client_state=state)
    with engine_of(tiny_bert(1), config(2)) as engine:
        found = engine.load_checkpoint(str(tmp_path))[1]
    assert found["args"] == state["args"] and found["loss"] == state["loss"]
    assert np.array_equal(found["history"], state["history"])
    assert found["generator"] == state["generator"] and torch.equal(found["torch"], state["torch"])
    assert np.array_equal(found["numpy"][1], state["numpy"][1])


def test_the_environment_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "0"):
        if before is None:
            monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        else:
            monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", before)
        with pytest.raises(ZeroDivisionError), only_data(tmp_path):
            assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
            _ = 1 / 0
        assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
