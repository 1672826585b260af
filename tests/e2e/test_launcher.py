"""Runs as a user would: through the `deepspeed` launcher, with a JSON file, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_compress.examples.launch import free_port
from tests.models import tiny_bert
from tests.multirank.common import ds_config
from tests.multirank.training import everything_block

_HERE = Path(__file__).parent


def launch(*command: str) -> str:
    """Runs the launcher that belongs to this interpreter, 2 ranks on a port of its own; returns its output."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    environment = os.environ | {"PYTHONPATH": str(_HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    environment = {
        k: v for k, v in environment.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    done = subprocess.run(
        [launcher, "--num_gpus", "2", "--master_port", str(free_port()), *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launcher")
    tiny_bert(seed=3, layers=4).save_pretrained(path / "teacher")
    return path


def written(path: Path, config: dict[str, Any]) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def test_one_import_and_one_json_do_everything(folder: Path) -> None:
    config = written(folder / "ds.json", ds_config(2, everything_block(str(folder / "teacher"))))
    output = folder / "imported"
    launch(str(_HERE / "import_script.py"), "--deepspeed_config", config, "--model", str(folder / "teacher"),
           "--output", str(output))  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert report["world_size"] == 2
    assert report["stages"] == [
        "activation_quantization",
        "distillation",
        "sparse_pruning",
        "weight_quantization",
    ]
    assert report["layers"] == 2
    assert report["metrics"]["sparse_pruning/sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_a_script_that_leaves_collectives_behind(folder: Path) -> None:
    """Run by itself it aborts nearly always: gloo threads meet an interpreter that has gone."""
    launch("--module", "ds_compress.run", str(_HERE / "pending_script.py"))


def test_a_script_that_nobody_may_edit(folder: Path) -> None:
    config = written(folder / "ds3.json", ds_config(3, everything_block(str(folder / "teacher"))))
    output = folder / "unedited"
    script = _HERE / "user_script.py"
    assert "import ds_compress" not in script.read_text()
    said = launch("--module", "ds_compress.run", str(script), "--deepspeed_config", config, "--model",
                  str(folder / "teacher"), "--output", str(output))  # fmt: skip
    # One of the two processes tells of the start and of the end, nobody having asked.
    for once in (
        "ds_compress: BertForSequenceClassification with ",
        "ds_compress:   sparse_pruning  ",
        "ds_compress: after 6 steps, all as planned: ",
        "ds_compress:   sparse_pruning/sparsity ",
        f"ds_compress: saved in {output}/global_step6; next: ds_compress export {output}/global_step6 ",
    ):
        assert said.count(once) == 1, (once, said)
    report = json.loads((output / "report.json").read_text())
    assert (report["script"], report["module"]) == (str(script), "__main__")
    assert report["world_size"] == 2
    assert report["layers"] == 2
    assert report["metrics"]["sparse_pruning/sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("stage", [3])  # others, and without our import: test_trainer.py
def test_hugging_face_trainer(folder: Path, stage: int) -> None:
    config = ds_config(stage, everything_block(str(folder / "teacher")))
    del config["train_micro_batch_size_per_gpu"]
    config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    config["optimizer"]["params"]["lr"] = "auto"
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    output = folder / f"trainer-{stage}"
    launch(str(_HERE / "trainer_script.py"), written(folder / f"hf{stage}.json", config), str(folder / "teacher"),
           str(output))  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert (report["world_size"], report["applied"], len(report["losses"])) == (2, 6, 6)
    assert report["metrics"]["distillation/logits"] > 0
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert loaded.config.num_hidden_layers == 2
    weight = loaded.bert.encoder.layer[1].intermediate.dense.weight
    assert int(weight.count_nonzero()) == weight.numel() // 2
    with torch.no_grad():
        assert loaded(input_ids=torch.arange(12).view(1, 12)).logits.isfinite().all()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_goes_on_after_its_engine_has_shrunk(folder: Path, stage: int) -> None:
    """The Trainer holds model, engine, optimizer and scheduler; all of them are other objects inside by then."""
    shared = {"enabled": True, "dense_ratio": 0.5, "schedule_offset": 3, "shrink_at_end_of_schedule": True}
    block = {key: {"shared_parameters": shared} for key in ("row_pruning", "depth_pruning")}
    config = ds_config(stage, block)
    config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    config["optimizer"]["params"]["lr"] = "auto"
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    output = folder / f"shrunk-{stage}"
    launch(str(_HERE / "trainer_script.py"), written(folder / f"shrunk{stage}.json", config),
           str(folder / "teacher"), str(output))  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert (report["applied"], len(report["losses"])) == (6, 6)
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert (loaded.config.num_hidden_layers, loaded.config.intermediate_size) == (2, 48)
    assert loaded.bert.encoder.layer[1].intermediate.dense.weight.shape == (48, 32)
