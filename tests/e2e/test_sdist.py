"""An sdist is enough: a wheel built from it, installed where nothing of the checkout is, passes a smoke test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
_COPIED = ("ds_compress", "csrc", "benchmarks", "ds_configs")
_SMOKE = """
import torch, ds_compress
from ds_compress.ops import build, functional
assert "site" in ds_compress.__file__, ds_compress.__file__
assert build.sources_folder().parent.name == "ds_compress"
packed = functional.mask_pack(torch.tensor([True, False, True]))
print("packed", packed.tolist(), ds_compress.plan(torch.nn.Sequential(torch.nn.Linear(4, 4)), {
    "sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5}}}).weights[0].name)
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.network
def test_a_wheel_from_the_sdist_works_by_itself(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    skipped = shutil.ignore_patterns("prebuilt", "__pycache__", "results", "*.egg-info")
    for name in _COPIED:
        shutil.copytree(_REPOSITORY / name, source / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / name, source)
    # pip builds a wheel of an archive as it does of one from an index; setuptools makes the archive.
    pip = (sys.executable, "-m", "pip", "install", "-q")
    tools = str(tmp_path / "tools")
    run(*pip, "setuptools>=77", "--target", tools, cwd=tmp_path)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source, PYTHONPATH=tools)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {"csrc/cpu/isa.cpp", "csrc/include/ds_compress/math.h", "ds_configs/small_zero2.json"} <= names
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(archive),
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("ds_compress-*.whl")

    # An environment of its own, in which only the dependencies are those of this one.
    environment = tmp_path / "site"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    (packages,) = environment.glob("lib/python*/site-packages")
    python = str(environment / "bin" / "python")
    run(*pip, "--no-deps", "--target", str(packages), str(wheel), cwd=tmp_path)
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    cache = str(tmp_path / "cache")
    out = run(python, "-c", _SMOKE, cwd=tmp_path, DS_COMPRESS_KERNELS="reference", DS_COMPRESS_CACHE=cache)
    assert "packed [5] 0.weight" in out
    help_text = run(python, "-m", "ds_compress.benchmarks.mask_apply", "--help", cwd=tmp_path)
    assert "--record" in help_text
    assert "mask_apply" in run(python, "-m", "ds_compress", "bench", cwd=tmp_path)
    assert not list(packages.glob("ds_compress/benchmarks/results")), "a benchmark wrote into the package"
