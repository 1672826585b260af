"""Engines on random-weight BERTs, for benchmarks that only ask for time and memory."""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.examples.cpu import keep_freed_memory, skip_shared_memory_build

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
VOCABULARY = 30522


def start_single_process() -> None:
    """A process group of this process alone, without the launcher; quiet, on one thread."""
    import deepspeed

    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    torch.set_num_threads(1)
    keep_freed_memory()
    quiet()
    skip_shared_memory_build()
    backend = deepspeed.get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed()
    # A gloo thread that outlives the interpreter aborts it.
    atexit.register(dist.destroy_process_group)


def quiet() -> None:
    """Only warnings of DeepSpeed and transformers from here on."""
    from deepspeed.utils import logger
    from transformers.utils import logging as transformers_logging

    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()


def bert(size: dict[str, int], dropout: float = 0.0) -> Any:
    """BertForSequenceClassification with random fp32 weights, the same ones at every call."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        **size, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=2
    )
    return BertForSequenceClassification(config)


def deepspeed_config(zero_stage: int, batch: int, block: dict[str, Any] | None) -> dict[str, Any]:
    """fp32 AdamW of torch at `zero_stage`, with `block` as `compression_training` unless it is None."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": 10**9,
    }
    return config if block is None else config | {"compression_training": block}


def random_batch(rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask [rows, tokens] and labels [rows] without padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def sparse_block(method: str, stride: int, dense_ratio: float, end: int, **shared: Any) -> dict[str, Any]:
    """A linear schedule from step 0 to `end` over the encoder's weights."""
    settings = {"enabled": True, "method": method, "schedule_offset": 0, "schedule_offset_stride": stride}
    settings |= {"schedule": "linear", "schedule_offset_end": end, **shared}
    return {"sparse_pruning": _block(settings, {"dense_ratio": dense_ratio})}


def w8a8_block(calibration: str, kernel: str = "float", backward: str = "float") -> dict[str, Any]:
    """8-bit weights per output channel and 8-bit activations (`dynamic` per token or `static`)."""
    weights = {
        "enabled": True,
        "quantize_weight_in_forward": True,
        "granularity": "per_channel",
        "kernel": kernel,
        "backward": backward,
    }
    activations = {"enabled": True, "range_calibration": calibration}
    return {
        "weight_quantization": _block(weights, {"start_bits": 8, "target_bits": 8}),
        "activation_quantization": _block(activations, {"bits": 8}),
    }


def w4_block(group_size: int) -> dict[str, Any]:
    """4-bit weights with a scale for each group of columns; activations stay floats."""
    shared = {
        "enabled": True,
        "quantize_weight_in_forward": True,
        "granularity": "per_column_group",
        "group_size": group_size,
    }
    return {"weight_quantization": _block(shared, {"start_bits": 4, "target_bits": 4})}


def _block(shared: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    groups = {"encoder": {"params": params, "modules": [r"encoder\.layer"]}}
    return {"shared_parameters": shared, "different_groups": groups}
