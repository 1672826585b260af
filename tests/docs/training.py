"""The example JSON of a block's page, trained for a few steps on a model of a few thousand weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

import ds_compress  # noqa: F401
from tests.docs.pages import DOCS, blocks_of
from tests.models import VOCABULARY, tiny_bert
from tests.models import tiny_llama as tiny_llama_of
from tests.multirank.common import batches, engine_of

STEPS = 5
_LAST_STEP = 3
"""No schedule of an example takes longer here: a test has no time for ramps of hundreds of steps."""
_STEP_KEYS = ("schedule_offset", "schedule_offset_end", "schedule_offset_stride")


def example_of(block: str) -> dict[str, Any]:
    """The first JSON of the block's page: a whole DeepSpeed config."""
    page = DOCS / "blocks" / f"{block}.md"
    config: dict[str, Any] = json.loads(next(b for b in blocks_of(page) if b.language == "json").text)
    return config


def in_few_steps(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with schedules that are over at step 3, and torch's own Adam, which needs no compiler."""

    def shortened(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        short = {key: shortened(item) for key, item in value.items()}
        for key in _STEP_KEYS:
            if key in short:
                least = {"schedule_offset": 1, "schedule_offset_end": _LAST_STEP, "schedule_offset_stride": 1}
                short[key] = min(short[key], least[key])
        return short

    result = copy.deepcopy(config)
    result["compression_training"] = shortened(result["compression_training"])
    result["optimizer"]["params"]["torch_adam"] = True
    result.setdefault("steps_per_print", 10**9)
    return result


class TinyConvNet(nn.Module):
    """Two convolutions with BatchNorm, and a classifier; `loss` as transformers returns it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 2)

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"pixels": torch.rand(2, 3, 8, 8)}

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = self.second(torch.relu(self.norm(self.first(pixels)))).relu().mean((2, 3))
        logits = self.classifier(hidden)
        if labels is None:
            return logits
        return _Output(nn.functional.cross_entropy(logits, labels))


class _Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def tiny_llama() -> nn.Module:
    return tiny_llama_of(intermediate=64, head="ForSequenceClassification", tied=False, pad_token_id=0)


def tiny_mixture() -> nn.Module:
    """Two layers of eight experts each, of which a token sees two."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.MixtralConfig(num_local_experts=8, **sizes, **heads)
    return transformers.MixtralForSequenceClassification(config)


def model_for(block: str) -> nn.Module:
    if block == "channel_pruning":
        return TinyConvNet()
    if block in ("hidden_pruning", "kv_cache"):
        return tiny_llama()
    if block == "expert_pruning":
        return tiny_mixture()
    return tiny_bert(layers=6)


def data_for(block: str, size: int, rank: int = 0) -> Any:
    if block == "channel_pruning":
        torch.manual_seed(1)
        pixels = [torch.rand(size, 3, 8, 8) for _ in range(STEPS)]
        return iter([{"pixels": x, "labels": (x[:, 0, 0, 0] > 0.5).long()} for x in pixels])
    return batches(STEPS, size=size, rank=rank)


def train_example(block: str, config: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    """Trains STEPS steps; the losses, and what the run says of itself at the end."""
    model = model_for(block)
    with engine_of(model, in_few_steps(config)) as engine:
        losses = []
        for batch in data_for(block, engine.train_micro_batch_size_per_gpu(), rank):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        weights = sum(p.numel() for p in engine.module.parameters())
        return {
            "losses": losses,
            "applied": engine.compression.applied_steps,
            "metrics": engine.compression.metrics(),
            "parameters": weights,
            "layers": getattr(getattr(engine.module, "config", None), "num_hidden_layers", None),
        }


def train_examples(blocks: list[str]) -> dict[str, dict[str, Any]]:
    """`train_example` of several blocks in one job of processes: what `run_ranks` calls."""
    rank = deepspeed.comm.get_rank()
    results = {}
    for block in blocks:
        config = example_of(block)
        for wire in ("gradient_compression", "parameter_compression"):
            if wire in config["compression_training"]:
                # The loopback device is too fast to gain: both ways would be timed and ours switched off.
                config["compression_training"][wire] |= {"measure_link": False, "min_elements": 0}
        results[block] = train_example(block, config, rank)
    return results


def save_teacher(folder: Path) -> None:
    tiny_bert(seed=1, layers=6).save_pretrained(folder)
