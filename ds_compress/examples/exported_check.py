"""Measures exported folders beside the model that they came from, in a process that has trained nothing.

    python -m ds_compress.examples.exported_check sentences.json TEACHER_FOLDER EXPORTED_FOLDER [...]

The first folder is loaded by stock transformers, the others, of format "torch", by `ds_compress.from_pretrained`.
Prints, as its last line, a JSON list with the figures of each: accuracy on the sentences (see `stock_check` for the
file), bytes of the weights, median latency of a batch of 32 x 40 tokens on one thread, and that of the structural cut
alone: the same layers with their weights read back to fp32 and their inputs left as they are. The first also in bf16,
where the CPU multiplies it: the fastest that stock transformers offers.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import ds_compress
from ds_compress.examples.cpu import keep_freed_memory
from ds_compress.examples.stock_check import LATENCY_BATCH, LATENCY_TOKENS, predict
from ds_compress.export.serve import Int8Embedding

ROUNDS = 21


def main() -> None:
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(1)
    keep_freed_memory()
    sentences = json.loads(Path(sys.argv[1]).read_text())
    folders = [Path(folder) for folder in sys.argv[2:]]
    stock = AutoModelForSequenceClassification.from_pretrained(folders[0]).eval()
    models: list[nn.Module] = [stock, *(ds_compress.from_pretrained(folder) for folder in folders[1:])]
    dense = [ds_compress.from_pretrained(folder, fused=False, activations=False) for folder in folders[1:]]
    cuts = [in_floats(model) for model in dense]
    found = []
    for folder, model in zip(folders, models, strict=True):
        logits = predict(model, sentences, folder.parent.name)
        right = logits.argmax(-1) == torch.tensor(sentences["labels"])
        weights = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
        found.append({"accuracy": right.double().mean().item(), "bytes": float(weights)})
    # A step of many seconds where the CPU has no instructions for it.
    halves = [copy.deepcopy(stock).bfloat16()] if torch.cpu._is_avx512_bf16_supported() else []
    measured = latencies([*models, *halves])
    for values, milliseconds in zip(found, measured, strict=False):
        values["latency ms"] = milliseconds
    if halves:
        found[0]["latency ms, bf16"] = measured[-1]
    for values, milliseconds in zip(found, latencies([stock, *cuts]), strict=True):
        values["latency ms of the cut alone, fp32"] = milliseconds
    print(json.dumps(found))


def in_floats(model: nn.Module) -> nn.Module:
    """A model whose linear layers are in floats, with its tables in floats, too."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Embedding):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Embedding.from_pretrained(module.weight))
    return model.eval()


@torch.inference_mode()
def latencies(models: list[nn.Module]) -> list[float]:
    """Median milliseconds of a batch; the models take turns, round by round. CPU time, for others may be at work."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1_000, 20_000, (LATENCY_BATCH, LATENCY_TOKENS), generator=generator)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for model, taken in zip(models, seconds, strict=True):
            start = time.process_time()
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            taken.append(time.process_time() - start)
    return [1e3 * statistics.median(taken[1:]) for taken in seconds]


if __name__ == "__main__":
    main()
