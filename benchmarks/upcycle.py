"""A mixture of experts made of SmolLM2-135M: sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055).

Each FFN becomes 8 copies of itself, with noise, of which a token sees 2 by a new router; then all is trained on the
Python documentation until the experts differ. The result is a Mixtral, `folder/upcycled`, which `experts` prunes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from . import smollm2

EXPERTS, TOP_K = 8, 2
NOISE = 0.2
"""Of the copies, in standard deviations of each matrix; without it all experts get the same gradient for ever."""
STEPS, ROWS, PEAK_LR, BALANCE = 300, 4, 3e-4, 0.02


def mixture_of(dense: Any, seed: int = 0) -> Any:
    """The Mixtral whose experts are noisy copies of the FFNs of the Llama `dense`, fp32."""
    from transformers import MixtralConfig, MixtralForCausalLM

    old = dense.config
    keys = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim rms_norm_eps max_position_embeddings tie_word_embeddings rope_parameters hidden_act bos_token_id
    eos_token_id pad_token_id"""
    config = MixtralConfig(
        **{key: getattr(old, key) for key in keys.split()},
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        router_aux_loss_coef=BALANCE,
        sliding_window=None,
    )
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config)
    weights = dict(dense.state_dict())
    for layer in range(old.num_hidden_layers):
        ffn = f"model.layers.{layer}.mlp"
        gate, up, down = (weights.pop(f"{ffn}.{name}_proj.weight") for name in ("gate", "up", "down"))
        for name, matrix in (("gate_up_proj", torch.cat([gate, up])), ("down_proj", down)):
            noise = torch.randn(EXPERTS, *matrix.shape, generator=generator)
            weights[f"{ffn}.experts.{name}"] = matrix + NOISE * matrix.std() * noise
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("mlp.gate.weight") for name in missing), (missing, unexpected)
    return model


def config(steps: int, peak_lr: float = PEAK_LR) -> dict[str, Any]:
    """bf16 weights with fp32 masters: the grouped products of experts run in the precision of the weights.

    692 M parameters leave no memory for temporaries of their size: the optimizer is the fused one, buckets are small.
    """
    settings = {"total_num_steps": steps, "warmup_num_steps": 4, "warmup_type": "linear"}
    settings |= {"warmup_min_ratio": 0.1, "cos_min_ratio": 0.05}
    made = smollm2.deepspeed_config(ROWS, peak_lr, betas=[0.9, 0.95], weight_decay=0.0)
    del made["torch_autocast"]
    made["optimizer"]["params"]["fused"] = True
    made["zero_optimization"] |= {"reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000}
    return made | {"bf16": {"enabled": True}, "scheduler": {"type": "WarmupCosineLR", "params": settings}}


def upcycle(folder: Path, steps: int = STEPS) -> None:
    """In a process of its own: makes `folder/upcycled` and `folder/upcycled.json`, with the balance of the experts."""
    import deepspeed

    from ds_compress.examples.train import progress_bar

    smollm2.start_process(keep_memory=False)
    model = mixture_of(smollm2.original(folder))
    training = smollm2.rows(folder, "training")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(steps))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    engine.train()
    losses, balance = [], []
    for step in progress_bar(range(steps), steps, "    upcycled"):
        batch = training[order[(step * ROWS + torch.arange(ROWS)) % len(order)]]
        out = engine(input_ids=batch, labels=batch, use_cache=False, output_router_logits=True)
        engine.backward(out.loss)
        engine.step()
        losses.append(out.loss.item())
        balance.append(out.aux_loss.item())
    model = engine.module.float()
    temporary = folder / "upcycled.tmp"
    model.save_pretrained(temporary)
    temporary.rename(folder / "upcycled")
    figures: dict[str, Any] = {
        "steps": steps,
        "tokens": steps * ROWS * smollm2.TOKENS,
        "similarity": similarity(model),
    }
    figures |= {"losses": losses, "balance losses": balance}
    (folder / "upcycled.json").write_text(json.dumps(figures) + "\n")


@torch.no_grad()
def similarity(model: Any) -> float:
    """Mean cosine between what training and noise made of two experts: 1: all experts are the same."""
    values = []
    for layer in model.model.layers:
        flat = torch.nn.functional.normalize(layer.mlp.experts.down_proj.flatten(1).float(), dim=1)
        cosines = flat @ flat.t()
        values.append((cosines.sum() - EXPERTS) / (EXPERTS * (EXPERTS - 1)))
    return torch.stack(values).mean().item()
