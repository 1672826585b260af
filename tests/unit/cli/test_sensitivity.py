"""`ds_compress sensitivity` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_compress.cli import app
from ds_compress.cli.results import RESULTS
from ds_compress.sensitivity.table import Sensitivity
from tests.models import tiny_bert, tiny_llama
from tests.words import save_tokenizer, sentences
from tests.zoo.models import ZOO


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the models `llama`, `bert` and `t5`, and the data `text.txt` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("sensitivity")
    for name, model in (("llama", tiny_llama()), ("bert", tiny_bert()), ("t5", ZOO["t5"]())):  # type: ignore[operator]
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    texts = sentences(20)
    (folder / "text.txt").write_text("\n".join(texts) + "\n")
    rows = [json.dumps({"text": text, "y": at % 2}) for at, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["sensitivity", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_file_is_what_is_printed(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    options = ("--data", place / "text.txt", "--output", out, "--formats", "int4_g16, nvfp4")
    code, printed, _ = call(place / "llama", *options, "--examples", 12, "--json")
    assert code == 0
    found = json.loads(printed)
    assert set(found) == {"ok", *RESULTS["sensitivity"]}
    assert found["examples"] == 12 and found["formats"] == ["int4_g16", "nvfp4"]
    assert found["output"] == str(out)
    del found["ok"], found["output"]
    assert json.loads(out.read_text()) == found
    assert len(Sensitivity.read(out).groups) == 8
    # The same again is the same file; another draw is another.
    first = out.read_bytes()
    code, printed, _ = call(place / "llama", *options, "--examples", 12, "--overwrite")
    assert code == 0 and out.read_bytes() == first
    assert "model.layers.1.mlp.{gate_proj,up_proj}" in printed and "8 groups" in printed
    call(place / "llama", *options, "--examples", 12, "--overwrite", "--seed", 1)
    assert out.read_bytes() != first


def test_losses(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    options = ("--output", out, "--formats", "int2", "--metric", "loss", "--json")
    code, printed, _ = call(place / "bert", "--data", place / "rows.jsonl", "--labels", "y", *options)
    assert code == 0 and json.loads(printed)["metric"] == "loss" and json.loads(printed)["predictions"] == 20
    code, printed, _ = call(place / "llama", "--data", place / "text.txt", "--overwrite", *options)
    words = sum(len(text.split()) - 1 for text in sentences(20))
    assert code == 0 and json.loads(printed)["predictions"] == words


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        ("nothing", "text.txt", (), "has no config.json"),
        ("llama", "nothing.txt", (), "no such file"),
        ("llama", "text.txt", ("--formats", "int4,int99"), "got 'int99'"),
        ("llama", "text.txt", ("--formats", ","), "no format"),
        ("llama", "text.txt", ("--labels", "y"), "--labels is for --metric loss"),
        ("llama", "text.txt", ("--exclude", "nothing_like_it"), "reaches none"),
        ("llama", "text.txt", ("--output", "/nowhere/s.json"), "/nowhere is no folder"),
        ("bert", "text.txt", ("--metric", "loss"), "needs classes"),
        ("t5", "text.txt", (), "an encoder and a decoder"),
    ],
)
def test_refusals_leave_no_file(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    data: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, error = call(place / model, "--data", place / data, *options)
    assert code == 2 and not printed
    assert message in error[error.index("ds_compress: ") :]
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_replaced_by_chance(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    out.write_text("mine")
    code, _, error = call(place / "llama", "--data", place / "text.txt", "--output", out)
    assert code == 2 and "--overwrite" in error and out.read_text() == "mine"
