"""`ds_compress plan --search`: from a model and a text to a config that trains, and an export within its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ds_compress
from ds_compress.cli import app
from ds_compress.cli.results import RESULTS
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import batches, ds_config, engine_of, train
from tests.single import init_single_process
from tests.words import save_tokenizer, sentences


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the models `bert` and `llama`, a table of the first, a DeepSpeed JSON and blocks."""
    folder = tmp_path_factory.mktemp("search")
    tiny_bert(hidden=64).save_pretrained(folder / "bert")  # type: ignore[operator]
    tiny_llama().save_pretrained(folder / "llama")  # type: ignore[operator]
    save_tokenizer(folder / "bert")
    (folder / "text.txt").write_text("\n".join(sentences(16)) + "\n")
    measured = call(
        "sensitivity", folder / "bert", "--data", folder / "text.txt", "--output", folder / "table.json",
        "--formats", "int2_g64,int3_g64,int4_g64,int8",
    )  # fmt: skip
    assert measured[0] == 0, measured
    whole = ds_config(1, {}, dtype="bf16")
    (folder / "whole.json").write_text(json.dumps(whole))
    del whole["compression_training"]
    (folder / "deepspeed.json").write_text(json.dumps(whole))
    (folder / "block.json").write_text('{"seed": 3}')
    (folder / "quantized.json").write_text('{"scheme": "W4A16"}')
    (folder / "list.json").write_text("[]")
    (folder / "wrong.json").write_text(json.dumps({**whole, "compression_training": {"sede": 3}}))
    return folder


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def searched(place: Path, config: str, out: Path, *options: object) -> dict[str, Any]:
    common = ("--search", "--sensitivity", place / "table.json", "--output", out, "--json")
    code, printed, error = call("plan", place / "bert", place / config, *common, *options)
    assert code == 0, error
    found: dict[str, Any] = json.loads(printed)
    assert set(found) == {"ok", *RESULTS["plan"]}
    return found


def test_from_a_text_to_an_export_within_its_size(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.json"
    uniform = searched(place, "whole.json", out, "--effective-bits", 30)["search"]["uniform"]
    size = round(0.6 * uniform["int2_g64"]["bytes"] + 0.4 * uniform["int4_g64"]["bytes"])
    found = searched(place, "whole.json", out, "--size", f"{size}B", "--overwrite")["search"]
    assert found["output"] == str(out) and found["bytes"] <= size
    assert len(set(found["formats"].values())) > 1
    code, printed, error = call("validate", out, "--model", place / "bert")
    assert code == 0 and "weight_quantization" in printed, error
    init_single_process()
    with engine_of(tiny_bert(hidden=64), json.loads(out.read_text())) as engine:
        train(engine, batches(2))
        report = ds_compress.export(engine, tmp_path / "small")
    assert report.format == "torch" or report.format == "compressed-tensors"
    assert report.check["verdict"] and report.bytes <= size
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))


def test_a_latency(place: Path, tmp_path: Path) -> None:
    device = ("--tokens", 1, "--device", "bf16=1,bandwidth=1")
    plain = searched(place, "deepspeed.json", tmp_path / "a.json", "--effective-bits", 30, *device)
    before = plain["compute"]["latencies"][0]["before_s"]
    out = tmp_path / "b.json"
    found = searched(place, "deepspeed.json", out, "--latency", f"{0.6 * before * 1e6:.3f}us", *device)
    after = found["compute"]["latencies"][0]["after_s"]
    assert found["search"]["seconds"] == pytest.approx(after, rel=1e-3) and after <= 0.6 * before
    assert found["search"]["goal"].startswith("latency ") and plain["search"]["seconds"] is None
    assert "weight_quantization" in json.loads(out.read_text())["compression_training"]
    code, _, error = call(
        "plan", place / "bert", place / "deepspeed.json", "--search", "--sensitivity", place / "table.json",
        "--output", tmp_path / "c.json", "--latency", "1us",
    )  # fmt: skip
    assert code == 2 and "--tokens on --device: say both" in error and not (tmp_path / "c.json").exists()


