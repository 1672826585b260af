"""The parts of `gpu_check`, in the order of their worth, and how one of them runs in a process of its own.

    python -m benchmarks.gpu_parts NAME_OR_MODULE --output FILE [--quick] [--device cpu]

A part is a module with `measure(device, quick) -> {variant: {figure: value}}`. One whose `measure` also takes `report`
calls it with everything measured so far, again and again: FILE then holds that much when the part is cut off.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_compress.files import atomic_write

from .record import Figures

Report = Callable[[Figures], None]


@dataclass(frozen=True)
class Part:
    """One part: its module, and the seconds that are kept for it of a check of eight minutes."""

    name: str
    module: str
    seconds: float
    what: str


PARTS = (
    Part("build", "benchmarks.gpu_build", 80, "the library with CUDA kernels compiles and loads"),
    Part(
        "ceilings", "benchmarks.gpu_ceilings", 15, "bandwidth of a copy; rates of bf16, int8 and fp8 products"
    ),
    Part("products", "benchmarks.products_cuda", 75, "integer and fp8 linear layers beside cuBLASLt"),
    Part("elementwise", "benchmarks.gpu_elementwise", 50, "masks, quantization, payloads beside a copy"),
    Part("tests", "benchmarks.gpu_tests", 150, "pytest -m gpu"),
    Part("steps", "benchmarks.gpu_steps", 85, "whole steps of a BERT-base and a 1B Llama, ZeRO 0 to 3"),
    Part(
        "memory",
        "benchmarks.gpu_memory",
        25,
        "peak memory of distillation with whole and with chunked logits",
    ),
)


ABSENT = 3  # the exit status when there is no such module


def run_part(module: str, device: str, quick: bool, output: Path) -> None:
    """Measures one part in this process; its figures so far are in `output` all the while."""
    import torch

    def report(figures: Figures) -> None:
        write_json(output, figures)

    measure = importlib.import_module(module).measure
    extra: dict[str, Any] = {"report": report} if "report" in inspect.signature(measure).parameters else {}
    # With its index: some calls of torch.cuda insist on one.
    report(measure(torch.device(device, 0) if device == "cuda" else torch.device(device), quick, **extra))


def write_json(path: Path, content: object) -> None:
    """Replaces `path` by `content`: whoever reads it meanwhile, or after a kill, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    module = {part.name: part.module for part in PARTS}.get(args.name, args.name)
    if importlib.util.find_spec(module) is None:
        print(f"there is no {module}")
        sys.exit(ABSENT)
    run_part(module, args.device, args.quick, args.output)


if __name__ == "__main__":
    main()
