"""The whole `compression_training` block: its model, its parser, and the JSON schema for editors.

`python -m ds_compress.config.schema` writes the schema file that the package ships.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, ValidationError, WithJsonSchema, create_model

from ds_compress.config.recipes.expand import Applied, applied
from ds_compress.config.schema import qad
from ds_compress.config.schema.activation_quantization import ActivationQuantizationConfig
from ds_compress.config.schema.block import Block
from ds_compress.config.schema.channel_pruning import ChannelPruningConfig
from ds_compress.config.schema.depth_pruning import DepthPruningConfig
from ds_compress.config.schema.distillation import DistillationConfig, LogitsLoss, Loss, Losses
from ds_compress.config.schema.expert_pruning import ExpertPruningConfig
from ds_compress.config.schema.fields import Conflict, Description, Seed, StrictModel
from ds_compress.config.schema.gradient_compression import GradientCompressionConfig
from ds_compress.config.schema.head_pruning import HeadPruningConfig
from ds_compress.config.schema.hidden_pruning import HiddenPruningConfig
from ds_compress.config.schema.kv_cache import KvCache, takes_the_word_too
from ds_compress.config.schema.layer_reduction import LayerReductionConfig
from ds_compress.config.schema.parameter_compression import ParameterCompressionConfig
from ds_compress.config.schema.robust_reduction import RobustReductionConfig
from ds_compress.config.schema.row_pruning import RowPruningConfig
from ds_compress.config.schema.scheme import SCHEMA_OF_SCHEME, expanded
from ds_compress.config.schema.security import SecurityConfig
from ds_compress.config.schema.sparse_pruning import SparsePruningConfig
from ds_compress.config.schema.translate import Where, translate
from ds_compress.config.schema.weight_quantization import WeightQuantizationConfig
from ds_compress.errors import ROOT, ConfigError, Problem, shown
from ds_compress.files import atomic_write

SCHEMA_FILE = Path(__file__).with_name("compression_training.schema.json")
SCHEMA_KEY = "$schema"
"""By which a JSON file tells an editor where its schema lies; nothing else reads it."""
AUTO = "auto"
"""Hugging Face's word for a value that is worked out elsewhere; in this block it means: left out."""


