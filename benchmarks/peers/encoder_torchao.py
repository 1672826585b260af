"""torchao: PT2E quantization for x86, compiled by Inductor."""

from __future__ import annotations

import os

os.environ["TORCHINDUCTOR_FREEZING"] = "1"

import torch
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from benchmarks.peers import worker
from benchmarks.peers.encoder_inputs import batches, stock_model


def main() -> None:
    name, runs, model = "torchao PT2E int8, compiled", {}, stock_model()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with torch.inference_mode():
        for shape, given in batches(5).items():
            graph = torch.export.export(model, (), kwargs=given[0]).module()
            prepared = prepare_pt2e(graph, quantizer)
            for batch in given:
                prepared(**batch)
            converted = convert_pt2e(prepared)
            move_exported_model_to_eval(converted)
            compiled = torch.compile(converted)
            for _ in range(2):
                compiled(**given[0])
            runs[f"{name}, {shape}"] = lambda compiled=compiled, batch=given[0]: compiled(**batch)
        worker.serve(runs, ["torchao", "torch", "transformers"])
