"""`--json`: one object on standard output, with the keys that are described, whatever libraries print there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ds_compress.cli import app
from ds_compress.cli.output import print_json, stdout_to_stderr
from ds_compress.cli.results import RESULTS
from ds_compress.sensitivity.increase import Metric
from ds_compress.sensitivity.table import GroupSensitivity, Sensitivity
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, train
from tests.zoo.models import ZOO


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result(command: str, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [command, *arguments, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert next(iter(found)) == "ok" and set(found) == {"ok", *RESULTS[command]} and found["ok"] is True
    return found


def test_export_inspect_plan_validate() -> None:
    ZOO["bert_classifier"]().save_pretrained("model")  # type: ignore[operator]
    Path("config.json").write_text(json.dumps(ds_config(2, pruning_block())))
    exported = result("export", "model", "small", "--no-check")
    assert exported["bytes"] == Path("small/model.safetensors").stat().st_size
    assert result("inspect", "small") == exported
    planned = result("plan", "model", "config.json")
    assert planned["weights"] and {entry["block"] for entry in planned["weights"]} == {"sparse_pruning"}
    assert planned["nonzeros"] < planned["parameters"] == exported["parameters"]
    checked = result("validate", "config.json", "--model", "model")
    assert checked["enabled_blocks"] == ["sparse_pruning"]


def test_the_structures_of_a_plan() -> None:
    ZOO["bert_classifier"]().save_pretrained("model")  # type: ignore[operator]
    groups = {"ffn": {"params": {"dense_ratio": 0.5}, "modules": ["intermediate"]}}
    block = {"row_pruning": {"shared_parameters": {"enabled": True}, "different_groups": groups}}
    Path("config.json").write_text(json.dumps(block))
    planned = result("plan", "model", "config.json")
    assert planned["structures"] and set(planned["structures"][0]) == {"structure", "block", "group", "kept"}
    assert planned["bytes"]["after"] < planned["bytes"]["before"]


def test_init_and_its_list() -> None:
    listed = result("init", "--list")
    assert listed["out"] is None and len(listed["recipes"]) > 10
    written = result("init", "--recipe", "w4a16", "--model", "decoder")
    assert "scheme" in json.loads(Path(written["out"]).read_text())["compression_training"]
    ((label, use),) = written["recipes"].items()
    assert label.startswith("w4a16@") and listed["recipes"][label] == use
    asked = CliRunner().invoke(app, ["init", "--json", "--out", "other.json"])
    assert asked.exit_code == 2 and not asked.stdout and not Path("other.json").exists()


def test_a_plan_of_a_run() -> None:
    ZOO["bert_classifier"]().save_pretrained("model")  # type: ignore[operator]
    Path("config.json").write_text(json.dumps(ds_config(2, pruning_block(), dtype="bf16")))
    assert result("plan", "model", "config.json")["run"] is None
    options = ("--world-size", "8", "--nodes", "2", "--bandwidth", "10", "--teacher", "model")
    planned = result("plan", "model", "config.json", *options)
    run = planned["run"]
    assert (run["world_size"], run["nodes"], run["zero_stage"]) == (8, 2, 2)
    held = run["memory_bytes"]
    assert held["total"] == sum(value for key, value in held.items() if key != "total")
    assert held["weights"] == pytest.approx(2 * planned["parameters"], rel=0.01)
    assert held["teacher"] == 0, "no block asks for one"
    assert held["masks"] >= planned["training_state_bytes"]["masks"] > 0
    ways = {way["way"]: way for way in run["wire_bytes"]}
    assert list(ways) == ["plain DeepSpeed", "8 bits both ways", "8 bits both ways, hierarchical"]
    plain = ways["plain DeepSpeed"]
    assert plain["total"] == plain["gradients"] + plain["weights"] > ways["8 bits both ways"]["total"]
    assert plain["seconds"] == pytest.approx(plain["leaving_a_node"] * 8 / 10e9, rel=1e-4)
    replicated = result("plan", "model", "config.json", "--world-size", "8", "--zero-stage", "0")
    assert replicated["run"]["memory_bytes"]["masks"] == replicated["training_state_bytes"]["masks"]
    shown = CliRunner().invoke(app, ["plan", "model", "config.json", *options]).output
    assert "predicted of a run with 8 processes on 2 nodes, ZeRO-2" in shown
    assert "not counted: activations" in shown and "leave a node" in shown


def test_a_plan_of_what_is_computed() -> None:
    ZOO["bert_classifier"]().save_pretrained("model")  # type: ignore[operator]
    block = {**pruning_block(), "distillation": {"enabled": True, "losses": {"logits": {}}}}
    Path("config.json").write_text(json.dumps(ds_config(2, block, dtype="bf16")))
    assert result("plan", "model", "config.json")["compute"] is None
    options = ("--tokens", "512", "--sequence", "32", "--device", "h100-sxm")
    unknown = result("plan", "model", "config.json", *options)["compute"]
    assert unknown["step_flops"]["teacher"] is None and unknown["step_seconds"] is None
    found = result("plan", "model", "config.json", *options, "--teacher", "model")["compute"]
    flops = found["step_flops"]
    assert flops["student"] == 3 * flops["teacher"] and flops["teacher"] % found["forward_flops"] == 0
    assert found["moved_bytes"].keys() == {"sparse_pruning"} and found["saved_bytes"] == 0
    assert 1 < found["step_ratio"] < 2
    assert [one["tokens"] for one in found["latencies"]] == [1, 512]
    shown = CliRunner().invoke(app, ["plan", "model", "config.json", *options]).output
    assert "one forward on h100-sxm, at least" in shown and "not known: say --teacher" in shown


def test_a_block_without_a_config_around_it_is_counted_as_deepspeed_would_by_default() -> None:
    ZOO["bert_classifier"]().save_pretrained("model")  # type: ignore[operator]
    Path("block.json").write_text(json.dumps(pruning_block()))
    run = result("plan", "model", "block.json", "--world-size", "2")["run"]
    assert run["zero_stage"] == 0 and "without a DeepSpeed config" in run["notes"][0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes", "2"], "--nodes says something of a run: say --world-size, too"),
        (["--world-size", "3", "--nodes", "2"], "2 nodes with 3 processes"),
        (["--world-size", "2", "--bandwidth", "1"], "say --nodes"),
        (["--device", "l4"], "--device says something of what is computed: say --tokens, too"),
        (["--tokens", "8", "--device", "abacus"], "abacus is no device that is known here"),
        (["--tokens", "8", "--sequence", "9"], "say --sequence"),
    ],
)
def test_a_plan_of_a_run_that_cannot_be(options: list[str], said: str) -> None:
    ZOO["bert_classifier"]().save_pretrained("model")  # type: ignore[operator]
    Path("config.json").write_text(json.dumps(ds_config(2, pruning_block())))
    done = CliRunner().invoke(app, ["plan", "model", "config.json", *options])
    assert done.exit_code == 2 and said in done.output


def test_migrate_and_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    monkeypatch.delenv("DS_COMPRESS_KERNELS", raising=False)
    old = {"compression_training": {"layer_reduction": {"enabled": False}}}
    Path("old.json").write_text(json.dumps(old))
    assert result("migrate", "old.json")["written"] is None
    made = result("migrate", "old.json", "--output", "new.json")
    assert made["written"] == "new.json" and json.loads(Path("new.json").read_text()) == made["config"]
    result("doctor")


def test_signed_folders() -> None:
    tiny_bert().save_pretrained("model")
    for name, kind in (("release", "signing"), ("reader", "encryption")):
        made = result("keygen", name, "--kind", kind)
        assert Path(made["private"]).is_file() and Path(made["public"]).is_file()
    result("sign", "model", "--key", "release.key", "--name", "encoder", "--version", "3")
    public = ("--public-key", "release.pub")
    found = result("verify", "model", *public)
    assert (found["name"], found["version"], found["plaintext"]) == ("encoder", 3, False)
    result("encrypt", "model", "sealed", "--recipient", "reader.recipient", "--key", "release.key")
    reader = ("--identity", "reader.identity")
    assert result("verify", "sealed", *public, *reader)["plaintext"] is True
    assert result("decrypt", "sealed", "opened", *reader, *public)["folder"] == "opened"


@pytest.mark.usefixtures("single_process")
def test_universal() -> None:
    with engine_of(tiny_bert(), ds_config(2, pruning_block())) as engine:
        train(engine, batches(1))
        engine.save_checkpoint("run")
    made = result("universal", "run", "run")
    assert Path(made["folder"]).is_dir() and made["load_from"] == "run"
    told = result("report", "run", "--accuracy", "0.5", "--out", "page.html")
    assert json.loads(Path(told["json"]).read_text())["runs"] == told["runs"]
    assert told["runs"][0]["accuracy"] == 0.5 and told["runs"][0]["steps"] == 1
    described = RESULTS["report"]["runs"].partition(": ")[2].replace("layers with their modules", "layers")
    assert re.sub(r" \(.*?\)", "", described).split(", ") == list(told["runs"][0])
    assert Path("page.html").read_text().startswith("<!doctype html>")
    assert told["sensitivity"] is None
    table = Sensitivity("M", Metric.LOSS, ("int8",), {"c": GroupSensitivity(("c",), 1, {"int8": 0.5})}, 1, 1)
    table.write(Path("s.json"))
    shown = result("report", "run", "--out", "other.html", "--sensitivity", "s.json")
    assert shown["sensitivity"] == table.as_data() and "Sensitivity of M" in Path("other.html").read_text()
    refused = CliRunner().invoke(app, ["report", "run", "--out", "third.html", "--sensitivity", "page.json"])
    assert refused.exit_code == 2 and "no table of `ds_compress sensitivity`" in refused.output
    assert not Path("third.html").exists()
    again = CliRunner().invoke(app, ["report", "run", "--out", "page.html"])
    assert again.exit_code == 2 and "page.html exists" in again.output
    data = CliRunner().invoke(app, ["report", "run", "--out", "page.json"])
    assert data.exit_code == 2 and "another suffix" in data.output
    shown = CliRunner().invoke(app, ["report", "run", "--out", "page.html", "--overwrite"])
    assert shown.exit_code == 0 and shown.output.startswith("page.html: 1 run; data in page.json")


def test_an_error_leaves_standard_output_empty() -> None:
    for command, *arguments in (
        ["inspect", "nowhere"],
        ["migrate", "nowhere.json"],
        ["plan", "no", "no.json"],
    ):
        done = CliRunner().invoke(app, [command, *arguments, "--json"])
        assert done.exit_code == 2 and done.stdout == "" and done.stderr.startswith("ds_compress: ")


def test_standard_output_stays_clean_in_a_real_process() -> None:
    """DeepSpeed logs to it at import, and so may a child process."""
    Path("config.json").write_text(json.dumps(ds_config(2, pruning_block())))
    command = [sys.executable, "-m", "ds_compress", "validate", "config.json", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ok"] is True


def test_what_children_and_print_write_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_to_stderr():
        print("of print")
        subprocess.run(["sh", "-c", "echo of a child"], check=True)
        os.write(1, b"of a library\n")
    print("after")
    out, err = capfd.readouterr()
    assert out == "after\n"
    assert all(words in err for words in ("of print", "of a child", "of a library"))


def test_numbers_that_json_has_not_are_strings(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), float("-inf"), 1.5], "b": {"c": Path("x"), "d": None}})
    assert json.loads(capsys.readouterr().out) == {"a": ["nan", "-inf", 1.5], "b": {"c": "x", "d": None}}


@pytest.mark.parametrize(
    ("words", "completed"), [("ds_compress val", "validate"), ("ds_compress validate --mo", "--model")]
)
def test_the_tab_key(words: str, completed: str) -> None:
    environment = {
        **os.environ,
        "_DS_COMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-X", "importtime", "-m", "ds_compress"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [completed]
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & {"torch", "deepspeed"}
