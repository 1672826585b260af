"""Actions run when a module is imported, before or after they were asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ds_compress.imports import is_command_line, when_imported

HEAVY = (
    "accelerate",
    "compressed_tensors",
    "cryptography",
    "jinja2",
    "matplotlib",
    "model_signing",
    "networkx",
    "onnx",
    "onnxruntime",
    "openvino",
    "pandas",
    "peft",
    "pyrage",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch_pruning",
    "transformers",
    "typer",
)


def test_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waited_for.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[tuple[str, int]] = []

    def action(module: ModuleType) -> None:
        seen.append((module.__name__, module.value))

    when_imported("waited_for", action)
    assert seen == []
    import waited_for  # type: ignore[import-not-found]

    assert seen == [("waited_for", 3)]
    when_imported("waited_for", action)
    assert len(seen) == 2
    assert waited_for.value == 3
    sys.modules.pop("waited_for")


def test_a_module_that_is_not_there_stays_an_import_error() -> None:
    when_imported("not_there_at_all", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        import not_there_at_all  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.parametrize(
    ("started", "arguments", "is_it"),
    [
        (["python", "-m", "ds_compress", "doctor"], ["-m", "doctor"], True),
        (["python", "-X", "importtime", "-m", "ds_compress"], ["-m"], True),
        (["python", "BIN/ds_compress", "plan", "-m", "x"], ["BIN/ds_compress", "plan", "-m", "x"], True),
        (["python", "-m", "ds_compress.run", "train.py"], ["-m", "train.py"], False),
        (["python", "train.py", "-m", "ds_compress"], ["train.py", "-m", "ds_compress"], False),
        (["python", "-m", "train", "-m", "ds_compress"], ["-m", "-m", "ds_compress"], False),
        (["python", "-c", "spawn_main()", "--multiprocessing-fork"], ["BIN/ds_compress", "universal"], False),
        (["python", "BIN/pytest", "ds_compress"], ["BIN/pytest", "ds_compress"], False),
        (["python"], [""], False),
    ],
)
def test_which_process_is_the_command(
    started: list[str], arguments: list[str], is_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ds_compress", "pytest"):
        (tmp_path / name).touch()

    def placed(words: list[str]) -> list[str]:
        return [word.replace("BIN", str(tmp_path)) for word in words]

    monkeypatch.setattr(sys, "orig_argv", placed(started))
    monkeypatch.setattr(sys, "argv", placed(arguments))
    assert is_command_line() is is_it


def test_the_command_gets_the_whole_library_when_it_asks() -> None:
    """As if started by `python -m ds_compress`: nothing heavy at first, then the function and not the package."""
    program = """
import subprocess
import sys
sys.orig_argv, sys.argv = ["python", "-m", "ds_compress"], ["-m"]
import ds_compress
assert "torch" not in sys.modules
import ds_compress.export.report
assert callable(ds_compress.plan) and callable(ds_compress.export) and "deepspeed" in sys.modules
from deepspeed.runtime.config import DeepSpeedConfig
block = {"compression_training": {"seed": 3}, "train_micro_batch_size_per_gpu": 1}
assert DeepSpeedConfig(block)._ds_compress_config.seed == 3
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_nothing_that_takes_seconds_is_imported_at_start() -> None:
    """`import ds_compress` is to cost under 1.5 s beyond torch and DeepSpeed: who needs one of these pays for it then.

    What the two bring themselves is theirs to answer for.
    """
    program = f"""
import sys
import deepspeed
theirs = set(sys.modules)
import ds_compress
assert callable(ds_compress.plan)
print(*sorted(set({HEAVY}) & (set(sys.modules) - theirs)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.splitlines()[-1] == ""


def test_a_function_is_kept_from_the_compiler_that_comes_later_and_from_one_that_is_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "kept.py").write_text(
        "import torch\nfrom ds_compress.imports import not_compiled\n"
        "@not_compiled\ndef function(x):\n    return x + torch.compiler.is_compiling()\n"
        "class Holder:\n    @not_compiled\n    def method(self, x):\n"
        "        return x + torch.compiler.is_compiling()\n"
    )
    program = """
import sys, torch
sys.path.insert(0, {folder!r})
{first}
import kept
assert ("torch._dynamo" in sys.modules) is {is_there}
assert kept.function(1) == 1 and kept.Holder().method(1) == 1
one = torch.ones(1)
for call in (lambda x: kept.function(x), lambda x: kept.Holder().method(x)):
    assert torch.compile(call, backend="eager")(one).item() == 1, call
seen = torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")
assert seen(one).item() == 2
"""
    for first, is_there in (("", False), ("import torch._dynamo", True)):
        words = program.format(folder=str(tmp_path), first=first, is_there=is_there)
        done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-1500:]
