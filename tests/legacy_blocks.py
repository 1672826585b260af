"""`compression_training` blocks in the shape of the removed library's documentation: one per technique, and all.

They are written for `tests.models.tiny_bert` (4 heads) and for `convnet`; offsets are small enough for 20
steps to see every technique at work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def weight_quantization(**shared: Any) -> dict[str, Any]:
    return {
        "weight_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantizer_kernel": False,
                "schedule_offset": 2,
                "quantize_groups": 4,
                "quantize_verbose": False,
                "quantization_type": "symmetric",
                "rounding": "nearest",
                "quantize_weight_in_forward": True,
                "fp16_mixed_quantize": {"enabled": False, "quantize_change_ratio": 0.001},
                **shared,
            },
            "different_groups": {
                "wq1": {
                    "params": {"start_bits": 12, "target_bits": 8, "quantization_period": 1},
                    "modules": ["attention.self"],
                },
                "wq2": {
                    "params": {"start_bits": 8, "target_bits": 4, "quantization_period": 2},
                    "modules": ["intermediate"],
                },
            },
        }
    }


def activation_quantization(calibration: str, kind: str) -> dict[str, Any]:
    return {
        "activation_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantization_type": kind,
                "range_calibration": calibration,
                "schedule_offset": 3,
            },
            "different_groups": {
                "aq1": {"params": {"bits": 8}, "modules": ["attention.output", "attention.self"]},
                "aq2": {"params": {"bits": 4}, "modules": ["intermediate"]},
            },
        }
    }


def sparse_pruning(method: str, **shared: Any) -> dict[str, Any]:
    groups = {"sp1": {"params": {"dense_ratio": 0.5}, "modules": ["attention.self"]}}
    return {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "schedule_offset": 5, "method": method, **shared},
            **({} if method == "snip_momentum" else {"different_groups": groups}),
        }
    }


def row_pruning(method: str) -> dict[str, Any]:
    return {
        "row_pruning": {
            "shared_parameters": {"enabled": True, "schedule_offset": 4, "method": method},
            "different_groups": {
                "rp1": {
                    "params": {"dense_ratio": 0.5},
                    "modules": ["intermediate.dense"],
                    "related_modules": [[r"layer.\d+.output.dense"]],
                }
            },
        }
    }


HEADS: dict[str, Any] = {
    "head_pruning": {
        "shared_parameters": {"enabled": True, "schedule_offset": 4, "method": "topk", "num_heads": 4},
        "different_groups": {
            "rp1": {
                "params": {"dense_ratio": 0.5},
                "modules": ["attention.output.dense"],
                "related_modules": [["self.query", "self.key", "self.value"]],
            }
        },
    }
}

REDUCTION: dict[str, Any] = {
    "layer_reduction": {
        "enabled": True,
        "keep_number_layer": 2,
        "module_name_prefix": "bert.encoder.layer",
        "teacher_layer": [1, 3],
        "other_module_name": ["bert.pooler", "bert.embeddings", "classifier"],
    }
}

ENCODER_BLOCKS: dict[str, dict[str, Any]] = {
    "layer_reduction": REDUCTION,
    "weight_quantization": weight_quantization(),
    "weight_quantization_asymmetric": weight_quantization(quantization_type="asymmetric"),
    "weight_quantization_moq": weight_quantization(
        quantize_weight_in_forward=False,
        fp16_mixed_quantize={"enabled": True, "quantize_change_ratio": 0.1},
    ),
    "activation_quantization_dynamic": activation_quantization("dynamic", "asymmetric"),
    "activation_quantization_static": activation_quantization("static", "symmetric"),
    "sparse_pruning_l1": sparse_pruning("l1"),
    "sparse_pruning_topk": sparse_pruning("topk"),
    "sparse_pruning_snip_momentum": sparse_pruning(
        "snip_momentum",
        schedule_offset_end=12,
        schedule_offset_stride=3,
        block_pattern="4x1",
        dense_ratio=0.4,
        excluded_modules=["classifier", "pooler"],
    ),
    "row_pruning": row_pruning("topk"),
    "row_pruning_l1": row_pruning("l1"),
    "head_pruning": HEADS,
    "everything": {
        **REDUCTION,
        **weight_quantization(),
        **activation_quantization("dynamic", "symmetric"),
        **sparse_pruning("l1"),
        **row_pruning("topk"),
        **HEADS,
    },
}
"""By name; every one fits `tiny_bert`, with 4 layers where it has `layer_reduction`."""

CHANNELS: dict[str, Any] = {
    "channel_pruning": {
        "shared_parameters": {"enabled": True, "schedule_offset": 3, "method": "topk"},
        "different_groups": {
            "cp1": {
                "params": {"dense_ratio": 0.5},
                "modules": ["conv1"],
                "related_modules": [["conv2", "norm"]],
            }
        },
    }
}


class ConvNet(nn.Module):
    """conv1 -> BatchNorm -> ReLU -> conv2 -> mean -> classifier; the loss, for images and labels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 2)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.conv2(torch.relu(self.norm(self.conv1(images))))
        return self.classifier(torch.relu(hidden).mean((2, 3)))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(images), labels)


def images(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 2, (4,), generator=generator))
        for _ in range(steps)
    ]
