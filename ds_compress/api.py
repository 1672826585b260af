"""The public functions that look at several parts of the package at once."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from ds_compress.config.recipes.expand import telling
from ds_compress.config.report.plan import Plan
from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import CompressionConfig
from ds_compress.config.schema.source import block_of
from ds_compress.engine.export_source import load_source
from ds_compress.engine.run_end import remember_export
from ds_compress.export import compatibility
from ds_compress.export.format import Options
from ds_compress.export.report import ExportReport
from ds_compress.export.shards import DEFAULT_SHARD_BYTES
from ds_compress.export.write import write_export


def plan(
    model: nn.Module, config: CompressionConfig | Mapping[str, Any] | str | PathLike[str], world_size: int = 1
) -> Plan:
    """Resolves a config against a model without training.

    config: the `compression_training` block, a DeepSpeed config that contains it, or the path of a JSON file
    with either. world_size: processes that share the training state.

    Raises:
        ConfigError: everything that is wrong with the config, or with what it asks of this model.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it counts processes, so it is at least 1")
    resolved = resolve(model, config if isinstance(config, CompressionConfig) else block_of(config))
    resolved.world_size = world_size
    # Not for whoever only resolves: models are built for it, without weights.
    with telling(resolved.config.applied_recipe):
        compatibility.refuse_unfit(resolved, model)
    resolved.packs = compatibility.loads_packed(resolved, model)
    resolved.notes = (
        tuple(compatibility.notes(resolved, model)) if resolved.techniques or resolved.structures else ()
    )
    return resolved


def export(
    source: Any,
    out_dir: str | PathLike[str],
    format: str | None = None,
    *,
    tokenizer: Any = None,
    model: nn.Module | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    check: bool = True,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    embeddings: str | None = None,
    scheme: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    card: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> ExportReport:
    """Writes `out_dir`, loads it in a fresh process, compares logits, and says what was done.

    Args:
        source: a DeepSpeed engine or Hugging Face's Trainer (a collective: every process calls it, one writes), an
            `nn.Module` with or without quantizers, or the path of a DeepSpeed checkpoint.
        format: "hf", "compressed-tensors", "torch" (ours, for `ds_compress.from_pretrained`), "onnx" or "openvino";
            None: the block's `export_to`, else "hf" where nothing is quantized and "compressed-tensors" where
            something is.
        tokenizer: an object with `save_pretrained`, or a folder to copy one from; None: a Trainer's own, if any.
        model: with a checkpoint, an instance of the trained class when that is none of transformers.
        inputs: what to check with, by argument name; None: made up from the config.
        check: False writes without loading.
        overwrite: replace `out_dir` if an export wrote it.
        dtype: in which tensors that are not quantized are stored; None: as they are.
        embeddings: "int8" or "float", for tables that were not trained in integers; "torch", "onnx" and "openvino"
            round them by default.
        scheme: rounds a model that was not trained quantized, by the name that servers have for it, e.g. "FP8_DYNAMIC",
            "NVFP4A16", "MXFP4", "W4A16": any whose inputs need no observed ranges ("fp8" means "FP8_DYNAMIC").
        shard_bytes: largest weight file, and about what the writing process holds beside the largest layer.
        card: fields of `huggingface_hub.ModelCardData` for the head of the folder's README.md: license, base_model,
            datasets, ...; `eval_results` may be mappings, e.g. {"task_type": "text-classification", "dataset_type":
            "glue", "dataset_name": "GLUE SST-2", "metric_type": "accuracy", "metric_value": 0.91}.
        trust_pickle: a checkpoint's pickles may hold more than data, which can run any code when it is read.

    Raises:
        ExportError: with a reason that names the module; `out_dir` is then as it was before.
    """
    report = write_export(
        load_source(source, model, trust_pickle),
        out_dir,
        format,
        Options(dtype, embeddings, scheme),
        tokenizer=tokenizer,
        inputs=inputs,
        check=check,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        card=card,
    )
    remember_export(source, report.folder)
    return report
