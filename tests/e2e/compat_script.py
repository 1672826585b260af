"""A script for the removed library as its users had it; the test replaces `deepspeed.compression` in this text."""

import argparse
import json

import deepspeed
import deepspeed.ops
import torch
from deepspeed.compression import compression_scheduler, convert_conv1d_to_linear
from deepspeed.compression.basic_layer import LinearLayer_Compress
from deepspeed.compression.compress import init_compression, redundancy_clean
from deepspeed.compression.helper import recursive_getattr
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from tests.ending import end

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--model", required=True)
parser.add_argument("--output", required=True)
deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

# Two minutes of C++ build for collectives that gloo carries as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
teacher = AutoModelForSequenceClassification.from_pretrained(arguments.model)
model = AutoModelForSequenceClassification.from_pretrained(arguments.model)
model = convert_conv1d_to_linear(model, Conv1D)
model = init_compression(model, arguments.deepspeed_config, teacher_model=teacher)
before = sum(parameter.numel() for parameter in model.parameters())
prepared = [name for name, module in model.named_modules() if isinstance(module, LinearLayer_Compress)]

engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
scheduler = compression_scheduler(engine.module, arguments.deepspeed_config)
engine.train()
generator = torch.Generator().manual_seed(torch.distributed.get_rank())
for _ in range(6):
    ids = torch.randint(0, 128, (4, 12), generator=generator)
    loss = engine(input_ids=ids, attention_mask=torch.ones_like(ids), labels=(ids[:, 0] > 64).long()).loss
    engine.backward(loss)
    engine.step()
    scheduler.step()
model = redundancy_clean(engine, arguments.deepspeed_config)
if torch.distributed.get_rank() == 0:
    report = {
        "world_size": torch.distributed.get_world_size(),
        "steps": scheduler.training_steps,
        "prepared": prepared,
        "parameters": [before, sum(parameter.numel() for parameter in model.parameters())],
        "query": recursive_getattr(model, prepared[0]).weight.shape[0],
    }
    with open(arguments.output, "w") as file:
        json.dump(report, file)
end()
