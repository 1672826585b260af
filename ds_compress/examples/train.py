"""Fine-tunes a text classifier on the movie review sentences with DeepSpeed, as a user would.

    deepspeed --num_gpus 2 --module ds_compress.examples.train --model DIR --output DIR --steps 500 \\
        --deepspeed_config ds_configs/teacher_zero2.json

Whether and how the model is compressed is up to the `compression_training` block of the JSON: `import
ds_compress` makes DeepSpeed understand it, and the training loop knows nothing of it. The output folder gets
the model and the tokenizer as stock transformers load them, the logits of the held-out sentences
(`logits.safetensors`) and the figures of the run (`metrics.json`); with `--export torch compressed-tensors` also those
formats, each in a folder of its name. A model that stock transformers would misread is only exported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import ds_compress
from ds_compress.examples import movie_reviews
from ds_compress.examples.cpu import keep_freed_memory, skip_shared_memory_build
from ds_compress.files import write_tensors
from ds_compress.run import leave_process_group
from ds_compress.structure.vanilla_hf import vanilla_hf_obstacles

EVALUATION_BATCH = 64


def main() -> None:
    args = parse_arguments()
    quiet()
    keep_freed_memory()
    skip_shared_memory_build()
    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training, held_out = movie_reviews.load(tokenizer)
    training = training.every(args.every)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    if args.freeze_embeddings:
        model.base_model.embeddings.requires_grad_(False)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=trainable)

    torch.manual_seed(1_000 * args.seed + dist.get_rank())  # dropout, not the same in every process
    start = time.perf_counter()
    losses = train(engine, training, args)
    seconds = time.perf_counter() - start

    logits = {"logits": evaluate(engine, held_out, args.title)}
    weights = ds_compress.export_state_dict(engine)
    exported = export_all(engine, tokenizer, Path(args.output), args.export)
    if stop_activation_quantization(engine):
        logits["logits_exact_activations"] = evaluate(engine, held_out, args.title)
    figures = {
        "accuracy": accuracy(logits["logits"], held_out.labels),
        "held_out": len(held_out),
        "sentences": len(training),
        "steps": len(losses),
        "batch": engine.train_batch_size(),
        "processes": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "seconds_per_step": seconds / len(losses),
        "losses": losses,
    }
    if dist.get_rank() == 0:
        save(engine.module, weights, tokenizer, Path(args.output), logits, {**figures, "exported": exported})
    dist.barrier()
    leave_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or name of a pretrained encoder")
    parser.add_argument("--output", required=True, help="folder to write the trained model to")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="train on every N-th sentence only, as if no other had a label",
    )
    parser.add_argument(
        "--freeze_embeddings", action="store_true", help="half of a small encoder, and rarely worth it"
    )
    parser.add_argument("--export", nargs="*", default=[], help="formats of ds_compress.export")
    parser.add_argument("--title", default="training", help="what the progress bar says")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def train(
    engine: deepspeed.DeepSpeedEngine, sentences: movie_reviews.Sentences, args: argparse.Namespace
) -> list[float]:
    """The loss of every step, averaged over the processes."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    batches = movie_reviews.training_batches(sentences, engine.train_batch_size(), args.steps, args.seed)
    micro = engine.train_micro_batch_size_per_gpu()
    losses = []
    engine.train()
    for rows in progress_bar(batches, args.steps, args.title):
        length = max(len(sentences.tokens[row]) for row in rows)
        mine = rows[rank::processes]
        for first in range(0, len(mine), micro):
            micro_batch = sentences.batch(mine[first : first + micro], length)
            loss = engine(**to_device(micro_batch, engine.device)).loss
            engine.backward(loss)
            engine.step()
        losses.append(loss.detach().float())
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    return (mean / processes).tolist()


@torch.no_grad()
def evaluate(
    engine: deepspeed.DeepSpeedEngine, sentences: movie_reviews.Sentences, title: str
) -> torch.Tensor:
    """Logits of all sentences, in their order, fp32 [sentences, classes], the same in every process.

    In the precision of the weights: the engine's own forward would put it under autocast again.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    batches = movie_reviews.evaluation_batches(sentences, EVALUATION_BATCH)
    batches += [[]] * (-len(batches) % processes)  # under ZeRO-3 every process must run every forward
    logits = torch.zeros(len(sentences), engine.module.config.num_labels, device=engine.device)
    engine.eval()
    for rows in progress_bar(batches[rank::processes], len(batches) // processes, f"{title}: held-out"):
        batch = to_device(sentences.batch(rows), engine.device)
        output = engine.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits[rows] = output[: len(rows)].float()
    dist.all_reduce(logits)
    return logits.cpu()


def export_all(
    engine: deepspeed.DeepSpeedEngine, tokenizer: Any, folder: Path, formats: list[str]
) -> dict[str, Any]:
    """Writes and checks each format beside `folder`, to be moved into it; {format: bytes on disk}."""
    sizes = {}
    for name in formats:
        # What is not quantized takes 16 bits where another program runs it, 32 where we do.
        dtype = torch.float16 if name == "compressed-tensors" else None
        target = beside(folder, name)
        report = ds_compress.export(
            engine, target, format=name, tokenizer=tokenizer, dtype=dtype, overwrite=True
        )
        sizes[name] = report.bytes
    return sizes


def beside(folder: Path, name: str) -> Path:
    return folder.with_name(f".{folder.name}-{name}")


def stop_activation_quantization(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Leaves activations as they are from here on, as a stock model will; False if nothing quantized them."""
    techniques = engine.compression.techniques if hasattr(engine, "compression") else {}
    if "activation_quantization" not in techniques:
        return False
    techniques["activation_quantization"].detach()
    return True


def save(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: Any,
    folder: Path,
    logits: dict[str, torch.Tensor],
    figures: dict[str, Any],
) -> None:
    """Writes the output folder as a whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for name in figures["exported"]:
        beside(folder, name).rename(unfinished / name)
    if not vanilla_hf_obstacles(model):
        model.save_pretrained(unfinished, state_dict=weights)
    tokenizer.save_pretrained(unfinished)
    write_tensors(unfinished / "logits.safetensors", logits)
    (unfinished / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")
    unfinished.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def accuracy(logits: torch.Tensor, labels: list[int]) -> float:
    return (logits.argmax(-1) == torch.tensor(labels)).double().mean().item()


def quiet() -> None:
    """Nothing but errors and our own progress bar."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def progress_bar(items: Any, total: int, title: str) -> Any:
    """A bar on process 0, and nothing on the others; where there is no terminal, a line every ten seconds."""
    return tqdm(items, total=total, desc=title, disable=dist.get_rank() != 0, file=sys.stderr, unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 10.0, dynamic_ncols=True)  # fmt: skip


if __name__ == "__main__":
    main()
