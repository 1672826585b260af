"""`shared_parameters` of `weight_quantization`: grids, scales, rounding and gradients, the same for all groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.schema.fields import (
    Conflict,
    ExcludedModules,
    Ratio,
    Seed,
    Step,
    StrictBool,
    StrictInt,
    StrictModel,
    without_effect,
)
from ds_compress.config.schema.formats import SQUARE
from ds_compress.config.schema.weight_params import Granularity, WeightQuantizationParams

Scales = Literal["dynamic", "static", "searched", "learned"]
QuantizationType = Literal["symmetric", "asymmetric"]
_DEFAULT_COLUMNS_PER_SCALE = 128


class MixedQuantization(StrictModel):
    """Legacy: a blend of the real and the quantized weight, in which the real share decays from 1 to 0."""

    enabled: StrictBool = Field(default=False, description="Whether weights are blended.")
    quantize_change_ratio: Ratio = Field(
        default=0.001, description="What the real share loses at each applied step."
    )


class WeightQuantizationShared(StrictModel):
    """What holds for all groups of `weight_quantization`."""

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    quantizer_kernel: StrictBool = Field(
        default=False,
        description="Legacy: insist on the native quantizer; without it the run does not start.",
    )
    kernel: Literal["float", "int8", "fp8"] = Field(
        default="float",
        description=(
            "What Linear and Conv1D multiply in forward: float: values that were rounded to their grids; "
            "int8, fp8: the 8-bit codes themselves, as deployment will (needs activation_quantization)."
        ),
    )
    backward: Literal["float", "int8"] = Field(
        default="float",
        description=(
            'How the gradient of an input is multiplied beside kernel "int8": float: with the quantized weight, '
            "exactly; int8: its rows are rounded to 8-bit integers, too."
        ),
    )
    schedule_offset: Step = Field(
        default=0, description="Applied optimizer steps before weights are quantized."
    )
    quantize_groups: Annotated[StrictInt, Field(ge=1)] = Field(
        default=1, description="Scales per weight: the flattened weight is cut into so many equal parts."
    )
    quantize_verbose: StrictBool = Field(default=False, description="Log each change of bits.")
    quantization_type: QuantizationType = Field(
        default="symmetric", description="Whether the grid is centred on zero."
    )
    quantize_weight_in_forward: StrictBool = Field(
        default=False,
        description=(
            "Weights are fake-quantized in forward, with a straight-through gradient. true: it is zero where a value "
            "clips; false: it passes everywhere, as when the removed library rounded the weight after each step."
        ),
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="How a weight finds its grid point."
    )
    fp16_mixed_quantize: MixedQuantization = Field(
        default_factory=MixedQuantization, description="Legacy: fade the quantized weight in."
    )
    granularity: Granularity | None = Field(
        default=None,
        description=(
            "Weights that share a scale; absent or per_group: quantize_groups parts of the flattened weight, "
            "embeddings one scale per row."
        ),
    )
    group_size: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Columns that share a scale; only with per_column_group, where absent means 128.",
    )
    narrow_range: StrictBool | None = Field(
        default=None,
        description=(
            "true: the grid is symmetric and reaches +max and -max; false: the legacy grid, which cannot "
            "represent +max; absent: true with learned_scale or a granularity other than per_group, and for pruned "
            "weights on an asymmetric grid, whose zeros the legacy one cannot represent."
        ),
    )
    learned_scale: StrictBool = Field(
        default=False, description="Train the scales (LSQ); symmetric, nearest and at least 2 bits only."
    )
    scales: Scales | None = Field(
        default=None,
        description=(
            "dynamic: chosen from the weights at each forward; static: as they are chosen at the start; searched: "
            "those of some candidates with the least squared error at the start (nvfp4: four over six); learned: "
            "trained (LSQ), searched before for floats. Absent: learned with learned_scale, else dynamic."
        ),
    )
    train: Literal["all", "scales"] = Field(
        default="all",
        description="scales: every weight of the model is frozen, and only learned scales train.",
    )
    frozen_weights: Literal["full", "packed"] = Field(
        default="full",
        description=(
            "How weights that do not train (the base under LoRA adapters) are held: full: as they are, rounded at each "
            "forward; packed: as codes and scales alone, in every process, e.g. 4.5 bits each in nvfp4 (QLoRA)."
        ),
    )
    seed: Seed | None = Field(
        default=None, description="Seed of stochastic rounding; absent: the seed of the whole block."
    )
    excluded_modules: ExcludedModules = ()

    @property
    def effective_narrow_range(self) -> bool:
        """`narrow_range`, or the better grid wherever no legacy config can have asked for the old one."""
        if self.narrow_range is not None:
            return self.narrow_range
        return self.has_given_scales or self.granularity not in (None, "per_group")

    @property
    def effective_scales(self) -> Scales:
        """`scales`, or what the older key `learned_scale` means."""
        return self.scales or ("learned" if self.learned_scale else "dynamic")

    @property
    def has_given_scales(self) -> bool:
        """Whether scales are parameters of the model, trained or not, and not chosen from the weights at hand."""
        return self.effective_scales != "dynamic"

    @property
    def effective_group_size(self) -> int:
        """Columns that share a scale under per_column_group."""
        return self.group_size or _DEFAULT_COLUMNS_PER_SCALE

    def granularity_of(self, params: WeightQuantizationParams) -> Granularity | None:
        """Which weights of a group share a scale; None: per_group, or per row of an embedding."""
        known = params.number_format
        if known is not None and known.block is not None:
            return "per_column_group"
        if params.granularity is not None:
            return params.granularity
        if known is not None and self.granularity in (None, "per_group"):
            return "per_channel"
        return self.granularity

    def group_size_of(self, params: WeightQuantizationParams) -> int:
        """Columns, or rows and columns of a square block, that share a scale."""
        known = params.number_format
        if self.granularity_of(params) == "per_block":
            return SQUARE
        if known is not None and known.block is not None:
            return params.group_size or known.block
        return params.group_size or self.effective_group_size

    def conflicts(self) -> Iterator[Conflict]:
        if self.group_size is not None and self.granularity != "per_column_group":
            yield Conflict(
                ("group_size",),
                self.group_size,
                'nothing, unless granularity is "per_column_group"',
                'set granularity to "per_column_group" or remove "group_size"',
            )
        if self.quantize_groups != 1 and self.granularity not in (None, "per_group"):
            yield Conflict(
                ("quantize_groups",),
                self.quantize_groups,
                f"1 when granularity is {self.granularity}",
                'remove "quantize_groups", or set granularity to "per_group"',
            )
        if self.backward == "int8" and self.kernel != "int8":
            yield Conflict(
                ("backward",),
                "int8",
                '"float", unless kernel is "int8"',
                'set kernel to "int8", or remove it',
            )
        yield from without_effect(self, "seed", self.rounding == "nearest", 'rounding is "stochastic"')
        if self.learned_scale and self.scales not in (None, "learned"):
            yield Conflict(
                ("scales",), self.scales, '"learned", because learned_scale is true', "remove one of them"
            )
        elif self.has_given_scales:
            yield from self._of_given_scales()
        if self.frozen_weights == "packed":
            yield from self._of_packing()
        if self.train == "scales" and self.effective_scales != "learned":
            yield Conflict(("train",), "scales", 'scales "learned" beside it', 'add "scales": "learned"')

    def _of_packing(self) -> Iterator[Conflict]:
        """Codes are made once, at the start, so nothing may depend on the step."""
        steady = (
            ("schedule_offset", 0, 0),
            ("rounding", "nearest", '"nearest"'),
            ("quantization_type", "symmetric", '"symmetric"'),
            ("kernel", "float", '"float"'),
            ("train", "all", '"all"'),
        )
        for key, needed, shown in steady:
            if getattr(self, key) != needed:
                allowed = f'{shown}, because frozen_weights is "packed"'
                yield Conflict((key,), getattr(self, key), allowed, 'set frozen_weights to "full"')
        if self.has_given_scales:
            yield Conflict(
                ("scales",),
                self.effective_scales,
                '"dynamic", because frozen_weights is "packed"',
                "remove it",
            )
        if self.fp16_mixed_quantize.enabled:
            yield Conflict(("fp16_mixed_quantize",), "a blend", 'none, because frozen_weights is "packed"')

    def _of_given_scales(self) -> Iterator[Conflict]:
        why = "learned_scale is true" if self.learned_scale else f'scales is "{self.effective_scales}"'
        if self.quantization_type != "symmetric":
            yield Conflict(("quantization_type",), self.quantization_type, f'"symmetric", because {why}')
        if self.rounding != "nearest":
            yield Conflict(("rounding",), self.rounding, f'"nearest", because {why}')
        if self.effective_scales in ("static", "searched") and self.schedule_offset:
            yield Conflict(
                ("schedule_offset",),
                self.schedule_offset,
                f"0, because {why}: scales are chosen from the weights of the start",
                'use "dynamic" or "learned"',
            )
