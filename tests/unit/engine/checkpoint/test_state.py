"""Faults around a checkpoint: nothing is lost, nothing is half loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

import ds_compress
from ds_compress.engine.checkpoint import plain_state, state
from ds_compress.engine.checkpoint.processes import Processes
from ds_compress.engine.checkpoint.stored_parts import StoredParts
from ds_compress.errors import CheckpointError, ExportError
from ds_compress.manifest import Manifest
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, full_weights, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


def make_engine(stage: int = 2, method: str = "topk", seed: int = 0) -> Any:
    model = tiny_bert(seed)
    config = ds_config(stage, pruning_block(method))
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def seal(folder: Path) -> None:
    """The files are what was written, says the manifest."""
    manifest = Manifest.read(folder)
    assert manifest is not None
    Manifest.of(folder, manifest.about).write(folder)


def test_files_appear_before_latest_points_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    train(engine, batches(2))
    engine.save_checkpoint(str(tmp_path))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "_write_fragments", killed)
    train(engine, batches(1))
    with pytest.raises(KeyboardInterrupt):
        engine.save_checkpoint(str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "global_step3").exists()
    engine.destroy()
    resumed = make_engine(seed=3)
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.compression.applied_steps == 2
    resumed.destroy()


def test_no_temporary_files_stay_behind(tmp_path: Path) -> None:
    engine = make_engine()
    train(engine, batches(2))
    engine.save_checkpoint(str(tmp_path), tag="here")
    assert sorted(os.listdir(tmp_path / "here" / "ds_compress")) == [
        "fragments_00000.safetensors",
        "model.json",
        "run.json",
        "state.safetensors",
    ]
    assert not list(tmp_path.glob(".*")) and sorted(os.listdir(tmp_path))[:2] == ["here", "latest"]
    engine.destroy()


def test_a_lost_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    engine = make_engine()
    train(engine, batches(2))
    engine.save_checkpoint(str(tmp_path), tag="t")
    (tmp_path / "t" / "ds_compress" / "fragments_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="fragments_00000"):
        engine.load_checkpoint(str(tmp_path), tag="t")
    engine.destroy()


def test_a_checkpoint_of_a_plain_run_starts_compression_from_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_bert()
    plain, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config(2))
    train(plain, batches(2))
    plain.save_checkpoint(str(tmp_path))
    plain.destroy()
    engine = make_engine()
    with caplog.at_level("WARNING", logger="ds_compress"):
        engine.load_checkpoint(str(tmp_path))
    assert "starts from step 0" in caplog.text
    assert engine.compression.applied_steps == 0
    train(engine, batches(2))
    assert engine.compression.metrics()["sparse_pruning/sparsity"] > 0.6
    engine.destroy()


def test_parts_of_another_layout_are_cut_and_joined(tmp_path: Path) -> None:
    """Global coordinates: what one process wrote whole, a fragment of it can read."""
    engine = make_engine(stage=0)
    train(engine, batches(3))
    session = engine.compression
    state.save(tmp_path, session, Processes(), lambda write: write())
    stored = StoredParts([tmp_path / "fragments_00000.safetensors"], session, Processes())
    name, fragment = next((n, f) for n, f in session.shards.fragments.items() if "query" in n)
    whole = stored.of_technique("sparse_pruning")

    class Piece:
        start, numel, values = 13, 100, fragment.values
        name = fragment.name

    for kind in ("mask", "score", "hidden", "exp_avg"):
        parts = stored._parts["sparse_pruning", kind][name]
        piece = stored._join(Piece, parts)
        assert torch.equal(piece, whole[kind][name][13:113])

    class Beyond(Piece):
        start = fragment.numel - 50

    with pytest.raises(CheckpointError, match="cover 50 of the 100"):
        stored._join(Beyond, stored._parts["sparse_pruning", "mask"][name])
    engine.destroy()


def test_loading_the_module_only_is_a_fresh_start(tmp_path: Path) -> None:
    engine = make_engine(stage=0, method="l1")
    train(engine, batches(3))
    weights = full_weights(engine.module)
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    fresh = make_engine(stage=0, method="l1", seed=4)
    fresh.load_checkpoint(str(tmp_path), load_module_only=True)
    assert fresh.compression.applied_steps == 0
    assert all(torch.equal(weights[k], v) for k, v in full_weights(fresh.module).items())
    fresh.destroy()


@pytest.mark.parametrize("where", ["latest", "state"])
def test_names_that_lead_out_of_the_checkpoint_are_refused(tmp_path: Path, where: str) -> None:
    engine = make_engine()
    train(engine, batches(2))
    engine.save_checkpoint(str(tmp_path / "here"), tag="tag")
    if where == "latest":
        (tmp_path / "here" / "tag").rename(tmp_path / "elsewhere")
        (tmp_path / "here" / "latest").write_text("../elsewhere")
    else:
        path = tmp_path / "here" / "tag" / "ds_compress" / state.STATE
        saved = plain_state.read(path)
        path.with_name("fragments_00000.safetensors").rename(tmp_path / "x.safetensors")
        plain_state.write(path, saved | {"files": ["../../../x.safetensors"]})
        seal(tmp_path / "here" / "tag")
    with pytest.raises(CheckpointError, match="is no file inside of"):
        engine.load_checkpoint(str(tmp_path / "here"))
    with pytest.raises(ExportError, match="is no file inside of"):
        ds_compress.export(tmp_path / "here", tmp_path / "out", model=tiny_bert(), check=False)
    engine.destroy()
