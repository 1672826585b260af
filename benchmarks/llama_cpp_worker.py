"""Runs a random Llama in llama.cpp, in an environment of its own (xllamacpp, gguf, numpy), for `weight_only_decode`.

    PYTHON llama_cpp_worker.py FOLDER LAYERS VOCABULARY THREADS

Writes the model as GGUF with Q4_0 products and answers each line on stdin, a number of tokens to generate after a
prompt of two, with one line: the CPU seconds of this process for it, the wall seconds, and the number of tokens that
it gave.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

WIDTH, INNER, HEADS = 2048, 5632, 32


def write_model(path: Path, layers: int, vocabulary: int) -> None:
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(vocabulary)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [f"t{i}" for i in range(vocabulary - len(tokens))]
    kinds = [2, 3, 3, *([6] * 256), *([1] * (vocabulary - 259))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, rows: int, columns: int, kind: Any) -> None:
        weight = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    q4, q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    add("token_embd.weight", vocabulary, WIDTH, q8)
    add("output.weight", vocabulary, WIDTH, q4)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH, q4)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", INNER, WIDTH, q4)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER, q4)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def server_of(path: Path, threads: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.warmup = True
    return xllamacpp.Server(params)


def main() -> None:
    folder, layers, vocabulary, threads = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    path = folder / "model.gguf"
    write_model(path, layers, vocabulary)
    server = server_of(path, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        request = {
            "prompt": [300, 301], "n_predict": int(line), "temperature": 0.0, "top_k": 1, "samplers": ["top_k"],
            "ignore_eos": True, "cache_prompt": False, "stream": False,
        }  # fmt: skip
        cpu, wall = time.process_time(), time.perf_counter()
        answer = server.handle_completions(request)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        given = answer if isinstance(answer, dict) else json.loads(answer)
        usage = given.get("usage") or {}
        count = usage.get("completion_tokens", given.get("tokens_predicted", -1))
        print(cpu, wall, count, flush=True)


if __name__ == "__main__":
    main()
