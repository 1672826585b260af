"""`activation_quantization`: the inputs of Linear, Conv1D and Conv2d layers are rounded to integers or small floats.

- **dynamic**: the range is that of the input itself: of each token (the last axis), of each image for a
  Conv2d, or of the whole tensor (`per_tensor`: a process then sees the range of its own micro-batch).
- **static**: one range per layer, a running mean (`range_momentum`) of the extremes that training saw in each
  optimizer step: over all its micro-steps and, by one reduction for all layers, over all processes, so that
  every process has the same range. Until a layer has a first range its input passes unquantized. `eval()`
  neither observes nor changes ranges. A step whose extremes are not finite leaves the range as it was (and
  makes the output NaN: see `quant.layers`).

- Block formats have a dynamic scale for each block; nvfp4 one for the whole input besides, which is observed as a
  static range is: servers read that one from the checkpoint.

- The inputs of both matrices of fused experts are quantized row by row, a row for each token of an expert. A static
  range, and a dynamic one `per_tensor`, is one for each expert. An expert that saw no token keeps its range, and until
  it has one its rows pass unquantized.

Before `schedule_offset` applied steps nothing is quantized or observed. Gradients are straight through, zero
where a value clips.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ds_compress.config.schema.formats import INTEGERS, stretch_at
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant import fast_paths, layers
from ds_compress.quant.grid import ActivationGrid, TokenGranularity
from ds_compress.techniques.base import Technique
from ds_compress.techniques.observed_ranges import ObservedRanges, renamed_ranges

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ds_compress.config.targets import Target, TechniquePlan
    from ds_compress.sharding.shards import Shards


class ActivationQuantization(Technique):
    """Raises ValueError at construction for a layer whose input cannot be quantized."""

    name: ClassVar[str] = "activation_quantization"
    is_in_forward = True

    def __init__(self, technique: TechniquePlan, seed: int) -> None:
        """`seed` is not used: ranges have no randomness."""
        self._shared = technique.shared
        self._targets = technique.targets
        self._grids = {
            target.module_name: [
                *(
                    self._grid(target, _as_params(target.params, stretch))
                    for stretch in target.params.earlier_formats
                ),
                self._grid(target, target.params),
            ]
            for target in self._targets
        }
        self._quantizers = {
            target.module_name: _quantizer(target, self._grids[target.module_name][-1])
            for target in self._targets
        }
        observing = {
            name: quantizer
            for name, quantizer in self._quantizers.items()
            if any(grid.static for grid in self._grids[name])
        }
        self._ranges = ObservedRanges(observing, self._shared.range_momentum)
        self._step = 0

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        for target in self._targets:
            attached = layers.attach(target.module)
            attached.set_input_quantizer(target.parameter, self._quantizers[target.module_name])
        fast_paths.disable(model)
        self._model = model
        self._use_schedule_at(0)
        return {}

    def attach(self, shards: Shards) -> None:
        self._ranges.attach(shards)

    def before_step(self, step: int) -> None:
        self._ranges.remember()
        if self._ranges.quantizers and self._enabled:
            self._ranges.update(self._targets[0].param.device)

    def on_skipped_step(self) -> None:
        self._ranges.put_back()

    def after_step(self, step: int) -> None:
        self._use_schedule_at(step)

    def detach(self) -> None:
        for target in self._targets:
            layers.attach(target.module).set_input_quantizer(target.parameter, None)
            layers.detach(target.module)
        if self._targets:
            fast_paths.restore(self._model)

    def state_dict(self) -> dict[str, Any]:
        """`ranges`: fp32 (min, max) on the CPU by module name, for the layers that have one."""
        return {"step": self._step, "ranges": self._ranges.state()}

    def keep_experts(self, kept: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        for name, quantizer in self._quantizers.items():
            quantizer.keep_experts(functools.partial(kept, name))

    def renamed_state(self, renamed: Callable[[str], str | None]) -> dict[str, Any]:
        state = self.state_dict()
        return {**state, "ranges": renamed_ranges(state["ranges"], renamed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ranges.load(state["ranges"])
        self._use_schedule_at(int(state["step"]))

    def metrics(self) -> dict[str, float]:
        """`mean_bits` over layers, 0 for those that do not quantize yet; `layers_with_range`, of a static grid."""
        quantizers = self._quantizers.values()
        count = max(1, len(quantizers))
        numbers = {"mean_bits": sum(q.grid.bits for q in quantizers if q.is_active) / count}
        if self._ranges.quantizers:
            numbers["layers_with_range"] = float(len(self._ranges.quantizers) - self._ranges.missing)
        return numbers

    @property
    def lacks_ranges(self) -> bool:
        """Whether a layer still waits for its static range, and does not quantize its input until then."""
        return any(q.grid.static and q.lacks_range for q in self._ranges.quantizers.values())

    @property
    def _enabled(self) -> bool:
        return self._step >= self._shared.schedule_offset

    def _use_schedule_at(self, step: int) -> None:
        self._step = step
        elapsed = max(0, step - self._shared.schedule_offset)
        for target in self._targets:
            quantizer = self._quantizers[target.module_name]
            quantizer.enabled = self._enabled
            stretch, _ = stretch_at(target.params, elapsed)
            number = -1 if stretch is None else target.params.earlier_formats.index(stretch)
            quantizer.grid = self._grids[target.module_name][number]
            # An earlier format may need no range that the last one needs from its first step on.
            quantizer.observes = target.module_name in self._ranges.quantizers

    def _grid(self, target: Target, params: Any) -> ActivationGrid:
        if target.kind == ModuleKind.EMBEDDING:
            raise ValueError(f"activation_quantization of {target.module_name!r}: indices have no precision")
        try:
            layers.check(target.module)
        except (ValueError, TypeError) as error:
            raise ValueError(f"activation_quantization of {target.module_name!r}: {error}") from error
        granularity = TokenGranularity(self._shared.granularity_of(params))
        if granularity is TokenGranularity.PER_TOKEN and target.kind == ModuleKind.CONV2D:
            granularity = TokenGranularity.PER_SAMPLE
        return ActivationGrid(
            bits=params.final_bits,
            symmetric=self._shared.quantization_type == "symmetric",
            narrow_range=params.format == INTEGERS and bool(self._shared.narrow_range),
            granularity=granularity,
            static=self._shared.observes(params),
            group_size=self._shared.group_size_of(params),
            format=params.format,
        )


def _quantizer(target: Target, grid: ActivationGrid) -> layers.InputQuantizer:
    if target.kind.is_experts:
        return layers.ExpertsInputQuantizer(grid, experts=target.matrices)
    return layers.InputQuantizer(grid)


def _as_params(params: Any, stretch: Any) -> Any:
    """The params of a group while an earlier format lasts."""
    changes = {"format": stretch.format, "bits": stretch.bits, "group_size": None, "granularity": None}
    return params.model_copy(update=changes)
