"""The pinned packages of each peer, and the virtual environments that hold them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".venv-peers"
OURS = "ours"
_MODEL = ("torch==2.13.0", "transformers==5.24.0", "numpy==2.4.1")
PACKAGES: dict[str, tuple[str, ...]] = {
    "modelopt": (
        *_MODEL,
        "nvidia-modelopt==0.47.0",
        "requests==2.34.2",
    ),  # it imports that without asking for it
    "nncf": (*_MODEL, "openvino==2026.4.1", "nncf==3.4.0"),
    "onnxruntime": (*_MODEL, "onnx==1.22.0", "onnxscript==0.7.1", "onnxruntime==1.32.0"),
    "torchao": (*_MODEL, "torchao==0.18.0"),
}


class UnavailableError(RuntimeError):
    """An environment cannot be made here; says why."""


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there; ours is the one that runs.

    Raises:
        UnavailableError: its packages cannot be installed.
    """
    if name == OURS:
        return Path(sys.executable)
    packages = PACKAGES[name]
    folder = FOLDER / f"{name}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:12]}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {', '.join(packages)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # Torch first and by its version alone: left to others, a plain `torch` brings gigabytes of CUDA libraries.
        for wanted in (packages[:1], packages):
            command = [str(python), "-m", "pip", "install", "--quiet", *wanted]
            installed = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if installed.returncode != 0:
                raise UnavailableError(installed.stderr.strip().splitlines()[-1])
        done.touch()
    return python
