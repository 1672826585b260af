"""What quantized experts add to a training step, beside plain DeepSpeed, with few experts and with many.

    python -m benchmarks.expert_steps [--rounds 5] [--only W4A16] [--tokens 2048] [--json] [--record]

A Qwen3-MoE with random weights, hidden size 512, 4 layers of 6.3 M parameters of experts each: 8 experts of 512 rows of
which a token sees 2, 64 of 64 rows of which it sees 16, and 64 of 64 as gpt-oss stores them (transposed, interleaved,
with biases). So all compute as much on as many weights, and what differs is how the weights are cut. fp32 with
transformers' grouped products, ZeRO-0 with torch's AdamW, one process on one thread. Plain and quantized engines take
turns, one step each per round; the figure is the ratio of CPU times in the same round.

The tokens of a step decide the ratio: quantizing costs the same for every batch.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)

from . import record
from .engines import deepspeed_config, start_single_process
from .timing import interleave, ratio

PLAIN = "plain DeepSpeed"
HIDDEN, LAYERS, ROWS, VOCABULARY = 512, 4, 4096, 1024
SEQUENCE = 256
SHAPES = {"8 experts": (8, 2), "64 experts": (64, 16), "64 experts, transposed": (64, 16)}
"""{name: (experts, of which a token sees)}"""
BLOCKS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "W4A16": {
        "weight_quantization": {
            "shared_parameters": {
                "enabled": True,
                "quantize_weight_in_forward": True,
                "granularity": "per_column_group",
                "group_size": 32,
            },
            "different_groups": {"experts": {"params": {"target_bits": 4}, "modules": ["experts"]}},
        }
    },
    **{scheme: {"scheme": {scheme: ["experts"]}} for scheme in ("FP8_DYNAMIC", "MXFP4", "W8A8")},
}


def model(shape: str, layers: int = LAYERS) -> Any:
    """Random weights, the same at every call."""
    from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts, chosen = SHAPES[shape]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": HIDDEN // 8,
        "num_experts_per_tok": chosen,
        "max_position_embeddings": SEQUENCE,
    }
    rows = ROWS // experts
    if "transposed" in shape:
        return GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=experts, intermediate_size=rows))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=experts, moe_intermediate_size=rows))


class Steps:
    """One engine, and the batch that it sees again and again."""

    def __init__(self, shape: str, block: dict[str, Any] | None, tokens: int, zero_stage: int) -> None:
        import deepspeed

        built = model(shape)
        sequences = tokens // SEQUENCE
        config = deepspeed_config(zero_stage, sequences, block)
        self._engine, *_ = deepspeed.initialize(
            model=built, model_parameters=built.parameters(), config=config
        )
        self._engine.train()
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(3, VOCABULARY, (sequences, SEQUENCE), generator=generator)

    def step(self) -> None:
        loss = self._engine(input_ids=self._ids, labels=self._ids, use_cache=False).loss
        self._engine.backward(loss)
        self._engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only blocks whose name contains this, and plain")
    parser.add_argument("--tokens", type=int, default=2048, help=f"of a step, a multiple of {SEQUENCE}")
    parser.add_argument("--zero-stage", type=int, default=0, choices=(0, 1, 2, 3))
    record.add_output_arguments(parser)
    args = parser.parse_args()
    start_single_process()
    chosen = {name: block for name, block in BLOCKS.items() if name == PLAIN or args.only in name}
    result: dict[str, dict[str, float]] = {}
    with tqdm(total=len(SHAPES) * len(chosen) * (args.rounds + 1), unit="step", file=sys.stderr) as bar:
        for shape in SHAPES:
            runs = {name: Steps(shape, block, args.tokens, args.zero_stage) for name, block in chosen.items()}
            timings = interleave(
                {name: run.step for name, run in runs.items()}, args.rounds, progress=lambda _: bar.update()
            )
            for name, timing in timings.items():
                compared = ratio(timing.cpu, timings[PLAIN].cpu)
                result[f"{shape}: {name}"] = {
                    "step CPU s": timing.median_cpu,
                    "ratio": compared.median,
                    "ratio, lower quartile": compared.low,
                    "ratio, upper quartile": compared.high,
                }
    print_result(result, args.tokens)
    record.report("expert_steps", result, args)


def print_result(result: dict[str, dict[str, float]], tokens: int) -> None:
    table = Table(title=f"steps of {tokens} tokens, {LAYERS} layers of experts, one thread")
    for column in ("", "CPU ms / step", "ratio to plain", "quartiles"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in result.items():
        quartiles = f"{values['ratio, lower quartile']:.3f} - {values['ratio, upper quartile']:.3f}"
        table.add_row(name, f"{1e3 * values['step CPU s']:.0f}", f"{values['ratio']:.3f}", quartiles)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