def test_the_rest_of_the_config_stays(place: Path, tmp_path: Path) -> None:
    for name in ("whole.json", "deepspeed.json"):
        out = tmp_path / name
        searched(place, name, out, "--effective-bits", 4)
        made, given = json.loads(out.read_text()), json.loads((place / "deepspeed.json").read_text())
        assert {key: made[key] for key in made if key != "compression_training"} == given
        assert "weight_quantization" in made["compression_training"]
    out = tmp_path / "block.json"
    searched(place, "block.json", out, "--effective-bits", 4)
    assert set(json.loads(out.read_text())) == {"seed", "export_to", "weight_quantization"}


def test_what_a_person_reads(place: Path, tmp_path: Path) -> None:
    common = ("--search", "--sensitivity", place / "table.json", "--effective-bits", 3.6)
    out = tmp_path / "new.json"
    code, printed, _ = call("plan", place / "bert", place / "whole.json", *common, "--output", out)
    assert code == 0
    assert "search for --effective-bits 3.6: predicted 3." in printed
    assert "every group in int4_g64: predicted 4." in printed and f"written: {out}" in printed
    code, again, _ = call("plan", place / "bert", out)
    assert code == 0 and again in printed


def test_a_search_beside_a_run(place: Path, tmp_path: Path) -> None:
    options = ("--effective-bits", 4, "--world-size", 8)
    found = searched(place, "whole.json", tmp_path / "new.json", *options)
    assert found["run"]["world_size"] == 8 and found["search"]["effective_bits"] <= 4


@pytest.mark.parametrize(
    ("model", "config", "options", "message"),
    [
        ("bert", "whole.json", ("--size", "20MB"), "say --search"),
        ("bert", "whole.json", ("--overwrite",), "--overwrite says something of a search"),
        ("bert", "whole.json", ("--search", "--size", "20MB", "--output", "new.json"), "--sensitivity FILE"),
        ("bert", "whole.json", ("--search", "T", "--output", "new.json"), "one goal"),
        ("bert", "whole.json", ("--search", "T", "--size", "1MB", "--effective-bits", "4", "O"), "one goal"),
        ("bert", "whole.json", ("--search", "T", "--size", "1MB"), "needs --output"),
        (
            "bert",
            "whole.json",
            ("--search", "T", "--size", "1MB", "--output", "no/new.json"),
            "no is no folder",
        ),
        ("bert", "whole.json", ("--search", "T", "--size", "1 apple", "O"), "got '1 apple'"),
        (
            "bert",
            "whole.json",
            ("--search", "T", "--size", "20kB", "O"),
            "the smallest that these formats reach",
        ),
        ("bert", "whole.json", ("--search", "T", "--size", "20MB", "O"), "nothing to search"),
        ("bert", "whole.json", ("--search", "X", "--size", "20MB", "O"), "no such file"),
        (
            "bert",
            "quantized.json",
            ("--search", "T", "--effective-bits", "4", "O"),
            "quantizes weights already",
        ),
        ("bert", "list.json", ("--search", "T", "--effective-bits", "4", "O"), "no JSON object"),
        ("bert", "wrong.json", ("--search", "T", "--effective-bits", "4", "O"), "sede"),
        ("llama", "whole.json", ("--search", "T", "--effective-bits", "4", "O"), "another model"),
    ],
)
def test_refusals_write_nothing(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    config: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    """T: the table; X: one that there is not; O: a file to write."""
    monkeypatch.chdir(tmp_path)
    short = {
        "T": ("--sensitivity", str(place / "table.json")),
        "X": ("--sensitivity", "nothing.json"),
        "O": ("--output", "new.json"),
    }
    given = [word for option in options for word in short.get(option, (option,))]
    code, printed, error = call("plan", place / model, place / config, *given)
    assert code == 2 and not printed
    assert message in error[error.index("ds_compress: ") :]
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_replaced_by_chance(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.json"
    out.write_text("mine")
    options = ("--search", "--sensitivity", place / "table.json", "--effective-bits", 4, "--output", out)
    code, _, error = call("plan", place / "bert", place / "whole.json", *options)
    assert code == 2 and "--overwrite" in error and out.read_text() == "mine"
