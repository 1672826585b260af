"""`weight_quantization`: weights are trained as what they will be once they are stored in few bits.

From `schedule_offset` on, forward and backward use the fake-quantized weight (see `quant.grid` for the
formulas) while the optimizer moves the full-precision master.

- **Bits** fall by one after `quantization_period` applied steps, and the period then doubles: with a period
  P they drop P, 2P, 4P, ... steps after the offset, as in the removed library (which compared the doubled
  period with all steps so far). While they are above 8 the weight is not quantized. A period of 0 means
  `target_bits` at once.
- `fp16_mixed_quantize` blends: y = r w + (1 - r) Q(w); r starts at 1 at the offset, loses
  `quantize_change_ratio` per applied step and, as in the removed library, starts again at each drop of bits.
- `quantize_weight_in_forward: false` was "MoQ": the 16-bit copy of the weight was rounded after the optimizer
  step while the master stayed exact. The model then computes with Q(master), and its gradient goes to the
  master as it is: that is fake quantization in forward with a plain straight-through gradient, so this is
  what happens here, on every ZeRO stage and also in fp32. With `true` the gradient is zero where a value
  clips.
- `rounding: stochastic` draws its noise by counter from (seed, parameter name, applied step, element), so
  that every process, and backward again, rounds alike. It never touches torch's generators.
- `scales`: dynamic ones are a function of the weights. Others are a parameter, `weight_step_size` beside the weight:
  frozen when static or searched, trained when learned (LSQ, Esser et al. 2020). It is made for `target_bits`; with
  more bits it is multiplied by high(target_bits) / high(bits). The scales of a block format are rounded to what the
  format can store at each forward, with a straight-through gradient.
- nvfp4 has one more scale for the whole tensor. Servers fuse q, k and v, and gate and up, into one matrix with one such
  scale, so these share the largest magnitude of all of them, see `global_scales`.
- The matrices of fused experts are stacks of as many: each expert has scales of its own, and a parameter of given
  scales, `gate_up_proj_step_size`, has those of one matrix behind the number of experts. So has the nvfp4 scale of the
  whole tensor: servers read one for each expert (gate and up are one matrix here, which shares it).
- `train: "scales"` freezes every other parameter of the model.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ds_compress.config.schema.formats import INTEGERS, stretch_at
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.ops.counter_rng import stream_key
from ds_compress.quant import fast_paths, layers
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.fp8_linear import FIRST_CAPABILITY
from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.layout import check_shape
from ds_compress.quant.packed_weight import pack, unpack
from ds_compress.quant.search import largest_scale, searched_scale
from ds_compress.quant.weights import initial_scale
from ds_compress.techniques.base import Technique
from ds_compress.techniques.global_scales import GlobalScales

if TYPE_CHECKING:
    from ds_compress.config.targets import Target, TechniquePlan
    from ds_compress.sharding.shards import Shards

logger = logging.getLogger("ds_compress")

WIDEST_GRID = 8


@dataclass(frozen=True)
class BitWidth:
    """A stretch of the ladder from start_bits down to target_bits, and the step at which it began."""

    bits: int
    since: int


def bit_width_at(elapsed: int, start_bits: int, target_bits: int, period: int) -> BitWidth:
    """The rung `elapsed` applied steps after the schedule offset (0 or more)."""
    if period == 0:
        return BitWidth(target_bits, 0)
    bits, since, due = start_bits, 0, period
    while bits > target_bits and elapsed >= due:
        bits, since, due = bits - 1, due, due * 2
    return BitWidth(bits, since)


class WeightQuantization(Technique):
    """Raises ValueError at construction for a weight that its grid cannot cut or round as configured."""

    name: ClassVar[str] = "weight_quantization"
    is_in_forward = True

    def __init__(self, technique: TechniquePlan, seed: int) -> None:
        self._shared = technique.shared
        self._targets = technique.targets
        self._seed = seed if self._shared.seed is None else self._shared.seed
        if self._shared.kernel == "fp8":
            _check_device()
        self._step = 0
        self._quantizers: dict[str, layers.WeightQuantizer] = {}
        self._grids = {
            target.module_name: self._target_grid(target, target.params) for target in self._targets
        }
        self._earlier = {
            (target.module_name, number): self._target_grid(target, _as_params(target.params, stretch))
            for target in self._targets
            for number, stretch in enumerate(target.params.earlier_formats)
        }
        with_global = [target for target in self._targets if self._has_global_scale(target)]
        self._global = GlobalScales(with_global, follow=not self._shared.has_given_scales)

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        step_sizes: dict[tuple[int, WeightGrid], nn.Parameter] = {}
        added = {}
        if self._shared.train == "scales":
            model.requires_grad_(False)
        self._global.measure(full_parameters)
        for target in self._targets:
            self._quantizers[target.module_name] = layers.WeightQuantizer()
            attached = layers.attach(target.module)
            attached.set_weight_quantizer(target.parameter, self._quantizers[target.module_name])
            if self._shared.has_given_scales:
                shared_by_ties = (id(target.param), self._grids[target.module_name])
                if shared_by_ties not in step_sizes:
                    step_size = self._initial_step_size(target, full_parameters)
                    step_sizes[shared_by_ties] = step_size
                    if step_size.requires_grad:
                        added[self._step_size_name(target)] = step_size
                local = layers.step_size_name(target.parameter)
                target.module.register_parameter(local, step_sizes[shared_by_ties])
        fast_paths.disable(model)
        self._model = model
        self._use_schedule_at(0)
        if self._shared.frozen_weights == "packed":
            self._pack(model, full_parameters)
        return added

    def _pack(self, model: nn.Module, full_parameters: Callable[..., Any]) -> None:
        """Frozen weights that one layer alone reads become codes."""
        users = Counter(
            id(parameter) for module in model.modules() for parameter in module._parameters.values()
        )
        for target in self._targets:
            fake_quant = self._quantizers[target.module_name].fake_quant
            if target.param.requires_grad or users[id(target.param)] > 1 or fake_quant is None:
                continue
            with full_parameters([target.param]):
                try:
                    pack(target.module, fake_quant)
                except ValueError as error:
                    raise ValueError(f"weight_quantization of {target.module_name!r}: {error}") from error

    def attach(self, shards: Shards) -> None:
        self._global.attach(shards)

    def after_step(self, step: int) -> None:
        self._global.update()
        self._use_schedule_at(step)

    def detach(self) -> None:
        for target in self._targets:
            unpack(target.module)
            layers.attach(target.module).set_weight_quantizer(target.parameter, None)
            target.module._parameters.pop(layers.step_size_name(target.parameter), None)
            layers.detach(target.module)
        if self._targets:
            fast_paths.restore(self._model)

    def state_dict(self) -> dict[str, Any]:
        # Bits, blend and noise are functions of the step; given step sizes are the model's parameters.
        return {"step": self._step, **self._global.state_dict()}

    def keep_experts(self, kept: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        self._global.keep_experts(kept)
        self._use_schedule_at(self._step)

    def renamed_state(self, renamed: Callable[[str], str | None]) -> dict[str, Any]:
        # Global scales of the smaller model were measured when it was prepared.
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._global.load_state_dict(state)
        self._use_schedule_at(int(state["step"]))

    def metrics(self) -> dict[str, float]:
        """`mean_bits`: per weight, those of the parameter's dtype while it is not quantized."""
        sizes = {target.module_name: math.prod(target.shape) for target in self._targets}
        bits = sum(self._bits(target) * sizes[target.module_name] for target in self._targets)
        return {"mean_bits": bits / max(1, sum(sizes.values()))}

    def _step_size_name(self, target: Target) -> str:
        # A matrix of experts is named "<module>.<parameter>", a layer's weight by its module.
        name = target.module_name if target.kind.is_experts else f"{target.module_name}.{target.parameter}"
        return layers.step_size_name(name.lstrip("."))

    def _bits(self, target: Target) -> int:
        fake_quant = self._quantizers[target.module_name].fake_quant
        return 8 * target.param.element_size() if fake_quant is None else fake_quant.grid.bits

    def _rounds_stochastically(self, bits: int) -> bool:
        # Ternary and binary codes come from a threshold and a sign: there is nothing to round.
        return self._shared.rounding == "stochastic" and bits > 2

    def _has_global_scale(self, target: Target) -> bool:
        return any(grid.has_global_scale for grid in self._grids_of(target))

    def _grids_of(self, target: Target) -> list[WeightGrid]:
        earlier = range(len(target.params.earlier_formats))
        return [self._grids[target.module_name], *(self._earlier[target.module_name, n] for n in earlier)]

    def _target_grid(self, target: Target, params: Any) -> WeightGrid:
        shared = self._shared
        granularity = Granularity(shared.granularity_of(params) or "per_group")
        if target.kind == ModuleKind.EMBEDDING and granularity is Granularity.PER_GROUP:
            granularity = Granularity.PER_CHANNEL  # the legacy rule: a row of an embedding has its own scale
        symmetric = shared.quantization_type == "symmetric"
        try:
            grid = WeightGrid(
                bits=params.final_bits,
                symmetric=symmetric,
                narrow_range=params.format == INTEGERS and self._is_narrow(params, target.pruned),
                granularity=granularity,
                groups=shared.quantize_groups if granularity is Granularity.PER_GROUP else 1,
                group_size=shared.group_size_of(params),
                channel_axis=1 if target.kind.is_transposed else 0,
                stochastic=self._rounds_stochastically(params.final_bits),
                learned=shared.has_given_scales,
                format=params.format,
                stacked=target.kind.is_experts,
            )
            check_shape(target.shape, grid)
            layers.check(target.module, learned=shared.effective_scales == "learned")
        except (ValueError, TypeError) as error:
            raise ValueError(f"weight_quantization of {target.module_name!r}: {error}") from error
        return grid

    def _is_narrow(self, params: Any, pruned: bool) -> bool:
        if params.granularity is not None and self._shared.narrow_range is None:
            return True
        return self._shared.effective_narrow_range or (
            pruned and self._shared.quantization_type != "symmetric"
        )

    def _initial_step_size(self, target: Target, full_parameters: Callable[..., Any]) -> nn.Parameter:
        grid, scales = self._grids[target.module_name], self._shared.effective_scales
        global_scale = self._global.of(target.param_name) if grid.has_global_scale else None
        with full_parameters([target.param]):
            if scales == "searched" or (scales == "learned" and grid.format != INTEGERS):
                values = searched_scale(target.param.detach(), grid, global_scale)
            elif scales == "static":
                values = largest_scale(target.param.detach(), grid, global_scale)
            else:
                values = initial_scale(target.param, grid)
            values = values.to(device=target.param.device, dtype=target.param.dtype)
        trains = scales == "learned" and (target.param.requires_grad or self._shared.train == "scales")
        return nn.Parameter(values, requires_grad=trains)

    def _use_schedule_at(self, step: int) -> None:
        self._step = step
        for target in self._targets:
            quantizer = self._quantizers[target.module_name]
            before = self._bits(target)
            quantizer.fake_quant = self._recipe(target, step)
            if self._shared.quantize_verbose and self._bits(target) != before:
                logger.info("step %d: %s has %d bits", step, target.param_name, self._bits(target))

    def _recipe(self, target: Target, step: int) -> FakeQuantConfig | None:
        shared, params = self._shared, target.params
        elapsed = step - shared.schedule_offset
        if elapsed < 0:
            return None
        stretch, began = stretch_at(params, elapsed)
        final = self._grids[target.module_name]
        if stretch is not None:
            number = params.earlier_formats.index(stretch)
            grid = self._earlier[target.module_name, number]
            return self._with_global_scale(target, FakeQuantConfig(grid, clipped_ste=self._clips(grid)))
        if final.format == INTEGERS:
            bit_width = bit_width_at(
                elapsed - began, params.start_bits, params.target_bits, params.quantization_period
            )
        else:
            bit_width = BitWidth(final.bits, 0)
        if bit_width.bits > WIDEST_GRID:
            return None
        grid = final
        if bit_width.bits != final.bits:
            grid = replace(final, bits=bit_width.bits, stochastic=self._rounds_stochastically(bit_width.bits))
        blend_ratio = 0.0
        if shared.fp16_mixed_quantize.enabled:
            lost = shared.fp16_mixed_quantize.quantize_change_ratio * (elapsed - bit_width.since)
            blend_ratio = max(0.0, 1 - lost)
        fake_quant = FakeQuantConfig(
            grid=grid,
            noise_key=stream_key(self._seed, target.param_name, step) if grid.stochastic else 0,
            blend_ratio=blend_ratio,
            step_ratio=final.quant_max / grid.quant_max if grid.learned else 1.0,
            clipped_ste=self._clips(grid),
            kernel=shared.kernel if target.kind is not ModuleKind.EMBEDDING else "float",
            backward=shared.backward,
        )
        return self._with_global_scale(target, fake_quant)

    def _clips(self, grid: WeightGrid) -> bool:
        """Whether a weight that clips gets no gradient."""
        shared = self._shared
        return shared.quantize_weight_in_forward or shared.has_given_scales or grid.format != INTEGERS

    def _with_global_scale(self, target: Target, fake_quant: FakeQuantConfig) -> FakeQuantConfig:
        if not fake_quant.grid.has_global_scale:
            return fake_quant
        return replace(fake_quant, global_scale=self._global.of(target.param_name))


def _check_device() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FIRST_CAPABILITY:
        needed = ".".join(map(str, FIRST_CAPABILITY))
        raise ValueError(
            f'kernel "fp8" needs a GPU of compute capability {needed} or above, and this one has '
            f'{".".join(map(str, torch.cuda.get_device_capability()))}: set shared_parameters.kernel to "float"'
        )


def _as_params(params: Any, stretch: Any) -> Any:
    """The params of a group while an earlier format lasts."""
    changes = {"format": stretch.format, "target_bits": stretch.bits, "group_size": None, "granularity": None}
    return params.model_copy(update=changes)
