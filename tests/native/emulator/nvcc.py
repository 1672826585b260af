"""Where nvcc is, and the flags that every CUDA source of this project is compiled with."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "--fmad=false"]
ARCHITECTURES = ("80", "90")


class MissingTool(RuntimeError):
    """A CUDA tool is neither in $CUDA_HOME, nor on PATH, nor among the wheels of `ds_compress[cuda-build]`."""


@functools.cache
def find(name: str = "nvcc") -> str:
    """The path of a CUDA tool: $CUDA_HOME, PATH, the wheels. Raises MissingTool."""
    folders = [Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"]
    if home := os.environ.get("CUDA_HOME"):
        folders.insert(0, Path(home) / "bin")
    for folder in (folders[0], None, folders[-1]) if home else (None, folders[-1]):
        if found := shutil.which(name, path=str(folder) if folder else None):
            return found
    raise MissingTool(f"no {name} in $CUDA_HOME, on PATH or in the wheels of ds_compress[cuda-build]")


def available(name: str = "nvcc") -> bool:
    try:
        find(name)
    except MissingTool:
        return False
    return True


@functools.cache
def version() -> str:
    return subprocess.run([find(), "--version"], capture_output=True, text=True, check=True).stdout
