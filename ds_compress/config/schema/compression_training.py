"""The whole `compression_training` block: its model, its parser, and the JSON schema for editors.

`python -m ds_compress.config.schema.compression_training` writes the schema file that the package ships.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ds_compress.config.schema.activation_quantization import ActivationQuantization
from ds_compress.config.schema.distillation import Distillation
from ds_compress.config.schema.fields import Conflict, Seed, StrictModel
from ds_compress.config.schema.gradient_compression import GradientCompression
from ds_compress.config.schema.layer_reduction import LayerReduction
from ds_compress.config.schema.parameter_compression import ParameterCompression
from ds_compress.config.schema.robust_reduction import RobustReduction
from ds_compress.config.schema.sparse_pruning import SparsePruning
from ds_compress.config.schema.structured_pruning import (
    ChannelPruning,
    DepthPruning,
    HeadPruning,
    HiddenPruning,
    RowPruning,
)
from ds_compress.config.schema.translate import Where, translate
from ds_compress.config.schema.weight_quantization import WeightQuantization
from ds_compress.errors import ROOT, ConfigError, Problem, shown

SCHEMA_FILE = Path(__file__).with_name("compression_training.schema.json")
_QUANTIZER_KERNEL = "weight_quantization.shared_parameters.quantizer_kernel"
AUTO = "auto"
"""Hugging Face's word for a value that is worked out elsewhere; in this block it means: left out."""


class CompressionConfig(StrictModel):
    """The `compression_training` block of a DeepSpeed config; a block that is absent is None."""

    sparse_pruning: SparsePruning | None = Field(default=None, description="Set single weights to zero.")
    weight_quantization: WeightQuantization | None = Field(
        default=None, description="Fewer bits for weights."
    )
    activation_quantization: ActivationQuantization | None = Field(
        default=None, description="Fewer bits for the inputs of layers."
    )
    row_pruning: RowPruning | None = Field(default=None, description="Remove neurons of feed-forward blocks.")
    head_pruning: HeadPruning | None = Field(default=None, description="Remove attention heads.")
    channel_pruning: ChannelPruning | None = Field(
        default=None, description="Remove channels of Conv2d layers."
    )
    depth_pruning: DepthPruning | None = Field(
        default=None, description="Remove whole layers, by importance, while training."
    )
    hidden_pruning: HiddenPruning | None = Field(default=None, description="Narrow the hidden size.")
    layer_reduction: LayerReduction | None = Field(default=None, description="Remove whole layers.")
    distillation: Distillation | None = Field(
        default=None, description="Learn from a teacher while compressing."
    )
    gradient_compression: GradientCompression | None = Field(
        default=None, description="Fewer bits for gradients on the wire."
    )
    parameter_compression: ParameterCompression | None = Field(
        default=None, description="Fewer bits for weights on the wire."
    )
    robust_reduction: RobustReduction | None = Field(
        default=None, description="Withstand bad gradients of a few workers."
    )
    seed: Seed = Field(default=0, description="Seed of everything random in this block.")
    kernels: Literal["auto", "native", "reference"] = Field(
        default="auto",
        description=(
            "native: compiled kernels, or an error; reference: plain torch; auto: native where they can be "
            "built. DS_COMPRESS_KERNELS in the environment overrides it."
        ),
    )

    export_to: Literal["hf", "compressed-tensors", "torch", "onnx"] | None = Field(
        default=None,
        description=(
            "The format of ds_compress.export that the result is for: refused at start where it could not say what "
            "these blocks make of this model. An export without format= uses it."
        ),
    )

    @property
    def insists_on_native(self) -> str | None:
        """The path of the key that insists on native kernels, None when none does."""
        quantization = self.weight_quantization
        if self.kernels == "native":
            return "kernels"
        if quantization and quantization.shared_parameters.enabled:
            return _QUANTIZER_KERNEL if quantization.shared_parameters.quantizer_kernel else None
        return None

    def conflicts(self) -> Iterator[Conflict]:
        if self.kernels == "reference" and self.insists_on_native is not None:
            yield Conflict(
                ("kernels",),
                self.kernels,
                f'"auto" or "native", because {self.insists_on_native} is true',
                "remove one of the two",
            )
        yield from self._reduction_conflicts()
        yield from self._distillation_conflicts()
        reduction, distillation = self.layer_reduction, self.distillation
        if not (reduction and reduction.enabled and distillation and distillation.enabled):
            return
        kept = reduction.keep_number_layer or len(reduction.teacher_layer or ())
        if distillation.layer_map is not None and len(distillation.layer_map) != kept:
            yield Conflict(
                ("distillation", "layer_map"),
                distillation.layer_map,
                f"{kept} entries, one for each layer that layer_reduction keeps",
            )

    def _reduction_conflicts(self) -> Iterator[Conflict]:
        gradients, robust = self.gradient_compression, self.robust_reduction
        if gradients and gradients.enabled and robust and robust.enabled:
            reasons = {
                "hierarchical": "robust_reduction has to see every worker, not the sum of a host",
                "error_feedback": "robust_reduction judges gradients, not gradients plus what was left of others",
            }
            for key, reason in reasons.items():
                if getattr(gradients, key):
                    yield Conflict(("gradient_compression", key), True, f"false, because {reason}")

    def _distillation_conflicts(self) -> Iterator[Conflict]:
        distillation = self.distillation
        if distillation is None or not distillation.enabled:
            return
        own = distillation.self_teacher.weights if distillation.self_teacher else None
        quantizers = self.weight_quantization, self.activation_quantization
        if own == "current" and not any(q and q.shared_parameters.enabled for q in quantizers):
            yield Conflict(
                ("distillation", "self_teacher", "weights"),
                own,
                "an enabled weight_quantization or activation_quantization beside it: the teacher is the model "
                "without its quantizers",
                'for a pruned model use "initial" or "ema"',
            )
        structured = (
            self.row_pruning,
            self.head_pruning,
            self.channel_pruning,
            self.depth_pruning,
            self.hidden_pruning,
        )
        shrinks = any(b and b.shared.enabled and b.shared.shrink_at_end_of_schedule for b in structured)
        if own in ("ema", "current") and shrinks:
            yield Conflict(
                ("distillation", "self_teacher", "weights"),
                own,
                '"initial" where shrink_at_end_of_schedule is true: the average has the shape of the whole model',
            )
        narrows = self.hidden_pruning is not None and self.hidden_pruning.shared.enabled
        if (
            narrows
            and self.hidden_pruning is not None
            and self.hidden_pruning.shared.shrink_at_end_of_schedule
        ):
            for name in ("hidden", "embedding", "contrastive"):
                if getattr(distillation.losses, name) is not None:
                    yield Conflict(
                        ("distillation", "losses", name),
                        {},
                        "no such loss while hidden_pruning shrinks the width that it compares",
                        "set shrink_at_end_of_schedule to false, or use logits and attention",
                    )