class CompressionConfig(StrictModel):
    """The `compression_training` block of a DeepSpeed config; a block that is absent is None."""

    recipe: str | None = Field(
        default=None,
        # What is saved is the block as the recipe made it: a later version would make another one of the name.
        exclude=True,
        description=(
            'A named preset, "w4a16", or one version of it, "w4a16@1": the other keys are merged over it. Objects '
            "merge, any other value replaces, null removes a key."
        ),
    )
    sparse_pruning: SparsePruningConfig | None = Field(
        default=None, description="Set single weights to zero."
    )
    weight_quantization: WeightQuantizationConfig | None = Field(
        default=None, description="Fewer bits for weights."
    )
    activation_quantization: ActivationQuantizationConfig | None = Field(
        default=None, description="Fewer bits for the inputs of layers."
    )
    kv_cache: KvCache = Field(
        default=None,
        description='Fewer bits for the keys and values that a decoder keeps; "fp8" in short.',
        json_schema_extra=takes_the_word_too,
    )
    row_pruning: RowPruningConfig | None = Field(
        default=None, description="Remove neurons of feed-forward blocks."
    )
    head_pruning: HeadPruningConfig | None = Field(default=None, description="Remove attention heads.")
    channel_pruning: ChannelPruningConfig | None = Field(
        default=None, description="Remove channels of Conv2d layers."
    )
    depth_pruning: DepthPruningConfig | None = Field(
        default=None, description="Remove whole layers, by importance, while training."
    )
    hidden_pruning: HiddenPruningConfig | None = Field(default=None, description="Narrow the hidden size.")
    expert_pruning: ExpertPruningConfig | None = Field(
        default=None, description="Remove, or merge, experts of a mixture."
    )
    layer_reduction: LayerReductionConfig | None = Field(default=None, description="Remove whole layers.")
    distillation: DistillationConfig | None = Field(
        default=None, description="Learn from a teacher while compressing."
    )
    gradient_compression: GradientCompressionConfig | None = Field(
        default=None, description="Fewer bits for gradients between processes."
    )
    parameter_compression: ParameterCompressionConfig | None = Field(
        default=None, description="Fewer bits for weights between processes."
    )
    robust_reduction: RobustReductionConfig | None = Field(
        default=None, description="Withstand bad gradients of a few workers."
    )
    security: SecurityConfig | None = Field(
        default=None, description="What has to be signed before it is read."
    )
    seed: Seed = Field(default=0, description="Seed of everything random in this block.")
    kernels: Literal["auto", "native", "reference"] = Field(
        default="auto",
        description=(
            "native: compiled kernels, or an error; reference: plain torch; auto: native where they can be "
            "built. DS_COMPRESS_KERNELS in the environment overrides it."
        ),
    )

    scheme: Annotated[
        Any, WithJsonSchema(SCHEMA_OF_SCHEME), Description("the name of a scheme, or {name: [regexes]}")
    ] = Field(
        default=None,
        description=(
            'How weights and inputs are quantized, in one word that compressed-tensors and vLLM know: "W8A8", "W4A16", '
            '"FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4", ...; or {name: [regexes of modules]}, a scheme for each set '
            "of modules. It makes the groups of weight_quantization and activation_quantization; an output head stays "
            "as it is unless a regex names it."
        ),
    )
    export_to: Literal["hf", "compressed-tensors", "torch", "onnx", "openvino"] | None = Field(
        default=None,
        description=(
            "The format of ds_compress.export that the result is for: refused at start where it could not say what "
            "these blocks make of this model. An export without format= uses it."
        ),
    )

    _applied: Applied | None = PrivateAttr(default=None)

    @property
    def applied_recipe(self) -> Applied | None:
        """The recipe that the JSON named, and what it says beside it."""
        return self._applied

    def blocks(self) -> dict[str, Block]:
        """The blocks that are there, enabled or not, by key."""
        values = ((name, getattr(self, name)) for name in block_classes())
        return {name: block for name, block in values if block is not None}

    def enabled_blocks(self) -> dict[str, Block]:
        """Those that do something."""
        return {name: block for name, block in self.blocks().items() if block.is_enabled}

    def without(self, *names: str) -> CompressionConfig:
        """The same config, as if these blocks were absent."""
        return self.model_copy(update=dict.fromkeys(names))

    def after_shrink(self) -> CompressionConfig:
        """What is left to do once a shrink has removed what is masked."""
        return self.without(*(name for name, block in self.blocks().items() if block.done_after_shrink))

    @property
    def insists_on_native(self) -> str | None:
        """The path of the key that insists on native kernels, None when none does."""
        if self.kernels == "native":
            return "kernels"
        insisting = (
            f"{name}.{keys}" for name, b in self.enabled_blocks().items() if (keys := b.insists_on_native)
        )
        return next(insisting, None)

    def conflicts(self) -> Iterator[Conflict]:
        if self.kernels == "reference" and self.insists_on_native is not None:
            yield Conflict(
                ("kernels",),
                self.kernels,
                f'"auto" or "native", because {self.insists_on_native} is true',
                "remove one of the two",
            )
        enabled = self.enabled_blocks()
        for block in enabled.values():
            yield from block.conflicts_beside(enabled)


_registered: dict[str, type[Block]] = {}
_registered_losses: dict[str, type[Loss]] = {}


def register_block(block: type[Block]) -> None:
    """`compression_training` has one more block from now on, under `block.key`; again: nothing.

    Raises:
        ValueError: another block, or a setting, has that key already.
    """
    known = {**{name: None for name in CompressionConfig.model_fields}, **_registered}
    if known.get(block.key, block) is not block:
        raise ValueError(f"compression_training has a key {block.key!r} already")
    _registered[block.key] = block
    _model_of.cache_clear()


