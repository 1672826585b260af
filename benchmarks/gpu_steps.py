"""Whole training steps on one device: a BERT-base and a 1B Llama under ZeRO 0 to 3, plain DeepSpeed and compressed.

    python -m benchmarks.gpu_parts steps --output FILE [--quick --device cpu]

Weights and batches are random, bf16 with fp32 masters, torch's AdamW, one process (world size 1), no gradient
checkpointing. Engines come one after the other, so that each has the device's memory to itself. A step's time is the
median over steps between two events on the stream, so time in which the device waits for Python counts; peak memory is
what torch had allocated at most during those steps, the weights and the optimizer included.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from .gpu_parts import Report
from .record import Figures

WARM_UP, STEPS = 4, 12
PLAIN = "plain"


@dataclass(frozen=True)
class Workload:
    """A model and its batch. `modules` names the layers that are compressed."""

    name: str
    model: Callable[[], Any]
    vocabulary: int
    batch: int
    tokens: int
    modules: str
    stages: tuple[int, ...]


def bert(**size: int) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def llama(**size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True, use_cache=False))


# Of the shape of Llama 3.2 1B: 1.24 billion parameters, 0.97 of them in the layers.
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA_1B |= {"num_attention_heads": 32, "num_key_value_heads": 8}
TINY_BERT = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_BERT |= {"num_attention_heads": 2}
TINY_LLAMA = {**TINY_BERT, "num_key_value_heads": 1}

# The stages that most people train with come first.
WORKLOADS = (
    Workload("BERT-base", bert, 30522, 32, 256, r"encoder\.layer", (2, 0, 3, 1)),
    Workload("Llama 1B", partial(llama, **LLAMA_1B), 128256, 4, 1024, r"layers\.\d+\.", (2, 3, 0, 1)),
)
QUICK = (
    Workload("tiny BERT", partial(bert, **TINY_BERT), 512, 2, 16, r"encoder\.layer", (2, 0)),
    Workload("tiny Llama", partial(llama, **TINY_LLAMA), 512, 2, 16, r"layers\.\d+\.", (3, 1)),
)


def blocks(modules: str) -> dict[str, dict[str, Any] | None]:
    """{variant: compression_training}; pruned to half from the second step on, the mask then stays.

    "integer products": the forward of training multiplies the 8-bit codes themselves.
    """

    def one(shared: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        groups = {"layers": {"params": params, "modules": [modules]}}
        return {"shared_parameters": {"enabled": True, **shared}, "different_groups": groups}

    def quantized(kernel: str) -> dict[str, Any]:
        weights = {"quantize_weight_in_forward": True, "granularity": "per_channel", "kernel": kernel}
        return {
            "weight_quantization": one(weights, {"start_bits": 8, "target_bits": 8}),
            "activation_quantization": one({"range_calibration": "dynamic"}, {"bits": 8}),
        }

    schedule = {"method": "l1", "schedule_offset": 0, "schedule_offset_stride": 1000, "schedule": "linear"}
    pruned = {"sparse_pruning": one({**schedule, "schedule_offset_end": 2}, {"dense_ratio": 0.5})}
    return {
        PLAIN: None,
        "W8A8": quantized("float"),
        "pruned to half": pruned,
        "W8A8, integer products": quantized("int8"),
    }


def measure(device: torch.device, quick: bool, report: Report) -> Figures:
    """{"<model>, ZeRO-<stage>, <variant>": {"ms / step", "ratio to plain", "peak MB", ...}}.

    A variant that fails has the figure "failed" instead, and the others go on.

    Raises:
        RuntimeError: at the end, naming the variants that failed.
    """
    start(device)
    found: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for workload, stage, variant, block in runs(QUICK if quick else WORKLOADS):
        name = f"{workload.name}, ZeRO-{stage}, {variant}"
        before = {id(tensor) for tensor in tensors_of(device)}
        try:
            figures = steps(workload, stage, block, device, quick)
        except Exception as error:  # whatever it is, the next variant is worth trying
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name} failed: {failed[name]}", flush=True)
            found[name] = {"failed": 1}
        else:
            plain = found.get(f"{workload.name}, ZeRO-{stage}, {PLAIN}", {})
            found[name] = {"failed": 0} | beside_plain(figures, plain)
            print(name, found[name], flush=True)
        report(found)
        free(device, before)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found)} failed: {failed}")
    return found


def runs(workloads: tuple[Workload, ...]) -> Iterator[tuple[Workload, int, str, dict[str, Any] | None]]:
    """Each model's first stage, then each model's second, ..., all variants of a stage together."""
    for turn in range(max(len(workload.stages) for workload in workloads)):
        for workload in workloads:
            for variant, block in blocks(workload.modules).items():
                yield workload, workload.stages[turn], variant, block


def start(device: torch.device) -> None:
    """A process group of this process alone."""
    from .engines import start_single_process

    if device.type == "cuda":
        os.environ.setdefault("DS_COMPRESS_CUDA", "1")
        torch.cuda.set_device(device)
    start_single_process()


def steps(
    workload: Workload, stage: int, block: dict[str, Any] | None, device: torch.device, quick: bool
) -> dict[str, float]:
    """Time and memory of one engine's steps."""
    import deepspeed

    import ds_compress  # noqa: F401  (teaches DeepSpeed the key)

    torch.manual_seed(0)
    with device:
        model = workload.model().to(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": workload.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }
    if block is not None:
        config["compression_training"] = block
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.train()
    ids = torch.randint(0, workload.vocabulary, (workload.batch, workload.tokens), device=device)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    try:
        for _ in range(2 if quick else WARM_UP):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        spent = statistics.median(seconds(step, device, 2 if quick else STEPS))
        rate = workload.batch * workload.tokens / spent
        figures = {"ms / step": 1e3 * spent, "tokens / s": rate, "parameters, million": count / 1e6}
        if device.type == "cuda":
            figures["peak MB"] = torch.cuda.max_memory_allocated(device) / 1e6
        return figures
    finally:
        engine.destroy()


def seconds(step: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """What each of some steps took."""
    if device.type != "cuda":
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
        return taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def beside_plain(figures: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
    """With the ratios to the plain engine of the same stage, where that one is known."""
    pairs = {"ms / step": "ratio to plain", "peak MB": "peak, ratio to plain"}
    ratios = {name: figures[of] / plain[of] for of, name in pairs.items() if of in figures and of in plain}
    return figures | ratios


def free(device: torch.device, before: set[int] | None = None) -> None:
    """Gives back the memory of what is gone; with `before`, also of what an engine has left behind.

    An engine of ZeRO-3 lives on after `destroy`, in a cycle that Python's collector does not see. So whatever has come
    since `before` (`tensors_of`) is emptied.
    """
    gc.collect()
    if before is not None:
        for tensor in tensors_of(device):
            if id(tensor) not in before:
                with suppress(RuntimeError):  # memory that torch did not take itself
                    tensor.untyped_storage().resize_(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def tensors_of(device: torch.device) -> list[torch.Tensor]:
    """Every tensor on the device that Python knows."""
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == device.type]
