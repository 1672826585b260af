"""What a report says of real runs, that nothing in it can be code, and that large models and broken folders are met."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ds_compress
from ds_compress.engine.checkpoint import model_file
from ds_compress.errors import CheckpointError, ExportError
from ds_compress.ops import bitmask
from ds_compress.report import html, report
from ds_compress.report.chart import charts_of, number, scatter
from ds_compress.report.modules import by_layer, of_checkpoint
from ds_compress.report.page import MOST_MODULES
from ds_compress.techniques.expert_pruning import _STRIDE as STRIDE
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights, pruning_block, train
from tests.multirank.experts import block as expert_block
from tests.multirank.experts import built as built_mixture
from tests.multirank.experts import train as train_mixture
from tests.multirank.training import quantization_block
from tests.single import init_single_process

BLOCK = {
    **pruning_block("l1", 0.25, schedule="cubic", schedule_offset=2, schedule_offset_end=6),
    **quantization_block(),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an export, `done`; one that was cut short, `short`; and the zeros of `done` in `zeros`."""
    init_single_process()
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("done", 8), ("short", 4)):
        with engine_of(tiny_bert(), ds_config(2, BLOCK)) as engine:
            train(engine, batches(steps))
            engine.save_checkpoint(str(folder / name / "checkpoints"))
            if name == "done":
                ds_compress.export(engine, folder / name / "small", format="torch")
                zeros = {n: int((w == 0).sum()) for n, w in full_weights(engine.module).items()}
                (folder / "zeros").write_text(json.dumps(zeros))
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def one(path: Path) -> dict[str, Any]:
    return report([path])[0]


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order; collects what would load or run something."""

    void = ("meta", "br", "hr", "img", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.suspects: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.void:
            self.open.append(tag)
        loads = [
            k for k, v in attrs if k.startswith("on") or k == "src" or (k == "href" and (v or "")[:1] != "#")
        ]
        if tag in ("script", "link", "img", "iframe", "object") or loads:
            self.suspects.append(f"{tag} {attrs}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_with_a_checkpoint_and_an_export(trained: Path) -> None:
    made = one(trained / "done")
    assert made["checkpoint"].endswith("global_step8") and made["export"].endswith("small")
    assert (made["name"], made["steps"], made["zero_stage"], made["format"]) == ("done", 8, 2, "torch")
    assert set(made["blocks"]) == {"sparse_pruning", "weight_quantization", "activation_quantization"}
    assert all(end["is_reached"] for end in made["schedules"])
    sparsity = made["history"]["numbers"]["sparse_pruning/sparsity"]
    assert len(sparsity) == 8 and sparsity[-1] == pytest.approx(0.75, abs=0.01)
    assert made["accuracy"] is None and made["latency_ms"] is None
    modules = [module for layer in made["layers"] for module in layer["modules"]]
    assert sum(module["parameters"] for module in modules) == made["parameters"]
    assert {"int8, inputs int8 dynamic"} < {module["stored_as"] for module in modules}
    page = html([made])
    assert not Balanced(page).suspects
    ran_on = {"native": "compiled (native)", "reference": "plain torch (reference)"}[made["kernels"]]
    for words in ("sparse_pruning/sparsity", ran_on, "bert.encoder.layer.1", "int8, inputs int8 dynamic"):
        assert words in page
    assert page.count("<polyline") >= 5 and page.count('class="line planned"') == 1
    assert "prefers-color-scheme: dark" in page and "max-width: 40rem" in page


def test_a_checkpoint_alone_counts_its_masks(trained: Path) -> None:
    made = one(trained / "done" / "checkpoints")
    assert made == one(trained / "done" / "checkpoints" / "global_step8") | {
        "run": made["run"],
        "name": "checkpoints",
    }
    assert made["export"] is None and made["bytes"] is None
    zeros = json.loads((trained / "zeros").read_text())
    modules = [module for layer in made["layers"] for module in layer["modules"]]
    assert modules and all(m["parameters"] - m["nonzeros"] == zeros[m["name"]] for m in modules)
    said = {module["stored_as"] for module in modules}
    assert any("weights: " in words and "pruning: 0.25 kept" in words for words in said), said
    assert "Of the checkpoint" in html([made]) and "pruning: 0.25 kept" in html([made])


def test_a_run_that_was_cut_short_says_so(trained: Path) -> None:
    made = one(trained / "short")
    ends = {end["block"]: end["is_reached"] for end in made["schedules"]}
    assert ends["sparse_pruning"] is False and ends["weight_quantization"] is True
    assert "no: 4 steps were applied" in html([made])


def test_several_runs_and_what_was_measured_of_them(trained: Path) -> None:
    folders = [trained / "done", trained / "short", trained / "done" / "small"]
    made = report(folders, ["done=0.835", f"{trained / 'short'}=0.79", "small=0.83"], ["done=12"])
    assert [run["accuracy"] for run in made] == [0.835, 0.79, 0.83]
    page = html(made)
    # The one that was cut short has no export, so no size; one latency alone is no curve.
    assert "accuracy against size" in page and "accuracy against latency" not in page
    assert page.count('<text class="name"') == 2 and "0.835" in page
    assert not Balanced(page).suspects
    assert "accuracy against" not in html(report(folders[:1]))


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (["0.8"], "of which run"),
        (["nobody=0.8"], "none of the runs"),
        (["done=high"], "is no number"),
        (["done=nan"], "is no number"),
        (["done=1", "done=2"], "two numbers"),
    ],
)
def test_numbers_of_no_run_are_refused(trained: Path, accuracy: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        report([trained / "done", trained / "short"], accuracy)


def test_a_single_run_needs_no_name_and_no_run_is_given_twice(trained: Path) -> None:
    assert report([trained / "short"], ["0.5"])[0]["accuracy"] == 0.5
    with pytest.raises(ValueError, match="twice"):
        report([trained / "short", trained / "done" / ".." / "short"])


def hostile(value: Any, mark: str) -> Any:
    """Every text in it is markup, names too, but for the keys that the page asks for."""
    if isinstance(value, dict):
        free = not all(re.fullmatch(r"[a-z_]+", str(key)) for key in value)
        return {f"{key}{mark}" if free else key: hostile(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item, mark) for item in value]
    return f"{value}{mark}" if isinstance(value, str) else value


def test_nothing_of_a_run_is_markup(trained: Path) -> None:
    made = report([trained / "done", trained / "short"], ["done=1", "short=2"], ["done=1", "short=2"])
    made[0]["token_shares"], made[0]["kept_units"] = {"a.b": [0.25, 0.75]}, {"a.b": 3}
    made[0]["flagged_workers"], made[0]["judged_steps"], made[0]["commitments"] = {"1": 2}, 9, {"a.b": "c"}
    mark = "\"'</summary><script>alert(1)</script><img src=x onerror=alert(1)>"
    page = html([hostile(run, mark) for run in made])
    assert not Balanced(page).suspects
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;") > 100


def test_ten_thousand_modules_make_a_page_that_opens(trained: Path) -> None:
    made = one(trained / "done")
    modules = [
        {
            "name": f"model.layers.{k // 100}.mlp.experts.{k % 100}.up_proj",
            "parameters": 4_000_000,
            "nonzeros": 1,
        }
        | {"bytes": 2_000_000, "stored_as": "int4"}
        for k in range(10_000)
    ]
    begun = time.perf_counter()
    page = html([made | {"layers": by_layer(modules)}])
    assert time.perf_counter() - begun < 20
    assert len(page) < 6_000_000 and page.count("<details>") < 120
    assert page.count("up_proj") == 10_000
    many = by_layer({**module, "name": f"{module['name']}.{k}"} for k in range(3) for module in modules)
    assert sum(len(layer["modules"]) for layer in many) > MOST_MODULES
    page = html([made | {"layers": many}])
    assert "up_proj" not in page and "the JSON has them all" in page


def test_layers_are_sums_of_their_modules() -> None:
    entries = [
        ("a.layers.0.q", 4, 2, 8),
        ("a.layers.0.k", 6, 6, None),
        ("head", 2, 2, 3),
        ("a.layers.10", 1, 0, 1),
    ]
    layers = by_layer(
        {"name": name, "parameters": numel, "nonzeros": kept, "bytes": size}
        for name, numel, kept, size in entries
    )
    assert [(x["layer"], x["parameters"], x["nonzeros"], x["bytes"]) for x in layers] == [
        ("a.layers.0", 10, 8, 8),
        ("head", 2, 2, 3),
        ("a.layers.10", 1, 0, 1),
    ]


@pytest.mark.parametrize("numel", [1, 7, 8, 1001])
def test_masks_of_several_files_are_added(tmp_path: Path, numel: int) -> None:
    masks = [torch.rand(numel) < 0.4, torch.rand(numel + 3) < 0.4]
    files = []
    for rank, mask in enumerate(masks):
        index = [{"key": "0", "kind": "mask", "parameter": "w", "numel": mask.numel(), "is_mask": True}]
        index.append({"key": "1", "kind": "score", "parameter": "w", "numel": 2, "is_mask": False})
        files.append(tmp_path / f"{rank}.safetensors")
        stored = {"0": bitmask.pack(mask), "1": torch.rand(2)}
        save_file(stored, files[-1], metadata={"index": json.dumps(index)})
    kept = sum(int(mask.sum()) for mask in masks)
    (found,) = of_checkpoint(files, {})
    assert (found["name"], found["parameters"], found["nonzeros"]) == ("w", 2 * numel + 3, kept)
    files[1].write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        of_checkpoint(files, {})


def test_lines_break_where_numbers_are_missing_or_not_finite() -> None:
    numbers = {"a/b": [1.0, 2.0, None, "nan", 3.0, "inf", 4.0, 5.0], "a/planned_b": [1.0] * 8}
    (chart,), undrawn = charts_of(
        {"steps": list(range(1, 9)), "numbers": numbers, "stride": 1, "left_out": 0}
    )
    planned, reached = chart.lines
    assert (planned.is_planned, len(planned.segments)) == (True, 1)
    assert (len(reached.segments), len(reached.dots), chart.left_out, undrawn) == (2, 1, 2, [])


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [1e-300, 2e-300], [-1e308, 1e308], [5.0], [1e9, 1e9 + 1], [-3.0, -3.0], [5e-324, 0.0]],
)
def test_any_numbers_have_an_axis(values: list[float]) -> None:
    history = {"steps": list(range(1, len(values) + 1)), "numbers": {"x": values}, "stride": 1, "left_out": 0}
    (chart,), _ = charts_of(history)
    assert 1 <= len(chart.y_ticks) <= 7 and all(0 <= at <= chart.height for at, _ in chart.y_ticks)
    dots = scatter("t", "x", [(v, v, "a very long name of a run, and of its date") for v in values])
    assert (dots is None) == (len(values) < 2)
    assert dots is None or all(len(dot.label) < 30 and 0 < dot.y < dots.height for dot in dots.dots)


def test_numbers_as_a_person_reads_them() -> None:
    values = {None: "-", 1234567: "1,234,567", 0.12345: "0.1235", 2e6: "2,000,000", "nan": "nan", 0: "0"}
    assert {value: number(value) for value in values} == values


# -- folders ---------------------------------------------------------------------------------------------


def test_folders_that_are_no_run(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a checkpoint"):
        one(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder"):
        one(tmp_path / "nowhere")
    shutil.copytree(runs / "done" / "small", runs / "done" / "another")
    with pytest.raises(ValueError, match="has 2 exports, another, small"):
        one(runs / "done")
    plain = tmp_path / "plain" / "global_step1"
    plain.mkdir(parents=True)
    (plain.parent / "latest").write_text("global_step1")
    with pytest.raises(CheckpointError, match="plain DeepSpeed"):
        one(plain.parent)


def test_of_several_checkpoints_the_newest_is_taken(runs: Path) -> None:
    shutil.copytree(runs / "short" / "checkpoints", runs / "done" / "later")
    made = one(runs / "done")
    assert made["checkpoint"].endswith("global_step4"), "it was saved after the other one"
    assert any("of 2 checkpoints" in note for note in made["notes"])
    assert any("the export is of step 8, the checkpoint of step 4" in note for note in made["notes"])


def test_what_was_changed_is_refused(runs: Path) -> None:
    checkpoint = runs / "done" / "checkpoints" / "global_step8" / "ds_compress"
    text = (checkpoint / "run.json").read_text()
    (checkpoint / "run.json").write_text(text.replace('"stride": 1', '"stride": 3'))
    with pytest.raises(CheckpointError, match=r"run\.json"):
        one(runs / "done" / "checkpoints")
    record = runs / "done" / "small" / "ds_compress_run.json"
    record.write_text(record.read_text() + " ")
    with pytest.raises(ExportError, match=r"ds_compress_run\.json"):
        one(runs / "done" / "small")


@pytest.mark.parametrize(
    "damage", ['{"format": 1}', "[", '{"format": 2}', '{"format": 1, "history": {"steps": [1]}}']
)
def test_a_damaged_record_without_a_manifest_is_an_error_in_words(runs: Path, damage: str) -> None:
    folder = runs / "short" / "checkpoints" / "global_step4"
    (folder / "ds_compress_manifest.json").unlink()
    (folder / "ds_compress" / "run.json").write_text(damage)
    with pytest.raises(ValueError, match=r"damaged|newer version"):
        one(folder)


def test_treatments_that_are_damaged(runs: Path) -> None:
    folder = runs / "short" / "checkpoints" / "global_step4"
    (folder / "ds_compress_manifest.json").unlink()
    path = folder / "ds_compress" / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"treatments": {"w": {"parameters": 3}}}))
    with pytest.raises(ValueError, match="damaged: KeyError 'treatment'"):
        one(folder)
    del content["treatments"]
    path.write_text(json.dumps(content))
    assert one(folder)["layers"], "of a version that did not write them"


def test_an_older_checkpoint_and_an_older_export(runs: Path) -> None:
    """Neither has a record of its run."""
    folder = runs / "done" / "checkpoints" / "global_step8"
    (folder / "ds_compress_manifest.json").unlink()
    (folder / "ds_compress" / "run.json").unlink()
    made = one(folder)
    assert made["history"] is None and made["steps"] == 8 and made["schedules"]
    assert any("no history" in note for note in made["notes"])
    assert not Balanced(html([made])).suspects
    for name in ("ds_compress_run.json", "ds_compress_manifest.json"):
        (runs / "done" / "small" / name).unlink()
    made = one(runs / "done" / "small")
    assert made["config"] is None and made["layers"] and not made["schedules"]
    assert not Balanced(html([made])).suspects


def test_a_block_of_another_version_is_a_note(runs: Path) -> None:
    folder = runs / "short" / "checkpoints" / "global_step4"
    (folder / "ds_compress_manifest.json").unlink()
    told = folder / "ds_compress" / model_file.FILE_NAME
    content = json.loads(told.read_text())
    content["compression_training"]["of_the_future"] = {}
    told.write_text(json.dumps(content))
    made = one(folder)
    assert any("cannot read the block" in note for note in made["notes"]) and made["history"]["steps"]


@pytest.mark.usefixtures("single_process")
def test_token_shares_of_experts(tmp_path: Path) -> None:
    with engine_of(built_mixture("qwen3_moe"), ds_config(2, expert_block(schedule_offset=2))) as engine:
        train_mixture(engine, STRIDE)
        engine.save_checkpoint(str(tmp_path))
    made = one(tmp_path)
    assert made["token_shares"] and made["kept_units"]
    for name, shares in made["token_shares"].items():
        assert sum(shares) == pytest.approx(1, abs=1e-4) and len(shares) == made["kept_units"][name]
    page = html([copy.deepcopy(made)])
    assert "Token shares of experts" in page and not Balanced(page).suspects


def test_the_template_is_in_a_wheel() -> None:
    root = Path(ds_compress.__file__).parent
    declared = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = declared["tool"]["setuptools"]["package-data"]["ds_compress"]
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    assert set((root / "report" / "templates").iterdir()) <= packaged
    assert "jinja2" in declared["project"]["dependencies"]
