"""The elementwise kernels as a part of `gpu_check`: `benchmarks.elementwise_cuda`, group by group.

python -m benchmarks.gpu_parts elementwise --output FILE
"""

from __future__ import annotations

import torch

from ds_compress.ops import library, reference
from ds_compress.ops.sizes import payload_bytes

from . import elementwise_cuda, elementwise_runs
from .gpu_parts import Report
from .record import Figures

NUMEL = 25_165_824


def measure(device: torch.device, quick: bool, report: Report) -> Figures:
    """{operation: {"ms", "roofline ms", "GB/s", "percent of a copy"}}, and how many results were wrong."""
    ops = library.native()
    numel, rounds = (1 << 16, 1) if quick else (NUMEL, 15)
    if quick:
        elementwise_runs.CACHE_BYTES = 0  # no rotation through hundreds of megabytes
    wrong = [] if quick else elementwise_cuda.wrong(ops, reference, payload_bytes, device)
    for name in wrong:
        print(f"differs from the reference: {name}")
    found: dict[str, dict[str, float]] = {"against the reference": {"wrong": len(wrong)}}
    for group in elementwise_cuda.groups(ops, payload_bytes, numel, device):
        runs = [*elementwise_runs.peers(numel, device), *group]
        figures = elementwise_cuda.report(runs, elementwise_cuda.measure(runs, rounds, device))
        found |= {name: row for name, row in figures.items() if name not in found}
        report(found)
        del runs
    return found
