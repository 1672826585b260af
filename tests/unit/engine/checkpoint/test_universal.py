"""Universal checkpoints: what DeepSpeed would convert wrong is refused; what is made is whole and exports alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.engine.checkpoint import universal
from ds_compress.engine.checkpoint.weights import read
from ds_compress.manifest import Manifest
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train, weight_quantization

pytestmark = pytest.mark.usefixtures("single_process")


def saved(folder: Path, stage: int = 2, block: dict[str, Any] | None = None, **config: Any) -> Path:
    with engine_of(tiny_bert(), ds_config(stage, block or pruning_block(), **config)) as engine:
        train(engine, batches(2))
        engine.save_checkpoint(str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("run"))


def engine_with(stage: int, **checkpoint: Any) -> Any:
    return engine_of(tiny_bert(5), ds_config(stage, pruning_block(), checkpoint=checkpoint))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_without_an_engine_are_those_of_the_checkpoint(stage: int, tmp_path: Path) -> None:
    block = {**pruning_block(), **weight_quantization(8, "encoder.layer", scales="static")}
    folder = saved(tmp_path / "run", stage, block)
    before = read(folder / "global_step2")
    after = read(ds_compress.to_universal(folder, tmp_path / "out"))
    assert set(before) == set(after)
    assert any("step_size" in name for name in after), "frozen ones are there on every stage"
    for name in before:
        assert torch.equal(before[name].contiguous().float(), after[name].contiguous().float()), name
    ds_compress.export(tmp_path / "out", tmp_path / "exported", check=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero": {"round_robin_gradients": True}}, "round_robin_gradients"),
        (
            {
                "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
                "zero_allow_untested_optimizer": True,
            },
            "momentum_buffer",
        ),
    ],
)
def test_what_deepspeed_cannot_convert_is_refused_in_words(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "run", **config)
    with pytest.raises(ds_compress.CheckpointError, match=words):
        ds_compress.to_universal(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_conversion_that_fails_leaves_what_was_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ds_compress.to_universal(checkpoint, tmp_path)
    before = Manifest.read(made)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(universal, "_write_rest", fail)
    with pytest.raises(OSError, match="No space"):
        ds_compress.to_universal(checkpoint, tmp_path)
    assert Manifest.read(made) == before
    assert {path.name for path in tmp_path.iterdir()} == {made.name, "latest_universal"}


def test_damage_is_found_before_and_after_the_conversion(checkpoint: Path, tmp_path: Path) -> None:
    made = ds_compress.to_universal(checkpoint, tmp_path)
    path = next(made.glob("zero/*query.weight/exp_avg.pt"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with engine_with(2, load_universal=True) as engine, pytest.raises(ds_compress.CheckpointError) as caught:
        engine.load_checkpoint(str(tmp_path))
    assert "exp_avg.pt" in str(caught.value)
    copied = tmp_path / "copy"
    shutil.copytree(checkpoint, copied)
    path = next(copied.glob("*/*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ds_compress.CheckpointError, match=path.name):
        ds_compress.to_universal(copied, tmp_path / "out")


class _Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/ds_compress_was_run"),)


def test_a_pickle_that_runs_code_is_not_converted(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(checkpoint, folder)
    path = next(folder.glob("*/mp_rank_00_model_states.pt"))
    torch.save({**torch.load(path, weights_only=False), "extra": _Payload()}, path)
    Manifest.of(path.parent, {}).write(path.parent)
    with pytest.raises(ds_compress.CheckpointError, match="more than data"):
        ds_compress.to_universal(folder, tmp_path / "out")
    assert not Path("/tmp/ds_compress_was_run").exists()


def test_a_load_that_would_load_nothing_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    ds_compress.to_universal(checkpoint, tmp_path)
    nothing = pytest.raises(ds_compress.CheckpointError, match="loads nothing on ZeRO stage 0")
    with engine_with(0, load_universal=True) as engine, nothing:
        engine.load_checkpoint(str(tmp_path))
    another = pytest.raises(ds_compress.CheckpointError, match="no universal checkpoint")
    with engine_with(2, load_universal=True) as engine, another:
        engine.load_checkpoint(str(checkpoint), tag="global_step2")


def test_a_folder_with_both_kinds_loads_each_by_its_own_name(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    ds_compress.to_universal(folder, folder)
    for universal_one in (False, True):
        with engine_with(2, load_universal=universal_one) as engine:
            path, _ = engine.load_checkpoint(str(folder))
            assert ("_universal" in path) is universal_one
            assert engine.compression.applied_steps == 2
