"""What an installed ds_compress must do where there is no repository and no compiler. Uses nothing of the tests.

    python smoke.py [KERNEL]

KERNEL is the microbenchmark that is run, int8_linear by default. Says in one line what ran, or ends with an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "compression_training": {
        "sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5, "schedule_offset": 1}},
        "weight_quantization": {
            "shared_parameters": {"enabled": True, "quantize_weight_in_forward": True},
            "different_groups": {"all": {"params": {"target_bits": 8}, "modules": ["*"]}},
        },
    },
}


def main() -> None:
    installed = _installed()
    library = _doctor(installed)
    kernel = sys.argv[1] if len(sys.argv) > 1 else "int8_linear"
    figures = _bench(kernel)
    metrics = _train()
    print(f"smoke: {installed}: {library}; {kernel}: {figures}; trained to {metrics}")


def _installed() -> str:
    import torch

    import ds_compress

    package = Path(ds_compress.__file__).parent
    assert package.parent.name == "site-packages", package
    assert not (package.parent / "csrc").exists() and not (package.parent / "benchmarks").exists()
    found = shutil.which("g++") or shutil.which("c++") or shutil.which("nvcc") or os.environ.get("CXX")
    assert found is None, f"a compiler is there, so the test says nothing: {found}"
    version = ".".join(map(str, sys.version_info[:3]))
    return f"ds_compress {ds_compress.__version__}, torch {torch.__version__}, Python {version}"


def _doctor(installed: str) -> str:
    """The library came with the package, and is the one that ops run on."""
    told = _command("doctor", "--json")
    kernels = told["kernels"]
    assert kernels["library"].get("origin") == "came with the package", kernels["library"]
    assert "int8_linear" in kernels["ops on CPU"]["compiled"], kernels["ops on CPU"]
    count = len(kernels["ops on CPU"]["compiled"])
    return f"{count} ops of the library that {kernels['library']['origin']}"


def _bench(kernel: str) -> str:
    figures = _command("bench", kernel, "--quick", "--json")["figures"]
    assert figures, "no figures"
    return f"{len(figures)} figures"


def _command(*words: str) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "ds_compress", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, f"ds_compress {' '.join(words)}: {done.returncode}\n{done.stdout[-3000:]}"
    found: dict[str, dict] = json.loads(done.stdout)
    return found


def _train() -> dict[str, float]:
    """Three steps on one process, half of the weights pruned, and an export that is loaded again."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(environment | {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"})
    import deepspeed
    import torch

    import ds_compress

    # DeepSpeed's own, for which it would want a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    x, y = torch.randn(4, 16), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    metrics: dict[str, float] = engine.compression.metrics()
    assert losses[-1] < losses[0], losses
    assert abs(metrics["sparse_pruning/sparsity"] - 0.5) < 0.01, metrics
    with tempfile.TemporaryDirectory() as folder:
        ds_compress.export(engine, folder, format="torch", inputs={"input": x})
    return metrics


if __name__ == "__main__":
    main()
