"""A checkpoint and its recipe, when a later version of the package has another one of the name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ds_compress
from ds_compress.config.recipes import catalog
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, train
from tests.single import init_single_process

SHORT = {"schedule_offset": 0, "schedule_offset_end": 2, "schedule_offset_stride": 1}


def config(recipe: str | None) -> dict[str, Any]:
    return ds_config(2, {"recipe": recipe, "sparse_pruning": {"shared_parameters": SHORT}})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    init_single_process()
    with engine_of(tiny_bert(), config("sparse")) as engine:
        train(engine, batches(3))
        engine.save_checkpoint(str(tmp_path / "run"), tag="t")
    return tmp_path / "run"


@pytest.fixture
def version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package in which "sparse" keeps a fifth."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for path in catalog.FOLDER.glob("*.json"):
        (folder / path.name).write_text(path.read_text())
    written = json.loads((folder / "sparse@1.json").read_text())
    written["compression_training"]["sparse_pruning"]["shared_parameters"]["dense_ratio"] = 0.2
    (folder / "sparse@2.json").write_text(json.dumps(written))
    monkeypatch.setattr(catalog, "FOLDER", folder)
    catalog._catalog.cache_clear()
    yield
    catalog._catalog.cache_clear()


def resumed(folder: Path, recipe: str | None) -> float:
    with engine_of(tiny_bert(), config(recipe)) as engine:
        engine.load_checkpoint(str(folder))
        train(engine, batches(1))
        return float(engine.compression.metrics()["sparse_pruning/sparsity"])


def test_a_later_version_is_refused_until_the_json_says_which(saved: Path, version_2: None) -> None:
    assert ds_compress.recipe("sparse")["sparse_pruning"]["shared_parameters"]["dense_ratio"] == 0.2
    with pytest.raises(ds_compress.CheckpointError, match='write "recipe": "sparse@1"'):
        resumed(saved, "sparse")
    assert resumed(saved, "sparse@1") == pytest.approx(0.5, abs=1e-3)


def test_an_export_of_it_takes_the_block_that_was_trained(
    saved: Path, version_2: None, tmp_path: Path
) -> None:
    report = ds_compress.export(saved, tmp_path / "out", check=False)
    block = json.loads((saved / "t" / "ds_compress" / "model.json").read_text())["compression_training"]
    assert block["sparse_pruning"]["shared_parameters"]["dense_ratio"] == 0.5 and report is not None
    assert ds_compress.parse_config(block).applied_recipe is None


def test_a_version_that_the_json_names_is_taken_with_a_warning(
    saved: Path, version_2: None, caplog: pytest.LogCaptureFixture
) -> None:
    resumed(saved, "sparse@2")
    assert any(
        'was trained with the recipe "sparse@1"; it goes on with "sparse@2"' in m for m in caplog.messages
    )


def test_the_same_version_says_nothing(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resumed(saved, "sparse") == pytest.approx(0.5, abs=1e-3)
    assert not any("goes on with" in message for message in caplog.messages)
