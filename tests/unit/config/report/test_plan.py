"""What a plan prints, and the arithmetic of what it predicts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress import plan
from ds_compress.config.report.size_estimate import Stored, stored, training_state


def pruning(modules: list[str], ratio: float = 0.5, **shared: Any) -> dict[str, Any]:
    group = {"params": {"dense_ratio": ratio}, "modules": modules}
    return {
        "sparse_pruning": {"shared_parameters": {"enabled": True, **shared}, "different_groups": {"g": group}}
    }


def bits(
    modules: list[str], start: int = 8, target: int = 8, period: int = 1, **shared: Any
) -> dict[str, Any]:
    params = {"start_bits": start, "target_bits": target, "quantization_period": period}
    group = {"params": params, "modules": modules}
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"g": group},
        }
    }


def inputs(modules: list[str], **shared: Any) -> dict[str, Any]:
    group = {"params": {"bits": 8}, "modules": modules}
    return {
        "activation_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"g": group},
        }
    }


def line(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return found


class TestForecast:
    def forecast(self, model: nn.Module, block: dict[str, Any], name: str = "0.weight") -> Stored:
        return stored(plan(model, block))[name]

    def test_untouched(self) -> None:
        model = nn.Sequential(nn.Linear(6, 4)).to(torch.bfloat16)
        assert self.forecast(model, {}) == Stored(48, 48, 48, 24, 48, 48)

    def test_pruned(self) -> None:
        # ceil(0.3 * 24) weights stay; as bitmask: 24 bits and 8 fp32 values.
        block = pruning(["*"], ratio=0.3)
        assert self.forecast(nn.Sequential(nn.Linear(6, 4)), block) == Stored(96, 96, 3 + 32, 8, 96, 96)

    def test_the_ratio_is_the_decimal_of_the_json(self) -> None:
        assert math.ceil(0.07 * 100) == 8
        assert self.forecast(nn.Sequential(nn.Linear(10, 10)), pruning(["*"], ratio=0.07)).nonzeros == 7

    @pytest.mark.parametrize(
        ("shared", "scales"),
        [
            ({}, 4),
            ({"quantize_groups": 4}, 4),
            ({"granularity": "per_group", "quantize_groups": 8}, 8),
            ({"granularity": "per_tensor"}, 4),
            ({"granularity": "per_channel"}, 4),
            ({"granularity": "per_column_group", "group_size": 4}, 4 * 2),
            ({"quantization_type": "asymmetric", "granularity": "per_channel"}, 2 * 4 - 4),
        ],
    )
    def test_quantized(self, shared: dict[str, Any], scales: int) -> None:
        block = bits(["*"], target=3, **shared)
        assert self.forecast(nn.Sequential(nn.Linear(6, 4)), block).after == self.words(3) + 4 * scales

    def words(self, bits: int) -> int:
        """4 outputs of 6 codes, each of them in whole words, and the shape of the weight."""
        shape = 16
        return 4 * 4 * math.ceil(6 * bits / 32) + shape

    def test_channels_of_conv1d_are_its_columns(self, gpt2: nn.Module) -> None:
        block = bits(["c_attn"], granularity="per_channel")
        name = "transformer.h.0.attn.c_attn.weight"
        assert self.forecast(gpt2, block, name).after == 16 * 48 + 4 * 48

    def test_a_legacy_embedding_has_a_scale_per_row(self) -> None:
        model = nn.ModuleDict({"0": nn.Embedding(10, 4)})
        assert (
            self.forecast(model, bits(["0"], quantize_groups=3) | {"export_to": "torch"}).after == 40 + 4 * 10
        )

    def test_pruned_and_quantized(self) -> None:
        block = {**pruning(["*"]), **bits(["*"], target=4)}
        assert self.forecast(nn.Sequential(nn.Linear(6, 4)), block) == Stored(96, 48, 3 + 6 + 4, 12, 96, 48)

    @pytest.mark.parametrize(
        ("method", "hidden", "scores"),
        [
            ("l1", 0, 0),
            ("random", 0, 0),
            ("topk", 4, 12),
            ("movement", 4, 4),
            ("taylor", 0, 4),
            ("snip_momentum", 0, 4),
        ],
    )
    def test_training_state(self, method: str, hidden: int, scores: int) -> None:
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
        state = training_state(plan(model, pruning(["*"], method=method), world_size=4))
        share = 2 * 64 * 32 // 4
        assert (state.mask, state.latent, state.scores) == (share // 8, share * hidden, share * scores)
        assert state.total == share // 8 + share * (hidden + scores)

    def test_regrowth_keeps_hidden_values(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        assert training_state(plan(model, pruning(["*"], regrowth=True))).latent == 4 * 64

    def test_without_pruning_there_is_no_state(self, bert: nn.Module) -> None:
        assert training_state(plan(bert, bits(["query"]))).total == 0
