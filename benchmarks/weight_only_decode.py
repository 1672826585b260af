"""Decoding with weights of 4 bits through `model.generate`, beside torch in fp32 and bf16, and llama.cpp's Q4_0.

    python -m benchmarks.weight_only_decode [--llama-cpp PYTHON] [--layers 2] [--tokens 16] [--rounds 7] [--record]

A Llama of random weights, 2048 / 5632 wide with 32 heads and a vocabulary of 4096, greedy, a prompt of 2 tokens
(counted on all sides), a static cache. PYTHON: an interpreter with xllamacpp and gguf, in an environment of its own;
its process is asked in turn with the runs here. All CPU time of a call counts: here that of transformers' Python,
there that of the server's sampling and bookkeeping. Ours keeps scales in fp32, 5 bits a weight in groups of 32, where
Q4_0 has 4.5.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ds_compress.export.fuse import fuse
from ds_compress.export.quantized_matrix import quantize_matrix
from ds_compress.export.serve_weight_only import WeightOnlyLinear
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.grid import Granularity, WeightGrid

from . import record
from .bandwidth import keep_freed_memory
from .timing import in_turns, measured, ratio

VOCABULARY = 4096
GROUPS = (32, 128)
LLAMA_CPP = "llama.cpp Q4_0"


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=VOCABULARY, max_position_embeddings=256, pad_token_id=0,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def served(layers: int, group: int) -> nn.Module:
    """As `ds_compress.from_pretrained` serves int4 weights in groups."""
    model = llama(layers)
    grid = WeightGrid(bits=4, granularity=Granularity.PER_COLUMN_GROUP, group_size=group)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            matrix = quantize_matrix(module.weight, FakeQuantConfig(grid))
            setattr(model.get_submodule(parent), last, WeightOnlyLinear(matrix, module.bias))
    fuse(model)
    return model


def generation(model: Any, tokens: int) -> Callable[[], object]:
    prompt = torch.tensor([[300, 301]])

    def generate() -> torch.Tensor:
        with torch.inference_mode():
            said: torch.Tensor = model.generate(
                prompt, max_new_tokens=tokens, do_sample=False, cache_implementation="static"
            )
        assert said.shape[1] == tokens + 2
        return said

    return generate


class LlamaCpp:
    """The worker's process."""

    def __init__(self, python: str, folder: Path, layers: int, threads: int) -> None:
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        command = [python, str(worker), str(folder), str(layers), str(VOCABULARY), str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self._answer("ready")

    def _answer(self, wanted: str = "") -> list[str]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if wanted in line and line.strip():
                return line.split()
        raise RuntimeError("llama.cpp's process ended")

    def seconds(self, tokens: int) -> tuple[float, float]:
        """(CPU, wall) of one generation."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        cpu, wall, count = self._answer()
        if int(count) != tokens:
            raise RuntimeError(f"llama.cpp gave {count} tokens, not {tokens}")
        return float(cpu), float(wall)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    record.add_output_arguments(parser)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has xllamacpp and gguf")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    models = {f"ours, int4 in groups of {group}": served(args.layers, group) for group in GROUPS}
    models |= {"torch fp32": llama(args.layers), "torch bf16": llama(args.layers).bfloat16()}
    runs = {name: generation(model, args.tokens) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        other = LlamaCpp(args.llama_cpp, Path(folder), args.layers, args.threads) if args.llama_cpp else None

        def spent(name: str) -> tuple[float, float]:
            return other.seconds(args.tokens) if other and name == LLAMA_CPP else measured(runs[name])

        try:
            taken = in_turns([*runs, *([LLAMA_CPP] if other else [])], spent, args.rounds)
        finally:
            if other is not None:
                other.close()
    report(taken, args)


def report(taken: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    ours = f"ours, int4 in groups of {GROUPS[0]}"
    title = f"{args.layers} layers, {args.tokens} tokens, {args.threads} thread{'s' * (args.threads > 1)}"
    made = Table("", "CPU ms", "wall ms", "times slower, CPU (quartiles)", title=title)
    everything: dict[str, dict[str, float]] = {}
    for name, times in taken.items():
        cpu, wall = ([each[i] for each in times] for i in range(2))
        slower = ratio(cpu, [each[0] for each in taken[ours]])
        everything[f"{title}: {name}"] = {
            "CPU ms": 1e3 * statistics.median(cpu),
            "wall ms": 1e3 * statistics.median(wall),
            "times slower": slower.median,
            "times slower, lower quartile": slower.low,
            "times slower, upper quartile": slower.high,
        }
        made.add_row(
            name, f"{1e3 * statistics.median(cpu):.1f}", f"{1e3 * statistics.median(wall):.1f}", str(slower)
        )
    Console(width=120).print(made)
    record.report("weight_only_decode", everything, args)


if __name__ == "__main__":
    main()
