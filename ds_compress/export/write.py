"""Writing an export: a trained model as a folder that other programs load, checked by loading it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export import check as checking
from ds_compress.export import kv_cache, model_card, ptq, run_record
from ds_compress.export.attributes import attribute_overrides, built_from_config
from ds_compress.export.compressed_tensors.format import CompressedTensorsFormat
from ds_compress.export.expected import dtype_of, expected_of, is_quantized
from ds_compress.export.fingerprint import Fingerprint, fingerprint
from ds_compress.export.format import OTHER_FORMAT, Format, Options, another_model, refuse_quantized_experts
from ds_compress.export.hf import HfFormat
from ds_compress.export.inputs import checked_inputs, example_inputs, unknown_inputs
from ds_compress.export.onnx import OnnxFormat
from ds_compress.export.openvino import OpenVinoFormat
from ds_compress.export.read import Layer, read_layers
from ds_compress.export.report import ExportReport
from ds_compress.export.serving_format import ServingFormat
from ds_compress.export.shards import ShardWriter
from ds_compress.export.source import ExportSource
from ds_compress.export.tokenizer import save_tokenizer
from ds_compress.export.versions import versions
from ds_compress.export.whole import refuse_foreign, seal
from ds_compress.files import UnfinishedFolder
from ds_compress.modelinfo.adapters import has_adapters
from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.kinds import ModuleKind, shape_of
from ds_compress.quant import layers
from ds_compress.quant.schemes import Scheme
from ds_compress.structure.apply_pruning import apply_pruning

_MANY_ZERO_UNITS = 0.1

FORMATS: dict[str, type[Format]] = {
    format.name: format
    for format in (HfFormat, CompressedTensorsFormat, ServingFormat, OnnxFormat, OpenVinoFormat)
}


def register_format(format: type[Format]) -> None:
    """`ds_compress.export(..., format=format.name)` writes it from now on.

    Raises:
        ValueError: another format has that name.
    """
    if FORMATS.setdefault(format.name, format) is not format:
        raise ValueError(f"there is a format {format.name!r} already")


@torch.no_grad()
def write_export(
    source: ExportSource,
    out_dir: str | PathLike[str],
    format: str | None,
    options: Options,
    *,
    tokenizer: Any,
    inputs: Mapping[str, torch.Tensor] | None,
    check: bool,
    overwrite: bool,
    shard_bytes: int,
    card: Mapping[str, Any] | None = None,
) -> ExportReport:
    """`ds_compress.export` of what was loaded from its source; the arguments are those of that function."""
    out = Path(out_dir)
    failure: BaseException | None = None
    unfinished = None
    try:
        if source.writes:
            if out.exists() and not overwrite and not _is_empty_folder(out):
                raise ExportError(f"{out} exists: give another folder, or overwrite=True")
            refuse_foreign(out)
            unfinished = UnfinishedFolder(out).__enter__()
    except (OSError, ExportError) as error:
        failure = error
    try:
        source.broadcast_error(failure)
        job = _Export(source, format, options, inputs, check, out.name, card)
        job.write(unfinished.path if unfinished else out, shard_bytes, tokenizer, out)
        try:
            if unfinished is not None:
                unfinished.finish()
        except OSError as error:
            failure = error
        source.broadcast_error(failure)
        report: ExportReport = source.share(job.report)
        return report
    finally:
        if unfinished is not None:
            unfinished.__exit__(None, None, None)


class _Export:
    """One export: what `export` was told, and the report that grows."""

    def __init__(
        self,
        source: ExportSource,
        format: str | None,
        options: Options,
        inputs: Mapping[str, torch.Tensor] | None,
        check: bool,
        name: str,
        card: Mapping[str, Any] | None,
    ) -> None:
        self.source, self.name = source, name
        if has_adapters(source.model):
            raise ExportError(
                "the model has adapters of PEFT beside its weights, which no format here can say: merge them first "
                "with ds_compress.hf.merge_and_unload(engine_or_model), which keeps pruned weights zero"
            )
        cache = kv_cache.kv_cache_scales(source)
        is_float = not (is_quantized(source.model) or options.scheme or cache)
        usual = "hf" if is_float else "compressed-tensors"
        name = format or source.export_to or usual
        if name not in FORMATS:
            raise ExportError(f"format is one of {', '.join(FORMATS)}, got {name!r}")
        self.format = FORMATS[name](options, trained_dtype=dtype_of(source.model), checked=check)
        self.format.kv_cache = cache
        self.format.scheme = ptq.scheme_to_round_to(options.scheme, source)
        self.global_scales = ptq.global_scales(source, self.format.scheme)
        self.final = _after_cuts(source)
        if not self.format.stores_stacks:
            refuse_quantized_experts(source.model, name)
        self.format.check_source(source, self.final)
        self.given = None if inputs is None else checked_inputs(source.model, inputs)
        self.inputs = (self.given or example_inputs(source.model)) if check else None
        self.masked: list[str] = []
        self.rounded_inputs: list[str] = []
        self.fingerprints: dict[str, Fingerprint] = {}
        self.report = ExportReport("", name, _class_name(source.model), source.description)
        self.card = model_card.card_data(card, name, self.report.model_class, self.name)

    def write(self, folder: Path, shard_bytes: int, tokenizer: Any, out: Path) -> None:
        source, report = self.source, self.report
        report.folder = str(out)
        report.steps, report.metrics = source.steps, source.metrics
        report.commitments = source.commitments
        report.dense_bytes = 4 * (source.parameters or sum(_sizes(source.model)))
        failure: BaseException | None = None
        try:
            if source.writes:
                self._write_config(folder)
                save_tokenizer(tokenizer or source.tokenizer, folder)
        except Exception as error:
            failure = error
        failure = failure or self._write_tensors(folder, shard_bytes)
        source.broadcast_error(failure)
        # The model runs in every process; only one compares.
        expected = self._expected()
        failure = None
        try:
            if source.writes:
                self._finish(folder, expected)
        except Exception as error:
            failure = (
                error if isinstance(error, ExportError) else ExportError(f"{type(error).__name__}: {error}")
            )
        source.broadcast_error(failure)

    def _write_tensors(self, folder: Path, shard_bytes: int) -> BaseException | None:
        failure: BaseException | None = None
        writer = ShardWriter(folder, shard_bytes)
        reading = read_layers(self.source)
        while True:
            try:
                layer = next(reading)
                if self.source.writes and failure is None:
                    if self.format.scheme is not None:
                        layer = self._rounded(layer, self.format.scheme)
                    stored = self.format.files(layer)
                    for name, tensor in stored.items():
                        writer.add(name, tensor)
                    self.report.count(layer, stored)
                    self._note_zero_units(layer)
                    if self.inputs is not None:
                        self._remember(layer)
            except StopIteration as end:
                failure = failure or end.value
                break
            except (ExportError, OSError, ValueError) as error:
                # Other processes go through all modules, and wait for this one at each.
                failure = error
        if self.source.writes and failure is None and self.format.has_shards:
            for name, tensor in self.format.cache_tensors().items():
                writer.add(name, tensor)
                self.fingerprints[name] = fingerprint(self.format.loaded_scale(name, tensor))
            writer.close()
        return failure

    def _rounded(self, layer: Layer, scheme: Scheme) -> Layer:
        rounded = ptq.rounded(layer, scheme, self.format.note, self.global_scales.get(layer.name))
        for local, experts in rounded.experts.items():
            self.format.rounded[layer.full(local)] = self.format.dequantized_experts(rounded, experts)
        if rounded.expert_inputs and self.format.rounds_expert_inputs:
            self.rounded_inputs.append(layer.name)
        if rounded.quantized is not None:
            self.format.rounded[layer.full("weight")] = self.format.dequantized(rounded, rounded.quantized)
            if rounded.input is not None:
                self.rounded_inputs.append(layer.name)
        return rounded

    def _note_zero_units(self, layer: Layer) -> None:
        weight = layer.tensors.get("weight") if layer.quantized is None else layer.quantized.dequantize()
        if (
            layer.kind in (None, ModuleKind.EMBEDDING)
            or weight is None
            or weight.dim() < 2
            or not weight.numel()
        ):
            return
        counts = weight.flatten(1).count_nonzero(1), weight.flatten(1).count_nonzero(0)
        if max(float((count == 0).float().mean()) for count in counts) >= _MANY_ZERO_UNITS:
            self.masked.append(layer.name)

    def _remember(self, layer: Layer) -> None:
        for name, value in self.format.values(layer).items():
            self.fingerprints[name] = fingerprint(value)
        for name, scale in self.format.loaded_input_scales(layer).items():
            self.fingerprints[name] = fingerprint(scale)

    def _write_config(self, folder: Path) -> None:
        config = self.source.config
        if config is None:
            return
        written: Any = copy.deepcopy(self.final.config)
        vars(written).pop(
            "ds_compress", None
        )  # for folders that are not exported: see engine.checkpoint.origin
        written.architectures = [self.report.model_class]
        written.dtype = self.format.loaded_dtype(dtype_of(self.source.model))
        written.save_pretrained(folder)
        model: Any = self.source.model
        generation = getattr(model, "generation_config", None)
        if generation is not None and model.can_generate():
            generation.save_pretrained(folder)

    def _expected(self) -> checking.Expected | None:
        if self.inputs is None:
            return None
        try:
            return expected_of(self.source, self.format, self.inputs, self.rounded_inputs, self.fingerprints)
        except Exception as error:
            if self.given is not None:
                raise ExportError(
                    f"the model does not run on inputs=: {type(error).__name__}: {error}"
                ) from error
            raise ExportError(
                f"{unknown_inputs(self.source.model)} ({type(error).__name__}: {error})"
            ) from error

    def _finish(self, folder: Path, expected: checking.Expected | None) -> None:
        report = self.report
        self._add_config_entries(folder)
        self.format.finish(folder, self.source, self.final, self.inputs or self.given)
        for name, stored in self.format.schemes.items():
            report.modules.setdefault(name, {})["scheme"] = stored
        report.notes = self.format.notes + _sparsity_notes(report)
        if self.masked:
            report.notes.append(
                f"whole rows or columns of {self.masked[0]} are zero ({len(self.masked)} layers in all): units that "
                "were masked and not removed; ds_compress.finalize removes them"
            )
        if self.source.config is not None and self.format.name == "torch":
            report.attributes = attribute_overrides(self.final, self.final.config)
        report.versions = versions()
        if self.source.run_record is not None:
            run_record.write(folder, self.source.run_record)
        report.write(folder)
        seal(folder)
        if expected is not None:
            answer = self._reloaded(folder, expected)
            try:
                report.check = checking.verdict(expected, answer)
            except ExportError as error:
                suspect = self._likely_cause()
                raise ExportError(f"{suspect}{error}{')' if suspect.endswith('(') else ''}") from error
            if self.format.differences:
                report.notes.append(f"{'; '.join(self.format.differences)}: logits are the same")
            if expected.rounding_cost is not None:
                report.notes.append(
                    f"what was rounded by this export, and not in training, changes logits by "
                    f"{expected.rounding_cost:.2g} at most; the largest is {report.check['largest_logit']:.3g}"
                )
            report.write(folder)
            seal(folder)
        model_card.write_card(folder, report, self.card, self.name)

    def _likely_cause(self) -> str:
        """What the export did that not every model class takes."""
        if self.format.differences:
            return f"{another_model(self.format.name, self.format.differences)}. {OTHER_FORMAT} ("
        if not self.format.untied or not self.format.loads_in_vanilla_hf:
            return ""
        return (
            f"{self.format.untied[0]}: the weight is tied, only one of them quantizes it, and this model is not the "
            f"same when both are stored; quantize both or none, or {OTHER_FORMAT}: "
        )

    def _reloaded(self, folder: Path, expected: checking.Expected) -> checking.Answer:
        answer = self.format.reload_here(folder, expected.inputs, self.final)
        if answer is not None:
            return answer
        unread = tuple(self.format.cache_tensors())
        request = checking.Request(
            folder, self.report.model_class, expected.inputs, self.format.loader, unread
        )
        return checking.reload([request])[0]

    def _add_config_entries(self, folder: Path) -> None:
        if self.source.config is None:
            return
        entries = self.format.config_entries(self.final)
        if not entries:
            return
        import json

        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _after_cuts(source: ExportSource) -> nn.Module:
    pruning_plan = source.pruning_plan
    if pruning_plan is None or not pruning_plan.active():
        return source.model
    if source.config is None:
        raise ExportError(
            "structures are masked and the model has no config: export what ds_compress.finalize returns"
        )
    meta_model = built_from_config(type(source.model), source.config)
    apply_pruning(meta_model, pruning_plan, meta=True)
    return meta_model


def _sizes(model: nn.Module) -> Iterator[int]:
    for name, parameter in model.named_parameters():
        if not layers.is_step_size(name) and not is_auxiliary(name):
            yield math.prod(shape_of(parameter))


def _class_name(model: nn.Module) -> str:
    return getattr(type(model), "_ds_compress_base_class", type(model)).__name__


def _sparsity_notes(report: ExportReport) -> list[str]:
    if report.sparsity < 0.3 or report.format == "torch":
        return []
    return [
        'zeros are stored like all other weights: only format="torch" is sparse, and no served 2:4 format is'
    ]
