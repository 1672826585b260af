"""A Hugging Face Trainer script with our one import; stage and block come from the JSON given to `deepspeed=`."""

import json
import sys

import deepspeed.ops
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import ds_compress  # noqa: F401
from tests.ending import end

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
config_path, model_path, output = sys.argv[-3:]
arguments = TrainingArguments(
    output_dir=output,
    deepspeed=config_path,
    use_cpu=True,
    max_steps=6,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    report_to=[],
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    average_tokens_across_devices=False,
)
model = AutoModelForSequenceClassification.from_pretrained(model_path)
generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, 128, (96, 12), generator=generator)
data = [
    {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": (row[0] > 64).long()} for row in ids
]
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
engine = trainer.model_wrapped
trainer.save_model(output)
if trainer.is_world_process_zero():
    report = {
        "world_size": torch.distributed.get_world_size(),
        "applied": engine.compression.applied_steps,
        "metrics": engine.compression.metrics(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    with open(f"{output}/report.json", "w") as file:
        json.dump(report, file)
end()
