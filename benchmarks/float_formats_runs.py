"""One run of `float_formats`: what is quantized how, trained on what, and measured.

A run is a scheme of `SCHEMES` and a method of `METHODS`:

    ptq    rounded: a few steps with a learning rate of 0, in which static ranges are observed
    qat    quantization-aware training: the task's loss
    qad    quantization-aware distillation: forward KL at temperature 1 to the unquantized model, no task loss
           (arXiv 2601.20088)
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import kept_runs, smollm2

PLAIN = "unquantized"
PRUNED = ("half the FFN, NVFP4", "half the FFN")
METHODS = ("ptq", "qat", "qad")
ROWS, CALIBRATION_STEPS = 4, 4
FP8, FP8_SLOWLY = "FP8_DYNAMIC", "FP8_DYNAMIC, half the rate"
PEAK_LR = {FP8: 1e-4, FP8_SLOWLY: 5e-5}
OTHER_PEAK_LR = 3e-4
"""A weight has to move by a step of its grid, and steps of 8-bit floats are finer."""

# Stock tools want whole groups: of 32 columns, because 128 do not divide the 576 of this model.
INT4: dict[str, Any] = {
    "weight_quantization": {
        "shared_parameters": {
            "enabled": True,
            "quantize_weight_in_forward": True,
            "granularity": "per_column_group",
            "group_size": 32,
            "excluded_modules": ["lm_head"],
        },
        "different_groups": {"all": {"params": {"target_bits": 4}}},
    }
}
SCHEMES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "NVFP4": {"scheme": "NVFP4"},
    FP8: {"scheme": "FP8_DYNAMIC"},
    FP8_SLOWLY: {"scheme": "FP8_DYNAMIC"},
    "MXFP4": {"scheme": "MXFP4"},
    "NVFP4A16": {"scheme": "NVFP4A16"},
    "W4A16, groups of 32": INT4,
    PRUNED[0]: {"scheme": "NVFP4"},
    PRUNED[1]: {},
}
QAD = {
    "enabled": True,
    "self_teacher": {"weights": "initial"},
    "teacher_dtype": "bf16",
    "teacher_zero_stage": 0,
    "task_loss_weight": 0.0,
    "losses": {"logits": {}},
}


@dataclass(frozen=True)
class Run:
    """`steps`: of training, for ptq those of any other run that it is compared with."""

    scheme: str
    method: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its file."""
        words = self.scheme.replace(",", "").replace(" ", "-").lower()
        return f"{words}_{self.method}_seed{self.seed}_steps{self.steps}"

    def block(self) -> dict[str, Any]:
        """Its `compression_training`."""
        block = dict(SCHEMES[self.scheme])
        if self.method == "qad":
            block["distillation"] = QAD
        if self.scheme in PRUNED:
            block["row_pruning"] = {"shared_parameters": _half(self.steps)}
        return block

    @property
    def peak_lr(self) -> float:
        return 0.0 if self.method == "ptq" else PEAK_LR.get(self.scheme, OTHER_PEAK_LR)

    def config(self) -> dict[str, Any]:
        """The whole JSON."""
        config = smollm2.deepspeed_config(ROWS, self.peak_lr, betas=[0.9, 0.95], weight_decay=0.0)
        if self.peak_lr:
            settings = {"total_num_steps": self.steps, "warmup_num_steps": 4, "warmup_type": "linear"}
            settings |= {"warmup_min_ratio": 0.2, "cos_min_ratio": 0.01}
            config["scheduler"] = {"type": "WarmupCosineLR", "params": settings}
        block = self.block()
        return config | ({"compression_training": block} if block else {})


def _half(steps: int) -> dict[str, Any]:
    """Half of the FFN in the first third of the steps, then removed."""
    return {
        "enabled": True,
        "method": "taylor",
        "dense_ratio": 0.5,
        "round_to": 64,
        "schedule": "linear",
        "schedule_offset": 4,
        "schedule_offset_end": max(5, steps // 3),
        "schedule_offset_stride": max(1, steps // 24),
        "shrink_at_end_of_schedule": True,
    }


def train(folder: Path, run: Run) -> None:
    """In a process of its own: trains, measures, and writes `folder/runs/<name>.json` when all is done."""
    import deepspeed
    import torch.distributed as dist

    from ds_compress.examples.train import progress_bar

    smollm2.start_process()
    torch.manual_seed(run.seed)
    training, held_out = smollm2.rows(folder, "training"), smollm2.rows(folder, "held_out")
    model = smollm2.original(folder)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=run.config())
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(run.seed))
    steps = _steps(run)
    engine.train()
    seconds = []
    for step in progress_bar(range(steps), steps, f"    {run.name}"):
        start = time.process_time()
        batch = training[order[(step * ROWS + torch.arange(ROWS)) % len(order)]]
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        seconds.append(time.process_time() - start)
    figures = measure(engine.module, smollm2.original(folder), held_out)
    figures["parameters"] = float(sum(p.numel() for p in engine.module.parameters()))
    if run.method != "ptq":
        figures |= {"steps": float(steps), "tokens": float(steps * ROWS * smollm2.TOKENS)}
        figures["peak learning rate"] = run.peak_lr
        figures["CPU seconds per step"] = sum(seconds[1:]) / max(1, steps - 1)
    kept_runs.keep(folder, run.name, figures)
    dist.destroy_process_group()


def _steps(run: Run) -> int:
    if run.method != "ptq":
        return run.steps
    return 0 if run.scheme == PLAIN else CALIBRATION_STEPS


@torch.no_grad()
def measure(model: Any, reference: Any, rows: torch.Tensor, at_once: int = 2) -> dict[str, float]:
    """Perplexity, and the mean over tokens of KL(reference || model), in bf16 as in training."""
    model.eval()
    reference.eval()
    loss = divergence = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        for batch in rows.split(at_once):
            ours, theirs = (
                F.log_softmax(m(input_ids=batch, use_cache=False).logits[:, :-1].float(), dim=-1)
                for m in (model, reference)
            )
            loss -= ours.gather(-1, batch[:, 1:, None]).mean().item() * len(batch)
            divergence += F.kl_div(ours, theirs, log_target=True, reduction="none").sum(
                -1
            ).mean().item() * len(batch)
    return {
        "perplexity": math.exp(loss / len(rows)),
        "KL to the unquantized model": divergence / len(rows),
    }
