"""Scenario: architectures of mixtures under each kind of compression, on every ZeRO stage, exported at the end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ds_compress
from ds_compress.errors import ExportError
from ds_compress.quant.experts import QATExperts
from tests.multirank.common import ds_config, engine_of, full_weights
from tests.multirank.experts import evaluated, train
from tests.zoo.mixtures import ARCHITECTURES, mixture

STAGES = (0, 2, 3)
_EXPERTS = {"modules": ["experts"]}
_ZEROS = {
    "sparse_pruning": {
        "shared_parameters": {"enabled": True, "method": "l1", "scope": "global", "schedule_offset": 1},
        "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": ["layers"]}},
    }
}
_INT4 = {
    "weight_quantization": {
        "shared_parameters": {
            "enabled": True,
            "quantize_weight_in_forward": True,
            "granularity": "per_channel",
        },
        "different_groups": {"experts": {"params": {"target_bits": 4}, **_EXPERTS}},
    }
}
_FEWER_EXPERTS = {
    "expert_pruning": {
        "shared_parameters": {"enabled": True, "method": "reap", "dense_ratio": 0.5, "schedule_offset": 2}
    }
}
_FEWER_ROWS = {
    "row_pruning": {
        "shared_parameters": {"enabled": True, "method": "l1", "dense_ratio": 0.5, "schedule_offset": 2},
        "different_groups": {"experts": _EXPERTS},
    }
}
BLOCKS: dict[str, dict[str, Any]] = {
    "zeros": _ZEROS,
    "W4A16": _INT4,
    "FP8": {"scheme": {"FP8_DYNAMIC": [r"\.experts"]}},
    "experts": _FEWER_EXPERTS,
    "rows": _FEWER_ROWS,
    "all": {**_ZEROS, **_INT4, **_FEWER_EXPERTS, **_FEWER_ROWS},
}
QUANTIZED = ("W4A16", "FP8", "all")


def built(name: str) -> Any:
    """Every expert has 16 inputs or 32."""
    widths = dict.fromkeys(("intermediate_size", "moe_intermediate_size", "intermediate_size_mlp"), 32)
    known = {"intermediate_size", *ARCHITECTURES[name][2]}
    return mixture(name, **{key: width for key, width in widths.items() if key in known}).train()


def compressed(
    cells: Sequence[tuple[str, str]], folder: str, stages: Sequence[int] = STAGES
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """{(architecture, block, stage): what is left, logits before and after the rest is removed, config}, of `cells`.

    The run of the last stage is exported to folder/architecture/block in the format that stock tools read, with its
    logits as `expected.pt`, without quantization of inputs, of which stock transformers does none in fused experts;
    "refused": why it was not, or None.
    """
    results = {}
    for name, block in cells:
        for stage in stages:
            model = built(name)
            with engine_of(model, ds_config(stage, copy.deepcopy(BLOCKS[block]))) as engine:
                result: dict[str, Any] = {"losses": train(engine, 4)}
                units = engine.compression.kept_units.items()
                result["kept"] = {group: kept.tolist() for group, kept in units}
                result["nonzero"] = {
                    key: (value != 0) for key, value in full_weights(model).items() if value.dim() > 1
                }
                result["metrics"] = engine.compression.metrics()
                result["masked"] = evaluated(engine)
                if stage == stages[-1]:
                    result["refused"] = _export(engine, Path(folder) / name / block)
                final: Any = ds_compress.finalize(engine)
                result["final"] = evaluated(final)
                result["config"] = final.config.to_dict()
                result["parameters"] = sum(p.numel() for p in final.parameters())
            results[name, block, stage] = result
    return results


def _export(engine: Any, folder: Path) -> str | None:
    try:
        ds_compress.export(engine, folder, check=False)
    except ExportError as error:
        return str(error)
    qat = [module for module in engine.module.modules() if isinstance(module, QATExperts)]
    used = [quantizer for module in qat for _, quantizer in module.input_quantizers() if quantizer.enabled]
    for quantizer in used:
        quantizer.enabled = False
    logits = evaluated(engine)
    for quantizer in used:
        quantizer.enabled = True
    if torch.distributed.get_rank() == 0:
        torch.save(logits, folder / "expected.pt")
    return None
