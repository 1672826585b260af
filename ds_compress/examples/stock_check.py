"""Loads saved classifiers with nothing but torch and transformers, and measures them.

    python stock_check.py sentences.json MODEL_FOLDER [MODEL_FOLDER ...]

A process of its own: run by its path, so that neither ds_compress nor DeepSpeed is imported. Prints one JSON
object {folder: figures} with the accuracy on the sentences, the differences of the logits to those in the
folder's logits.safetensors, parameters, non-zeros, bytes and the latency of a batch of 32 x 40 tokens.
`sentences.json` has "tokens" (lists of ids), "labels", "batches" (row numbers of each batch) and "pad_id".
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

LATENCY_BATCH, LATENCY_TOKENS, LATENCY_ROUNDS = 32, 40, 15


def main() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sentences = json.loads(Path(sys.argv[1]).read_text())
    folders = sys.argv[2:]
    models = {folder: AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in folders}
    figures = {folder: describe(model, Path(folder), sentences) for folder, model in models.items()}
    for folder, milliseconds in latencies(models).items():
        figures[folder]["latency_ms"] = milliseconds
    strangers = [name for name in ("ds_compress", "deepspeed") if name in sys.modules]
    if strangers:
        sys.exit(f"this process was to use stock transformers only, but something imported {strangers}")
    print(json.dumps(figures))


def describe(model: Any, folder: Path, sentences: dict[str, Any]) -> dict[str, float]:
    logits = predict(model, sentences, f"checking {folder.name}")
    right = logits.argmax(-1) == torch.tensor(sentences["labels"])
    parameters = list(model.parameters())
    figures: dict[str, float] = {
        "accuracy": right.double().mean().item(),
        "parameters": sum(p.numel() for p in parameters),
        "non_zeros": sum(int(torch.count_nonzero(p)) for p in parameters),
        "bytes": (folder / "model.safetensors").stat().st_size,
    }
    for name, recorded in load_file(folder / "logits.safetensors").items():
        figures[f"difference_of_{name}"] = (logits - recorded).abs().max().item()
    return figures


@torch.inference_mode()
def predict(model: Any, sentences: dict[str, Any], title: str) -> torch.Tensor:
    """fp32 [sentences, classes], in batches of the same rows as in training: only so can bits be equal."""
    logits = torch.empty(len(sentences["labels"]), model.config.num_labels)
    for rows in tqdm(sentences["batches"], desc=title, unit="batch", mininterval=interval()):
        chosen = [torch.tensor(sentences["tokens"][row]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(chosen, batch_first=True, padding_value=sentences["pad_id"])
        mask = pad([torch.ones_like(ids) for ids in chosen], batch_first=True)
        logits[rows] = model(input_ids=ids, attention_mask=mask).logits
    return logits


@torch.inference_mode()
def latencies(models: dict[str, Any]) -> dict[str, float]:
    """Median wall milliseconds of one batch on one thread; the models take turns, round by round."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1_000, 20_000, (LATENCY_BATCH, LATENCY_TOKENS), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(LATENCY_ROUNDS), desc="latency", unit="round", mininterval=interval()):
        for name, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}


def interval() -> float:
    return 0.5 if sys.stderr.isatty() else 10.0


if __name__ == "__main__":
    main()
