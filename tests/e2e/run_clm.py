"""Trains a causal language model on blocks of grouped text, as transformers' example of this name does.

run_clm.py --model_name_or_path MODEL --do_train --do_eval --output_dir OUT --deepspeed ds_config.json ...
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import chain

import deepspeed.ops
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

# Two minutes of C++ build for collectives that gloo carries as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass
class ModelArguments:
    model_name_or_path: str = field()


@dataclass
class DataTrainingArguments:
    block_size: int = field(default=16)
    max_train_samples: int = field(default=96)


def documents(vocabulary: int, seed: int, count: int = 60) -> dict:
    """Token ids of documents of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(10, 60, (count,), generator=generator).tolist()
    return {"input_ids": [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]}


def group_texts(examples: dict, block_size: int) -> list:
    concatenated = list(chain(*examples["input_ids"]))
    total = len(concatenated) // block_size * block_size
    blocks = [concatenated[start : start + block_size] for start in range(0, total, block_size)]
    return [{"input_ids": block, "attention_mask": [1] * block_size, "labels": block} for block in blocks]


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(sys.argv[1:])
    set_seed(training_args.seed)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config)
    train_dataset = group_texts(documents(config.vocab_size, seed=1), data_args.block_size)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset[: data_args.max_train_samples],
        eval_dataset=group_texts(documents(config.vocab_size, seed=2, count=6), data_args.block_size),
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
