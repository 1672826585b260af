"""NVIDIA ModelOpt: INT8_DEFAULT_CFG and INT4_BLOCKWISE_WEIGHT_ONLY_CFG, calibrated on one batch, then trained.

Both are symmetric, and all scales, those of weights too, stay what calibration made them. The first would also round
the inputs of LayerNorm; here that is off, as everybody quantizes the encoder's linear layers alone.
"""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq

from benchmarks.peers import worker
from benchmarks.peers.training import GROUPS, LAYERS
from benchmarks.peers.training_inputs import batch, checked, model, require_quantized, torch_step


def restricted(config: Any, group_size: int | None = None) -> Any:
    """The config for the encoder's linear layers; group_size: of weights that have a scale for each group."""
    config = copy.deepcopy(config)
    for rule in config["quant_cfg"]:
        if rule["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"):
            rule["quantizer_name"] = f"*{LAYERS}{rule['quantizer_name']}"
            if "block_sizes" in rule.get("cfg", {}):
                rule["cfg"]["block_sizes"][-1] = group_size
    config["quant_cfg"].append({"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False})
    return config


def quantized() -> dict[str, Any]:
    """{the name of a run: its model}"""
    configs = {"ModelOpt W8A8 static": restricted(mtq.INT8_DEFAULT_CFG)}
    for size in GROUPS:
        configs[f"ModelOpt W4 groups of {size}"] = restricted(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, size)
    models = {name: model() for name in configs}
    for name, trained in models.items():
        mtq.quantize(trained, configs[name], lambda calibrated: calibrated(**batch()))
        require_quantized(name, trained)
    return models


def main() -> None:
    runs = [checked(name, torch_step(trained)) for name, trained in quantized().items()]
    worker.serve(dict(runs), ["nvidia-modelopt", "torch", "transformers"])
