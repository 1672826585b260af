"""Peak memory and time of a distillation step on a device: logits in chunks beside whole ones.

    python -m benchmarks.gpu_parts memory --output FILE

The step is that of `benchmarks.logits_distillation`: student and teacher have the shape of SmolLM2-135M (vocabulary
49,152), sequences of 512 tokens, bf16, gradient checkpointing.
"""

from __future__ import annotations

import torch

from .gpu_parts import Report
from .gpu_steps import TINY_LLAMA, free, seconds, start
from .logits_distillation import SMOLLM2_135M, TOKENS, VARIANTS, WARM_UP, step_of
from .record import Figures

BATCH, STEPS = 16, 5


def measure(device: torch.device, quick: bool, report: Report) -> Figures:
    """{"distillation, whole" and "distillation, chunked": {"ms / step", and on CUDA "peak MB" and "above rest MB"}}.

    "above rest" is the peak less what is allocated between steps.
    """
    start(device)
    size, tokens, batch = (TINY_LLAMA, 16, 2) if quick else (SMOLLM2_135M, TOKENS, BATCH)
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        step = step_of(variant, batch, str(device), size, tokens)
        for _ in range(WARM_UP):
            step()
        free(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            rest = torch.cuda.memory_allocated(device)
        taken = sorted(seconds(step, device, 2 if quick else STEPS))
        figures = {"ms / step": 1e3 * taken[len(taken) // 2]}
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            figures |= {"peak MB": peak / 1e6, "above rest MB": (peak - rest) / 1e6}
        found[f"distillation, {variant}"] = figures
        report(found)
        del step
        free(device)
    whole, chunked = (found[f"distillation, {variant}"] for variant in VARIANTS)
    chunked |= {
        f"{figure.removesuffix(' MB')}, ratio to whole": chunked[figure] / whole[figure] for figure in whole
    }
    return found
