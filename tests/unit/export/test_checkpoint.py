"""Exports from a checkpoint's folder: what must be there, and what is said when it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export.inputs import run
from ds_compress.export.load import from_pretrained
from ds_compress.manifest import FILE_NAME, Manifest
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, train
from tests.multirank.exporting import SCENARIOS
from tests.single import init_single_process

INPUTS = {
    "input_ids": torch.arange(3, 15).view(1, 12),
    "attention_mask": torch.ones(1, 12, dtype=torch.int64),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, torch.Tensor]]:
    """A checkpoint of a ZeRO-0 run with W8A8 and cuts, and the logits of the engine's own model."""
    init_single_process()
    folder = tmp_path_factory.mktemp("saved")
    with engine_of(tiny_bert(layers=4), ds_config(0, SCENARIOS["w8a8-cut"][1])) as engine:
        train(engine, batches(3))
        engine.save_checkpoint(str(folder), tag="here")
        yield folder, run(engine.module, INPUTS)


@pytest.fixture
def checkpoint(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoint"))


def test_computes_what_the_engine_did(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    export(saved[0], tmp_path / "out", "torch", embeddings="float")
    assert torch.allclose(run(from_pretrained(tmp_path / "out"), INPUTS), saved[1], atol=1e-4)


def test_a_tags_own_folder_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "latest").unlink()
    assert export(checkpoint / "here", tmp_path / "out", "torch", check=False).source == "checkpoint here"


def test_without_a_sidecar_the_model_must_be_given(checkpoint: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkpoint / "here" / "ds_compress")
    with pytest.raises(ExportError, match=r"ds_compress.* is missing"):
        export(checkpoint, tmp_path / "out")
    (checkpoint / "here" / FILE_NAME).unlink()
    with pytest.raises(ExportError, match=r"model\.json.*pass model="):
        export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out", model=tiny_bert(layers=4), check=False)
    with pytest.raises(ExportError, match="in the model"):
        export(checkpoint, tmp_path / "other", model=tiny_bert(layers=4, hidden=16), check=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("{", "damaged"),
        ("{}", "damaged"),
        (json.dumps({"format": 99}), "newer version"),
    ],
)
def test_damaged_description(checkpoint: Path, tmp_path: Path, damage: str, words: str) -> None:
    (checkpoint / "here" / "ds_compress" / "model.json").write_text(damage)
    with pytest.raises(ExportError, match=r"model\.json"):
        export(checkpoint, tmp_path / "out")
    Manifest.of(checkpoint / "here", {}).write(checkpoint / "here")
    with pytest.raises(ExportError, match=words):
        export(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("ds_compress/fragments_00000.safetensors", "fragments_00000"),
        ("mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt is missing"),
    ],
)
def test_missing_files_are_named(checkpoint: Path, tmp_path: Path, file: str, words: str) -> None:
    (checkpoint / "here" / file).unlink()
    with pytest.raises(ExportError, match=words):
        export(checkpoint, tmp_path / "out")


def test_damaged_state(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "here" / "ds_compress" / "state.safetensors").write_bytes(b"no")
    with pytest.raises(ExportError, match=r"state\.safetensors has 2 bytes instead of"):
        export(checkpoint, tmp_path / "out")
    Manifest.of(checkpoint / "here", {}).write(checkpoint / "here")
    with pytest.raises(ExportError, match=r"state\.safetensors is damaged"):
        export(checkpoint, tmp_path / "out")
