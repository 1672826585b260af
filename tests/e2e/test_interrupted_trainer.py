"""A Trainer that is killed in a save resumes from the checkpoint before it, without being told which."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from transformers import Trainer, TrainingArguments

from ds_compress.errors import CheckpointError
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, pruning_block

pytestmark = pytest.mark.usefixtures("single_process")
STEPS, EVERY = 6, 2


def trainer(folder: Path, seed: int = 0) -> Trainer:
    rows = [{k: v[0] for k, v in batch.items()} for batch in batches(STEPS, size=1)]
    config = ds_config(2, pruning_block("topk")) | {"train_micro_batch_size_per_gpu": 1}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=EVERY,
        per_device_train_batch_size=1,
        logging_steps=1,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        deepspeed=config,
    )
    return Trainer(model=tiny_bert(seed), args=arguments, train_dataset=rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).train()
    return folder


def damaged(whole: Path, folder: Path, what: str) -> Path:
    """As a kill in the save at step 4 leaves it; later checkpoints are not there."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    newest = folder / "checkpoint-4"
    match what:
        case "before the engine's part":
            shutil.rmtree(newest / "global_step4")
            (newest / "latest").unlink()
        case "in the engine's part":
            (newest / "global_step4" / "ds_compress" / "state.safetensors").unlink()
        case "before the Trainer's state":
            (newest / "trainer_state.json").unlink()
        case "in the Trainer's state":
            (newest / "trainer_state.json").write_text('{"epoch": 1')
        case "in the random state":
            path = next(newest.glob("rng_state*.pth"))
            path.write_bytes(path.read_bytes()[:-100])
    return folder


def losses(folder: Path) -> dict[int, float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


@pytest.mark.parametrize(
    "what",
    [
        "before the engine's part",
        "in the engine's part",
        "before the Trainer's state",
        "in the Trainer's state",
        "in the random state",
    ],
)
def test_the_newest_whole_checkpoint_is_taken(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    folder = damaged(whole, tmp_path / "run", what)
    with caplog.at_level(logging.WARNING, logger="ds_compress"):
        trainer(folder, seed=1).train(resume_from_checkpoint=True)
    assert "checkpoint-4" in caplog.text and f"resuming from {folder / 'checkpoint-2'}" in caplog.text
    assert losses(folder) == losses(whole)


def test_a_damaged_one_that_is_named_is_refused_and_the_other_offered(whole: Path, tmp_path: Path) -> None:
    folder = damaged(whole, tmp_path / "run", "in the engine's part")
    with pytest.raises(CheckpointError, match=r"state\.safetensors is missing.*checkpoint-2 has one"):
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_none_that_is_whole_is_an_error(whole: Path, tmp_path: Path) -> None:
    folder = damaged(whole, tmp_path / "run", "in the engine's part")
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        trainer(folder).train(resume_from_checkpoint=True)


def test_other_trainers_choose_as_before(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save({}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    choose: Any = transformers.trainer.get_last_checkpoint
    assert choose(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert choose(str(tmp_path / "checkpoint-2")) is None
