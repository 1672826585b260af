"""The key `compression_training`: accepted in every form once ds_compress is imported, refused loudly without it."""

from __future__ import annotations

import argparse
import base64
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest

import ds_compress
from ds_compress.engine import registration
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


def as_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    return {"config": config}


def as_path(config: dict[str, Any], path: Path) -> dict[str, Any]:
    path.write_text(json.dumps(config))
    return {"config": str(path)}


def as_config_params(config: dict[str, Any], path: Path) -> dict[str, Any]:
    return {"config_params": config}


def as_arguments(config: dict[str, Any], path: Path) -> dict[str, Any]:
    path.write_text(json.dumps(config))
    return {"args": argparse.Namespace(deepspeed_config=str(path), local_rank=0)}


@pytest.mark.parametrize("form", [as_config, as_path, as_config_params, as_arguments])
def test_every_call_form_attaches(form: Any, tmp_path: Path) -> None:
    config = ds_config(2, pruning_block())
    before = copy.deepcopy(config)
    model = tiny_bert()
    engine, optimizer, loader, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), **form(config, tmp_path / "ds.json")
    )
    assert engine.compression.plan.techniques.keys() == {"sparse_pruning"}
    assert (loader, scheduler) == (None, None)
    assert optimizer is engine.optimizer
    assert config == before
    engine.destroy()


def test_base64_as_the_launcher_of_accelerate_passes_it() -> None:
    text = base64.urlsafe_b64encode(json.dumps(ds_config(0, pruning_block())).encode()).decode()
    assert registration.read_config(text)["compression_training"] == pruning_block()  # type: ignore[index]
    assert registration.read_config("no such file and no base64 ***") is None


def test_without_a_block_nothing_is_touched() -> None:
    model = tiny_bert()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config(1))
    assert not hasattr(engine, "compression")
    assert engine._take_model_step.__func__ is deepspeed.DeepSpeedEngine._take_model_step
    assert "backward" not in vars(engine)
    assert "save_checkpoint" not in vars(engine)
    engine.destroy()


def test_the_callers_own_config_object_reaches_deepspeed_when_there_is_no_block() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = ds_config(0)
    assert DeepSpeedConfig(config)._param_dict is config


def test_a_bad_block_is_an_error_before_any_model_is_touched() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    block = pruning_block()
    block["sparse_pruning"]["shared_parameters"]["metod"] = "l1"
    with pytest.raises(ds_compress.ConfigError, match="method"):
        DeepSpeedConfig(ds_config(0, block))


def test_register_and_unregister_are_idempotent() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    wrapped = DeepSpeedConfig.__init__
    ds_compress.register()
    assert DeepSpeedConfig.__init__ is wrapped
    try:
        ds_compress.unregister()
        ds_compress.unregister()
        assert DeepSpeedConfig.__init__ is not wrapped
        with pytest.raises(Exception, match="compression_training"):
            DeepSpeedConfig(ds_config(0, pruning_block()))
    finally:
        ds_compress.register()


def test_deepspeed_without_our_import_refuses_the_key() -> None:
    script = (
        "import deepspeed.runtime.config as c\n"
        "try:\n    c.DeepSpeedConfig({'train_batch_size': 1, 'compression_training': {}})\n"
        "except c.DeepSpeedConfigError as e:\n    print('refused')"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "refused" in output


def test_an_engine_without_optimizer_is_left_alone() -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "compression_training": pruning_block()}
    engine, *_ = deepspeed.initialize(model=tiny_bert(), config=config)
    assert not hasattr(engine, "compression")


def test_a_disabled_block_trains_as_without_it() -> None:
    plain, disabled = tiny_bert(), tiny_bert()
    losses = []
    for model, block in (
        (plain, None),
        (disabled, {"sparse_pruning": {"shared_parameters": {"enabled": False}}}),
    ):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config(1, block)
        )
        losses.append(train(engine, batches(3)))
        engine.destroy()
    assert losses[0] == losses[1]
