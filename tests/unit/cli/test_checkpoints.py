"""`ds_compress universal`: what it says, and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_compress.cli import app
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


def saved(folder: Path, stage: int) -> Path:
    model = tiny_bert()
    with engine_of(model, ds_config(stage, pruning_block())) as engine:
        train(engine, batches(1))
        engine.save_checkpoint(str(folder))
    return folder


def test_a_checkpoint_becomes_universal_beside_itself(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", 2)
    result = CliRunner().invoke(app, ["universal", str(folder), str(folder)])
    assert result.exit_code == 0 and "load_universal" in result.output
    assert (folder / "latest").read_text() == "global_step1"
    assert (folder / "latest_universal").read_text() == "global_step1_universal"
    again = CliRunner().invoke(
        app, ["universal", str(folder / "global_step1_universal"), str(tmp_path / "out")]
    )
    assert again.exit_code == 2 and "universal already" in again.output


def test_stage_0_needs_no_conversion(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["universal", str(saved(tmp_path, 0)), str(tmp_path / "out")])
    assert result.exit_code == 2 and "loads as it is" in result.output
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