def register_loss_config(name: str, config: type[Loss]) -> None:
    """`distillation.losses` has one more key from now on."""
    _registered_losses[name] = config
    _model_of.cache_clear()


def unregister_loss_config(name: str) -> None:
    """The loss that `register_loss_config` added is unknown again (for tests)."""
    _registered_losses.pop(name, None)
    _model_of.cache_clear()


def unregister_block(key: str) -> None:
    """The block that `register_block` added is unknown again (for tests)."""
    _registered.pop(key, None)
    _model_of.cache_clear()


def config_model() -> type[CompressionConfig]:
    """The model of `compression_training`, with all blocks that were registered."""
    return _model_of()


@functools.cache
def _model_of() -> type[CompressionConfig]:
    if not _registered and not _registered_losses:
        return CompressionConfig
    fields = {key: _optional(block) for key, block in _registered.items()}
    if _registered_losses:
        more = {key: _optional(loss) for key, loss in _registered_losses.items()}
        losses = create_model("Losses", __base__=Losses, **more)
        described = Field(
            default_factory=lambda: losses(logits=LogitsLoss()),
            description=DistillationConfig.model_fields["losses"].description,
        )
        distillation = create_model(
            "DistillationConfig", __base__=DistillationConfig, losses=(losses, described)
        )
        fields["distillation"] = _optional(distillation)
    return create_model("CompressionConfig", __base__=CompressionConfig, **fields)


def _optional(model: type[StrictModel]) -> Any:
    """The field of a key that may be absent."""
    return model | None, Field(default=None, description=(model.__doc__ or "").strip().split("\n")[0])


def block_classes() -> dict[str, type[Block]]:
    """The model of every block that the config may have, by key."""
    return {
        name: kind
        for name, field in config_model().model_fields.items()
        for kind in get_args(field.annotation)
        if isinstance(kind, type) and issubclass(kind, Block)
    }


def parse_config(block: Mapping[str, Any]) -> CompressionConfig:
    """Validates the value of `compression_training`; raises ConfigError with all problems in one pass."""
    if not isinstance(block, Mapping):
        raise ConfigError([Problem(ROOT, shown(block), "an object")])
    if isinstance(block.get(SCHEMA_KEY), str):
        block = {key: value for key, value in block.items() if key != SCHEMA_KEY}
    model = config_model()
    given = without_auto(block)
    recipe = applied(given)
    if recipe is not None:
        given = {**recipe.block, "recipe": recipe.recipe.label}
    written, problems = expanded(given)
    written = qad.with_defaults(written)
    try:
        parsed = model.model_validate(written)
    except ValidationError as error:
        raw = block if recipe is None else {**written, **block}
        problems += translate(error, model, raw)
        problems += _hidden_by_bad_groups(written, error, problems)
    if problems:
        raise ConfigError(problems if recipe is None else recipe.told(problems))
    parsed._applied = recipe
    return parsed


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
        config_model().model_validate(sound)
    except ValidationError as remaining:
        return [problem for problem in translate(remaining, config_model(), written) if problem not in known]
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
    block = config_model().model_json_schema()
    definitions = block.pop("$defs")
    address = {
        "type": "string",
        "description": "Where an editor finds this schema: a file that `ds_compress schema --out FILE` wrote.",
    }
    # A file may hold the block alone, and then has the key there.
    block["properties"] = {SCHEMA_KEY: address, **block["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:ds_compress:deepspeed-config",
        "title": "DeepSpeed config with a compression_training block",
        "type": "object",
        "properties": {SCHEMA_KEY: address, ROOT: {"$ref": "#/$defs/CompressionConfig"}},
        "$defs": {"CompressionConfig": block, **definitions},
    }


def schema_text() -> str:
    """What the shipped schema file contains."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def write_schema(path: Path = SCHEMA_FILE) -> None:
    """Writes the schema file, complete or not at all."""
    atomic_write(path, schema_text())
