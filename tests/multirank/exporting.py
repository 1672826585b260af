"""Scenarios: exports from engines on several processes, and from the checkpoints that they save."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file

from ds_compress.api import export
from ds_compress.errors import ExportError
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, train, weight_quantization


def _quantized(bits: int, **shared: Any) -> dict[str, Any]:
    return weight_quantization(bits, "encoder.layer", **shared)


_INPUTS = {
    "activation_quantization": {
        "shared_parameters": {"enabled": True, "range_calibration": "static", "schedule_offset": 0},
        "different_groups": {"e": {"params": {"bits": 8}, "modules": ["encoder.layer"]}},
    }
}
_STRUCTURES = {
    "row_pruning": {"shared_parameters": {"enabled": True, "schedule_offset": 1, "dense_ratio": 0.5}},
    "head_pruning": {
        "shared_parameters": {"enabled": True, "schedule_offset": 1, "dense_ratio": 0.5, "method": "l1"}
    },
    "depth_pruning": {"shared_parameters": {"enabled": True, "schedule_offset": 1, "dense_ratio": 0.5}},
}
_ROWS = {"row_pruning": _STRUCTURES["row_pruning"]}
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("hf", {}),
    "w8a8-learned": ("compressed-tensors", {**_quantized(8, learned_scale=True), **_INPUTS}),
    "w4a16-rows": ("compressed-tensors", {**_quantized(4, learned_scale=True), **_ROWS}),
    "nvfp4": ("compressed-tensors", {"scheme": {"NVFP4": ["encoder.layer"]}}),
    "fp8-rows": ("compressed-tensors", {"scheme": {"FP8": ["encoder.layer"]}, **_ROWS}),
    "after-training": ("compressed-tensors", {}),
    "w8a8-cut": ("torch", {**_quantized(8, learned_scale=True), **_INPUTS, **_STRUCTURES}),
}
OPTIONS = {"after-training": {"scheme": "NVFP4A16"}}


def exported(stage: int, names: tuple[str, ...], folder: str) -> dict[str, Any]:
    """{scenario: reports of the engine's export and the checkpoint's, and whether their tensors are equal}."""
    results: dict[str, Any] = {}
    for name in names:
        format, block = SCENARIOS[name]
        net = tiny_bert(layers=4)
        where = Path(folder) / f"{name}-{stage}"
        with engine_of(net, ds_config(stage, block or None)) as engine:
            train(engine, batches(4))
            report = export(engine, where / "engine", format, shard_bytes=60_000, **OPTIONS.get(name, {}))
            assert report.bytes > 10_000 and 0.9 < report.ratio < 10  # in every process
            if block:
                engine.save_checkpoint(str(where / "checkpoint"))
        dist.barrier()
        if dist.get_rank() == 0:
            results[name] = {"report": report, "shards": len(list((where / "engine").glob("*.safetensors")))}
            if block:
                again = export(where / "checkpoint", where / "from_checkpoint", format)
                results[name] |= {"again": again, "different": _different(where)}
        dist.barrier()
    return results


def _different(where: Path) -> list[str]:
    ours = _tensors(where / "engine")
    theirs = _tensors(where / "from_checkpoint")
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not ours[name].equal(theirs[name])
    )


def _tensors(folder: Path) -> dict[str, Any]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def refused_everywhere(stage: int) -> str:
    """A failure of the writing process is raised in all, and nothing is left."""
    with tempfile.TemporaryDirectory() as name:
        folder: list[Any] = [name]
        dist.broadcast_object_list(folder)
        out = Path(folder[0]) / "out"
        with engine_of(
            tiny_bert(), ds_config(stage, _quantized(8, quantization_type="asymmetric"))
        ) as engine:
            try:
                export(engine, out, "compressed-tensors")
            except ExportError as error:
                message = str(error)
            else:
                message = ""
        dist.barrier()
        assert not list(Path(folder[0]).iterdir())
        dist.barrier()
    return message
