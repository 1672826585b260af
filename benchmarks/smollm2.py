"""What benchmarks of language models share: SmolLM2-135M-Instruct, and the sources of the Python documentation.

30 layers, 3 key/value heads, tied embeddings; its weights lie on a 4-bit grid, because they come as a gguf file. The
text is cut into sequences of 256 tokens; 24 of them, from stretches that no training sequence is from, are held out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ds_compress.examples import assets
from ds_compress.examples.cpu import keep_freed_memory, skip_shared_memory_build
from ds_compress.examples.launch import environment, free_port

from .engines import quiet

TOKENS, HELD_OUT = 256, 24


def prepare(folder: Path) -> None:
    """The original in stock form as `folder/original`, and the text as tokens: {training, held_out}.json."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = assets.fetch(assets.SMOLLM2)
    text = (assets.fetch(assets.PYTHON_DOCS) / assets.PYTHON_DOCS_FILE).read_text()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=assets.SMOLLM2_FILE)
    unpacked = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=assets.SMOLLM2_FILE, dtype=torch.float32
    )
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(folder / "original")
    tokenizer.save_pretrained(folder / "original")
    # Every tenth stretch is held out; stretches lie far apart, so that no page is in both.
    stretches = [text[at : at + 20_000] for at in range(0, len(text), 20_000)]
    for name, chosen, count in (
        ("training", [s for i, s in enumerate(stretches) if i % 10], 1 << 30),
        ("held_out", stretches[::10], HELD_OUT),
    ):
        rows = [row for stretch in chosen for row in _rows(tokenizer(stretch)["input_ids"])]
        step = max(1, len(rows) // count)
        (folder / f"{name}.json").write_text(json.dumps(rows[::step][:count]))


def _rows(tokens: list[int]) -> list[list[int]]:
    return [tokens[at : at + TOKENS] for at in range(0, len(tokens) - TOKENS + 1, TOKENS)]


def rows(folder: Path, name: str) -> torch.Tensor:
    """[sequences, tokens] of `prepare`: "training" or "held_out"."""
    return torch.tensor(json.loads((folder / f"{name}.json").read_text()))


def original(folder: Path) -> Any:
    """The model of `prepare`, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "original", dtype=torch.float32)


def deepspeed_config(batch: int, lr: float, **optimizer: Any) -> dict[str, Any]:
    """ZeRO-2 and AdamW, bf16 under autocast; without a schedule of the learning rate."""
    parameters = {"lr": lr, "weight_decay": 0.01, "torch_adam": True, **optimizer}
    return {
        "train_batch_size": batch,
        "optimizer": {"type": "AdamW", "params": parameters},
        "zero_optimization": {"stage": 2},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }


def start_process(keep_memory: bool = True) -> None:
    """What each process does first. keep_memory: what is freed stays, for models that are small beside the memory."""
    import deepspeed

    quiet()
    if keep_memory:
        keep_freed_memory()
    skip_shared_memory_build()
    deepspeed.init_distributed()


def launch(module: str, options: Sequence[str], processes: int, log: Path) -> None:
    """`python -m benchmarks.<module>` through the launcher; ends this program where that fails."""
    # Without --num_gpus the launcher starts one process per NUMA node.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
    command += ["--master_port", str(free_port()), "--module", f"{__package__}.{module}", *options]
    with open(log, "w") as file:
        code = subprocess.run(command, env=environment(), stdout=file, stderr=sys.stderr).returncode
    if code != 0:
        sys.exit(f"{module} {' '.join(options)} ended with code {code}: see {log}")