def parse_config(block: Mapping[str, Any]) -> CompressionConfig:
    """Validates the value of `compression_training`; raises ConfigError with all problems in one pass."""
    if not isinstance(block, Mapping):
        raise ConfigError([Problem(ROOT, shown(block), "an object")])
    written = without_auto(block)
    try:
        return CompressionConfig.model_validate(written)
    except ValidationError as error:
        problems = translate(error, CompressionConfig, block)
        problems += _hidden_by_bad_groups(written, error, problems)
        raise ConfigError(problems) from None


def without_auto(block: Any) -> Any:
    """The block without the keys whose value is "auto"."""
    if not isinstance(block, Mapping):
        return block
    deepest_key_of_the_schema = 6

    def strip(value: Any, depth: int) -> Any:
        if not isinstance(value, Mapping) or depth > deepest_key_of_the_schema:
            return value
        return {key: strip(item, depth + 1) for key, item in value.items() if not _is_auto(item)}

    return strip(block, 0)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == AUTO


def _hidden_by_bad_groups(written: Any, error: ValidationError, known: list[Problem]) -> list[Problem]:
    """Rules between groups are checked when every group is sound: check them on the sound groups too."""
    bad_groups = {
        loc[:3]
        for loc in (detail["loc"] for detail in error.errors())
        if len(loc) > 3 and loc[1] == "different_groups"
    }
    if not bad_groups:
        return []
    sound = _without(written, bad_groups)
    try:
        CompressionConfig.model_validate(sound)
    except ValidationError as remaining:
        return [
            problem for problem in translate(remaining, CompressionConfig, written) if problem not in known
        ]
    return []


def _without(written: Any, bad_groups: set[Where]) -> Any:
    sound = dict(written)
    for block in {group[0] for group in bad_groups}:
        groups = written[block]["different_groups"]
        kept = {
            name: group
            for name, group in groups.items()
            if (block, "different_groups", name) not in bad_groups
        }
        if kept:
            sound[block] = {**written[block], "different_groups": kept}
        else:
            del sound[block]
    return sound


def json_schema() -> dict[str, Any]:
    """JSON schema of a DeepSpeed config file, of which it describes the `compression_training` key only."""
    block = CompressionConfig.model_json_schema()
    definitions = block.pop("$defs")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DeepSpeed config with a compression_training block",
        "type": "object",
        "properties": {ROOT: {"$ref": "#/$defs/CompressionConfig"}},
        "$defs": {"CompressionConfig": block, **definitions},
    }


def schema_text() -> str:
    """What the shipped schema file contains."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def write_schema(path: Path = SCHEMA_FILE) -> None:
    """Writes the schema file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(schema_text())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
