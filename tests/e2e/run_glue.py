"""Fine-tunes a model for sequence classification, as transformers' example of this name does; no compression in sight.

run_glue.py --model_name_or_path MODEL --do_train --do_eval --output_dir OUT --deepspeed ds_config.json ...
"""

import os
import sys
from dataclasses import dataclass, field

import deepspeed.ops
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

# Two minutes of C++ build for collectives that gloo carries as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass
class DataTrainingArguments:
    max_seq_length: int = field(default=12)
    max_train_samples: int = field(default=64)
    max_eval_samples: int = field(default=20)


@dataclass
class ModelArguments:
    model_name_or_path: str = field()


class Sentences(Dataset):
    """Ids at random; the label says whether the first one is large."""

    def __init__(self, samples: int, length: int, vocabulary: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, vocabulary, (samples, length), generator=generator)
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        label = int(ids[0] > self.vocabulary // 2)
        return {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "label": label}


def compute_metrics(prediction: EvalPrediction) -> dict:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(sys.argv[1:])
    set_seed(training_args.seed)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, num_labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)
    length = data_args.max_seq_length
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=Sentences(data_args.max_train_samples, length, config.vocab_size, seed=1),
        eval_dataset=Sentences(data_args.max_eval_samples, length, config.vocab_size, seed=2),
        compute_metrics=compute_metrics,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        assert os.path.exists(os.path.join(training_args.output_dir, "config.json"))


if __name__ == "__main__":
    main()
