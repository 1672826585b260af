"""Tiny random mixtures of experts of every architecture that the tests go through, built without a hub.

All have 2 layers, at least one of them a mixture of 4 or 8 experts of which a token sees 2 (Llama 4: 1), in fp32, in
eval mode. Routers, gates and biases are random: fresh models often have zeros there, which route all tokens alike.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
_LATENT_ATTENTION = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
_GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12}
_ONE_DENSE = {"first_k_dense_replace": 1, "n_shared_experts": 1}
_SHARED = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _SHARED),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 12}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_SHARED,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**_LATENT_ATTENTION, **_GROUPED, **_ONE_DENSE, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_LATENT_ATTENTION, **_GROUPED, **_ONE_DENSE},
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**_GROUPED, **_ONE_DENSE}),
    "dots1": ("Dots1ForCausalLM", "Dots1Config", {**_GROUPED, **_ONE_DENSE}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4}),
    "granite_moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"num_local_experts": 4}),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", {"num_local_experts": 4, "block_size": 8}),
    "hunyuan_moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}),
    "phi_moe": ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": 4}),
    "ernie_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_intermediate_size": 12, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size_mlp": 24, "num_experts_per_tok": 1},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            "num_experts": 4,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
}


def mixture(name: str, seed: int = 0, **config: Any) -> nn.Module:
    """The architecture of this name of `ARCHITECTURES`, or "stranger"."""
    torch.manual_seed(seed)
    if name == "stranger":
        return randomized(StrangeMixture()).eval()
    model_class, config_class, own = ARCHITECTURES[name]
    built = getattr(hf, model_class)(getattr(hf, config_class)(**{**_SIZES, **own, **config}))
    return randomized(built).eval()


def randomized(model: nn.Module) -> nn.Module:
    """Random values where fresh models have constants or nearly so."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def tokens(rows: int = 3, length: int = 10, seed: int = 0) -> torch.Tensor:
    """int64 (rows, length), none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class StrangeExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class StrangeBlock(nn.Module):
    """A list of experts, as code on the hub has it, with a router of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = nn.Linear(16, 4)
        self.parts = nn.ModuleList(StrangeExpert() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares, chosen = self.chooser(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for index, part in enumerate(self.parts):
            share = (shares * (chosen == index)).sum(-1, keepdim=True)
            out = out + share * part(x)
        return x + out


class StrangeMixture(nn.Module):
    """A model that nobody wrote a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(StrangeBlock() for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
