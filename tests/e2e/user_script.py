"""A training script as a user has it: it has never heard of ds_compress."""

import argparse
import json

import deepspeed
import deepspeed.ops
import torch
from transformers import AutoModelForSequenceClassification

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=6)
deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

# Two minutes of C++ build for collectives that gloo carries as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(arguments.model)
engine, _, _, _ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
engine.train()
generator = torch.Generator().manual_seed(torch.distributed.get_rank())
losses = []
for _ in range(arguments.steps):
    ids = torch.randint(0, 128, (4, 12), generator=generator)
    loss = engine(input_ids=ids, attention_mask=torch.ones_like(ids), labels=(ids[:, 0] > 64).long()).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
engine.save_checkpoint(arguments.output)
compression = getattr(engine, "compression", None)
if torch.distributed.get_rank() == 0:
    report = {
        "losses": losses,
        "world_size": torch.distributed.get_world_size(),
        "stages": sorted(compression.techniques) if compression else [],
        "metrics": compression.metrics() if compression else {},
        "layers": model.config.num_hidden_layers,
        "script": __file__,
        "module": __name__,
    }
    with open(f"{arguments.output}/report.json", "w") as file:
        json.dump(report, file)
