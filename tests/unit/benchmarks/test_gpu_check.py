"""The check of a GPU: its parts are kept to their time, what was measured survives whatever happens, goals are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_ceilings, gpu_check, gpu_goals
from benchmarks.gpu_goals import Goal
from benchmarks.gpu_parts import PARTS, Part

ROOT = Path(__file__).resolve().parents[3]
FAKES = {
    "quick_part": """
        def measure(device, quick):
            return {"a": {"speed": 2.0 if quick else 1.0}}
        """,
    "hanging_part": """
        import subprocess, sys, time
        def measure(device, quick, report):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
            report({"before": {"child": child.pid}})
            print("now it hangs", flush=True)
            time.sleep(300)
        """,
    "dying_part": """
        import os
        def measure(device, quick, report):
            report({"first": {"speed": 3.0}})
            os.abort()
        """,
    "reading_part": """
        import json, os
        def measure(device, quick):
            sofar = json.load(open(os.environ["CHECK_RESULT"]))
            return {"read": {name: len(part["figures"]) for name, part in sofar["parts"].items()}}
        """,
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of fake parts that the processes of a check can import."""
    for name, source in FAKES.items():
        (tmp_path / f"{name}.py").write_text("\n".join(line[8:] for line in source.splitlines()))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CHECK_RESULT", str(tmp_path / "result.json"))
    return tmp_path


def check(folder: Path, *modules: str, seconds: float = 60) -> dict[str, Any]:
    parts = [Part(module.removesuffix("_part"), module, 10, "a fake") for module in modules]
    path = folder / "result.json"
    result = gpu_check.check(parts, "cpu", True, seconds, path, {"device": "none"})
    assert json.loads(path.read_text()) == result
    return result["parts"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hanging_part_is_cut_with_its_children_and_the_next_one_runs(fakes: Path) -> None:
    started = time.monotonic()
    parts = check(fakes, "hanging_part", "quick_part", seconds=24)
    assert time.monotonic() - started < 24
    assert parts["hanging"]["status"] == "out of time"
    assert parts["hanging"]["limit s"] == pytest.approx(12, abs=0.5)
    assert "now it hangs" in parts["hanging"]["output"]
    child = int(parts["hanging"]["figures"]["before"]["child"])
    assert not alive(child)
    assert parts["quick"] | {"seconds": 0, "limit s": 0} == {
        "status": "done", "seconds": 0, "limit s": 0, "figures": {"a": {"speed": 2.0}},
    }  # fmt: skip


def test_what_a_part_measured_survives_its_death_and_the_file_is_there_for_the_next(fakes: Path) -> None:
    parts = check(fakes, "dying_part", "no_such_part", "reading_part")
    assert parts["dying"]["status"] == "failed"
    assert parts["dying"]["figures"] == {"first": {"speed": 3.0}}
    assert parts["no_such"]["status"] == "absent"
    assert parts["reading"]["figures"] == {"read": {"dying": 1, "no_such": 0}}


def test_time_left_over_goes_to_the_next_part_and_without_any_none_starts(fakes: Path) -> None:
    parts = check(fakes, "no_such_part", "quick_part", seconds=60)
    assert parts["no_such"]["limit s"] == pytest.approx(30, abs=0.5)
    assert parts["quick"]["limit s"] > 45
    parts = check(fakes, "quick_part", seconds=gpu_check.LEAST_S / 2)
    assert parts["quick"]["status"] == "no time left" and not parts["quick"]["figures"]


def test_kept_output_names_no_folder_of_the_machine() -> None:
    said = f"{gpu_check.ROOT}/benchmarks/gpu_steps.py:3: at\n/a/.venv/lib/python3.12/site-packages/torch/x.py:8: 1/2"
    assert gpu_check.without_paths(said) == "benchmarks/gpu_steps.py:3: at\ntorch/x.py:8: 1/2"


def test_goals() -> None:
    goals = (
        Goal("p", r"^percent of copy", 90, "kernels", r"^(?!torch)"),
        Goal("p", r"^failed$", 0, "failures", at_most=True),
        Goal("q", r"^speed$", 1, "never measured"),
    )
    figures = {
        "mask, 25 M": {"percent of copy bandwidth": 95.0, "ms": 1.0},
        "quantize, 25 M": {"percent of copy bandwidth": 38.0},
        "histogram": {"percent of copy bandwidth": 90.0},
        "torch mul_": {"percent of copy bandwidth": 20.0},
        "tests": {"failed": 2},
    }
    kernels, failures, never = gpu_goals.judge({"p": {"figures": figures}}, goals)
    assert (kernels["reached"], kernels["figures"], kernels["median"]) == (2, 3, 90.0)
    assert (kernels["worst"], kernels["worst at"]) == (38.0, "quantize, 25 M")
    assert kernels["short"] == {"quantize, 25 M": 38.0}
    assert (failures["reached"], failures["worst"], failures["bound"]) == (0, 2, "<= 0")
    assert never["figures"] == 0 and "worst" not in never
    rows = [list(column.cells) for column in gpu_goals.table([kernels, failures, never]).columns]
    assert rows[3] == ["2 of 3", "0 of 1", "not measured"]


def test_rates_are_told_as_percentages_of_the_device() -> None:
    layer = "1B 2048x2048, 64 rows"
    products: dict[str, dict[str, float]] = {
        f"{layer}, int8": {"TOP/s": 50.0},
        f"{layer}, _int_mm": {"TOP/s": 60.0},
        f"{layer}, bf16": {"TOP/s": 10.0},
        f"{layer}, fp8": {"TOP/s": 10.0},
        f"{layer}, int8, gelu": {"us": 1.0},
    }
    ceilings = {gpu_ceilings.INT8: {"TFLOP/s": 200.0}, gpu_ceilings.BF16: {"TFLOP/s": 100.0}}
    gpu_ceilings.add_percentages({"ceilings": {"figures": ceilings}, "products": {"figures": products}})
    told = {variant: figures.get("percent of the device's rate") for variant, figures in products.items()}
    assert list(told.values()) == [25.0, 30.0, 10.0, None, None]


def test_every_goal_belongs_to_a_part_and_every_share_fits_into_the_minutes() -> None:
    assert {goal.part for goal in gpu_goals.GOALS} <= {part.name for part in PARTS}
    assert sum(part.seconds for part in PARTS) == pytest.approx(60 * gpu_check.MINUTES)


def test_the_dry_run_runs_every_part(tmp_path: Path) -> None:
    """The code that a GPU runs, in tiny sizes on the CPU."""
    output = tmp_path / "check.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
        "--dry-run",
        "--minutes",
        "20",
        "--output",
        str(output),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    result = json.loads(output.read_text())
    there = {part.name: ROOT.joinpath(*part.module.split(".")).with_suffix(".py").is_file() for part in PARTS}
    said = {name: part["status"] for name, part in result["parts"].items()}
    assert said == {name: "done" if here else "absent" for name, here in there.items()}, done.stdout[-3000:]
    assert all(part["figures"] for name, part in result["parts"].items() if there[name])
    assert "figures against their goals" in done.stdout and "a dry run" in done.stdout
    assert done.returncode == (0 if all(there.values()) else 1)


def test_without_a_device_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_check.describe("cuda")
