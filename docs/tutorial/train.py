"""Fine-tunes a text classifier. Whether it is compressed is up to the JSON."""

import argparse
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ds_compress
from ds_compress.run import leave_process_group

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder or name of a pretrained encoder")
parser.add_argument(
    "--data", default=str(Path(__file__).with_name("reviews.tsv")), help="label, tab, sentence"
)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--save", help="folder for a plain model that stock transformers loads")
parser.add_argument("--export", help="folder for the compressed model")
parser.add_argument("--local_rank", type=int, default=-1)  # set by the launcher
args = deepspeed.add_config_arguments(parser).parse_args()

deepspeed.init_distributed()
torch.manual_seed(0)
rank, processes = dist.get_rank(), dist.get_world_size()
tokenizer = AutoTokenizer.from_pretrained(args.model)
lines = [line.split("\t") for line in Path(args.data).read_text().splitlines()]
training, held_out = lines[100:], lines[:100]


def batch_of(rows):
    batch = tokenizer([text for _, text in rows], padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([int(label) for label, _ in rows])
    return batch.to(engine.device)


model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())

order = torch.randperm(len(training)).tolist()  # the same in every process
size = engine.train_batch_size()
engine.train()
for step in range(args.steps):
    rows = [training[order[(step * size + i) % len(order)]] for i in range(size)]
    loss = engine(**batch_of(rows[rank::processes])).loss
    engine.backward(loss)
    engine.step()
    if rank == 0 and (step + 1) % 100 == 0:
        print(f"step {step + 1}: loss {loss.item():.2f}")

engine.eval()
batch = batch_of(held_out)
with torch.no_grad():
    right = engine.module(**batch).logits.argmax(-1) == batch["labels"]
if rank == 0:
    print(f"held-out accuracy: {right.float().mean().item():.2f}")

if args.save:
    weights = ds_compress.export_state_dict(engine)  # a collective: every process calls it
    if rank == 0:
        model.save_pretrained(args.save, state_dict=weights)
        tokenizer.save_pretrained(args.save)
if args.export:
    report = ds_compress.export(engine, args.export, tokenizer=tokenizer)
    if rank == 0:
        print(report)
leave_process_group()
