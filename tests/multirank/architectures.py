"""Scenarios: Conv1D, Conv2d, Embedding, tied weights and grouped-query attention, sharded and in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ds_compress
from tests.models import tiny_gpt2, tiny_llama
from tests.multirank.common import ds_config, engine_of, full_weights

STAGES = (0, 2, 3)


class ConvNet(nn.Module):
    """Conv2d (also grouped), BatchNorm and a Linear on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False)
        self.head = nn.Linear(6 * 9, 5)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(images)))
        return nn.functional.cross_entropy(self.head(torch.relu(self.second(hidden)).flatten(1)), labels)


def gpt2() -> nn.Module:
    return tiny_gpt2(seed=None)


def llama() -> nn.Module:
    return tiny_llama(seed=None, hidden=16, intermediate=20, vocab_size=40)


MODELS: dict[str, tuple[Any, list[str], list[str]]] = {
    # builder, what is pruned and quantized, whose inputs are quantized
    "convnet": (ConvNet, ["first", "second", "head"], ["first", "second", "head"]),
    "gpt2": (gpt2, [r"h\.\d+\..*c_(attn|proj|fc)", "wpe"], [r"h\.\d+\..*c_(attn|proj|fc)"]),
    "llama": (llama, ["layers", "embed_tokens"], ["layers"]),
}


def _block(weights: list[str], inputs: list[str]) -> dict[str, Any]:
    def technique(params: dict[str, Any], modules: list[str], **shared: Any) -> dict[str, Any]:
        return {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"all": {"params": params, "modules": modules}},
        }

    return {
        "sparse_pruning": technique({"dense_ratio": 0.5}, weights, method="l1", scope="global"),
        "weight_quantization": technique(
            {"start_bits": 6, "target_bits": 4},
            weights,
            granularity="per_channel",
            quantize_weight_in_forward=True,
        ),
        "activation_quantization": technique({"bits": 8}, inputs),
    }


def _batch(name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if name == "convnet":
        return {
            "images": torch.randn(4, 3, 8, 8, generator=generator),
            "labels": torch.randint(0, 5, (4,), generator=generator),
        }
    ids = torch.randint(0, 40, (4, 10), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _buffers_to_bf16(model: nn.Module) -> None:
    """DeepSpeed casts parameters only, and BatchNorm on the CPU wants its buffers alike."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()


def all_of_them(steps: int = 5) -> dict[tuple[str, int, str], dict[str, Any]]:
    results = {}
    for name, (build, weights, inputs) in MODELS.items():
        for stage in STAGES:
            for dtype in ("fp32", "bf16"):
                torch.manual_seed(0)
                model = build()
                if dtype == "bf16":
                    _buffers_to_bf16(model)
                generator = torch.Generator().manual_seed(1)
                losses = []
                with engine_of(model, ds_config(stage, _block(weights, inputs), dtype=dtype)) as engine:
                    for _ in range(steps):
                        batch = _batch(name, generator)
                        if "images" in batch:
                            batch["images"] = batch["images"].to(next(model.parameters()).dtype)
                        output = engine(**batch)
                        loss = output if isinstance(output, torch.Tensor) else output.loss
                        engine.backward(loss)
                        engine.step()
                        losses.append(loss.item())
                    targets = engine.compression.techniques["sparse_pruning"].targets
                    full = full_weights(model)
                    results[name, stage, dtype] = {
                        "losses": losses,
                        "alive": {target: full[target] != 0 for target in targets},
                        "exported": ds_compress.export_state_dict(engine),
                        "bits": engine.compression.metrics()["weight_quantization/mean_bits"],
                    }
    return results
