"""Starts the training script as a user would, with the launcher's own chatter in a log file."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROCESSES = 2


class StepFailed(RuntimeError):
    """A step of the demo ended badly; the message says where to look."""


def train(
    config: dict[str, Any],
    model: Path,
    folder: Path,
    seed: int,
    freeze_embeddings: bool = False,
    every: int = 1,
    export: Sequence[str] = (),
) -> dict[str, Any]:
    """One `deepspeed` run of the training script; returns its `metrics.json`.

    every: it trains on each so manieth sentence. export: formats to write.

    Its log goes to `<folder>.log`, its progress to stderr. Raises `StepFailed`.
    """
    config_file = folder.with_suffix(".json")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    steps = config["scheduler"]["params"]["total_num_steps"]
    # Without --num_gpus the launcher starts one process per NUMA node, which is one here.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(PROCESSES)]
    command += ["--master_port", str(free_port())]
    command += ["--module", "ds_compress.examples.train", "--deepspeed_config", str(config_file)]
    command += ["--model", str(model), "--output", str(folder), "--steps", str(steps), "--seed", str(seed)]
    command += ["--every", str(every), "--title", f"    {folder.name}"] + [
        "--freeze_embeddings"
    ] * freeze_embeddings
    command += ["--export", *export] if export else []
    print(f"    starting {PROCESSES} processes; log: {folder.with_suffix('.log')}", flush=True)
    with open(folder.with_suffix(".log"), "w") as log:
        code = subprocess.run(command, stdout=log, env=environment()).returncode
    if code != 0:
        raise StepFailed(f"training {folder.name} ended with code {code}: see {folder.with_suffix('.log')}")
    metrics = load_json(folder / "metrics.json")
    if metrics["processes"] != PROCESSES:
        raise StepFailed(f"the launcher started {metrics['processes']} processes, not {PROCESSES}")
    return metrics


def environment() -> dict[str, str]:
    """One thread per process, no network, and no warnings across the progress bar."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    """A port that nobody uses now, drawn at random: the launcher's own default is everybody's.

    It lies below those that the kernel gives to any connection that asks for none, so that no such connection takes
    it before the launcher listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def load_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except OSError as error:
        raise StepFailed(f"{path} cannot be read: {error.strerror}") from None
