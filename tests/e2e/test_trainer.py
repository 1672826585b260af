"""Scripts for Hugging Face's Trainer that have never heard of ds_compress, and accelerate, on ZeRO 0, 2 and 3.

Through the launcher as a user would, and (launches are slow) all stages in the processes of one launch, where each is
compared with a plain DeepSpeed engine on the same batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ds_compress.engine.checkpoint import plain_state
from tests.e2e.test_launcher import launch
from tests.e2e.trainer_runs import SAVE_AT, SCRIPTS, STAGES, STEPS, command_line, json_of
from tests.multirank.launch import run_ranks

RUNS = [(script, stage) for script in SCRIPTS for stage in STAGES]
LOADERS = {"run_glue": AutoModelForSequenceClassification, "run_clm": AutoModelForCausalLM}
PRUNED = {"run_glue": 12, "run_clm": 14}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return run_ranks(2, "tests.e2e.trainer_runs:scripts", folder=str(folder))[0]


def losses_in(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def masked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The zeros of each weight that has many."""
    zeros = {name: weight == 0 for name, weight in weights.items() if weight.dim() == 2}
    return {name: mask for name, mask in zeros.items() if float(mask.float().mean()) > 0.4}


@pytest.mark.parametrize(("script", "stage"), RUNS)
def test_losses_are_those_of_the_plain_engine(plain: Any, folder: Path, script: str, stage: int) -> None:
    losses = losses_in(folder / f"{script}-{stage}")
    assert len(losses) == STEPS
    torch.testing.assert_close(losses, plain[script, stage]["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses, plain[script, 0]["losses"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("script", "stage"), RUNS)
def test_save_model_writes_what_stock_transformers_loads(
    plain: Any, folder: Path, script: str, stage: int
) -> None:
    model, info = LOADERS[script].from_pretrained(folder / f"{script}-{stage}", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if script == "run_glue":
        assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2
    weights = dict(model.named_parameters())
    masks, expected = masked(weights), masked(plain[script, stage]["weights"])
    assert masks.keys() == expected.keys()
    assert len(masks) == PRUNED[script]
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name
        assert int(mask.sum()) == mask.numel() // 2
        torch.testing.assert_close(weights[name], plain[script, stage]["weights"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("script", "stage"), RUNS)
def test_a_resumed_run_ends_as_the_unbroken_one(plain: Any, folder: Path, script: str, stage: int) -> None:
    whole, resumed = folder / f"{script}-{stage}", folder / f"{script}-{stage}-resumed"
    assert losses_in(resumed) == losses_in(whole)
    assert not (resumed / f"checkpoint-{SAVE_AT}").exists()
    for name, weight in load_file(whole / "model.safetensors").items():
        assert torch.equal(weight, load_file(resumed / "model.safetensors")[name]), name
    states = [
        plain_state.read(path / f"checkpoint-{STEPS}/global_step{STEPS}/ds_compress/state.safetensors")
        for path in (whole, resumed)
    ]
    assert states[0]["applied_steps"] == states[1]["applied_steps"] == STEPS
    assert states[0]["stages"]["sparse_pruning"] == states[1]["stages"]["sparse_pruning"]


@pytest.mark.parametrize(("script", "stage"), RUNS)
def test_the_script_evaluates(plain: Any, folder: Path, script: str, stage: int) -> None:
    results = json.loads((folder / f"{script}-{stage}" / "all_results.json").read_text())
    reference = json.loads((folder / f"{script}-0" / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(reference["eval_loss"], abs=1e-4)
    if script == "run_glue":
        assert 0 <= results["eval_accuracy"] <= 1


def test_without_gathering_zero3_saves_shards_that_an_export_makes_a_model_of(
    plain: Any, folder: Path
) -> None:
    """`stage3_gather_16bit_weights_on_model_save: false`: the Trainer writes a ZeRO checkpoint and says so."""
    saved = folder / "ungathered"
    assert not list(saved.glob("*.safetensors")) and (saved / "latest").exists()
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported")
    whole = AutoModelForCausalLM.from_pretrained(folder / "run_clm-3")
    expected = masked(dict(whole.named_parameters()))
    for name, weight in exported.named_parameters():
        if name in expected:
            assert bool((weight[expected[name]] == 0).all()), name
            # What is stored is on the grid of 8 bits.
            step = whole.get_parameter(name).abs().amax(1, keepdim=True) / 127
            assert bool(((weight - whole.get_parameter(name)).abs() <= 0.51 * step).all())


def test_what_a_trainer_saves_is_what_the_optimizer_stepped(folder: Path) -> None:
    """And not the copies that the processes sent each other rounded."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run_ranks(2, "tests.e2e.trainer_runs:weights_sent_rounded", folder=str(folder))
    last = folder / "rounded" / f"checkpoint-{STEPS}"
    for saved, checkpoint in (
        (folder / "rounded" / f"checkpoint-{SAVE_AT}", folder / "rounded" / f"checkpoint-{SAVE_AT}"),
        (last, last),
        (folder / "rounded", last),
    ):
        masters = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        for name, weight in load_file(saved / "model.safetensors").items():
            assert torch.equal(weight, masters[name]), (saved, name)


@pytest.mark.parametrize(("script", "stage"), [("run_glue", 2), ("run_clm", 3)])
def test_an_unmodified_script_through_the_launcher(plain: Any, folder: Path, script: str, stage: int) -> None:
    path = Path(__file__).with_name(f"{script}.py")
    assert "ds_compress" not in path.read_text()
    config = folder / f"launched-{script}.json"
    config.write_text(json.dumps(json_of(script, stage)))
    output = folder / f"launched-{script}"
    arguments = command_line(script, str(folder / script), str(output), str(config))
    launch("--module", "ds_compress.run", str(path), *arguments)
    assert losses_in(output) == pytest.approx(losses_in(folder / f"{script}-{stage}"), abs=1e-6)
    for name, weight in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(
            weight, load_file(folder / f"{script}-{stage}" / "model.safetensors")[name], rtol=0, atol=1e-6
        )


@pytest.fixture(scope="module")
def accelerated(folder: Path) -> Any:
    return run_ranks(2, "tests.e2e.trainer_runs:accelerate_loop", folder=str(folder))[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_loop_on_accelerate(accelerated: Any, folder: Path, stage: int) -> None:
    result = accelerated[stage]
    torch.testing.assert_close(result["accelerated"], result["losses"], rtol=1e-5, atol=1e-6)
    assert result["resumed"] == result["accelerated"][STEPS // 2 :]
    assert result["applied"] == STEPS
    whole, resumed = (
        AutoModelForCausalLM.from_pretrained(folder / f"accelerated-{stage}-{kind}")
        for kind in ("whole", "resumed")
    )
    masks = masked(dict(whole.named_parameters()))
    expected = masked(result["weights"])
    assert masks.keys() == expected.keys() and len(masks) == PRUNED["run_clm"]
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name])
        assert torch.equal(whole.get_parameter(name), resumed.get_parameter(name))
