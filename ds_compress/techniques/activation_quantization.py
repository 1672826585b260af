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

Before `schedule_offset` applied steps nothing is quantized or observed. Gradients are straight through, zero
where a value clips.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ds_compress.config.schema.formats import INTEGERS, stretch_at
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant import fast_paths, layers
from ds_compress.quant.grid import ActivationGrid, TokenGranularity
from ds_compress.techniques.base import Technique

if TYPE_CHECKING:
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
        self._quantizers = {name: layers.InputQuantizer(grids[-1]) for name, grids in self._grids.items()}
        self._observing = {
            name: quantizer
            for name, quantizer in self._quantizers.items()
            if any(grid.static for grid in self._grids[name])
        }
        self._step = 0
        self._shards: Shards | None = None

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        for target in self._targets:
            layers.attach(target.module).input_quantizer = self._quantizers[target.module_name]
        fast_paths.disable(model)
        self._model = model
        self._use_schedule_at(0)
        return {}

    def attach(self, shards: Shards) -> None:
        self._shards = shards

    def before_step(self, step: int) -> None:
        self._undo = {name: quantizer.input_range for name, quantizer in self._quantizers.items()}
        if self._observing and self._enabled:
            self._update_ranges()

    def on_skipped_step(self) -> None:
        for name, quantizer in self._quantizers.items():
            quantizer.input_range, quantizer.observed = self._undo[name], None

    def after_step(self, step: int) -> None:
        self._use_schedule_at(step)

    def detach(self) -> None:
        for target in self._targets:
            layers.attach(target.module).input_quantizer = None
            layers.detach(target.module)
        if self._targets:
            fast_paths.restore(self._model)

    def state_dict(self) -> dict[str, Any]:
        """`ranges`: fp32 (min, max) on the CPU by module name, for the layers that have one."""
        return {
            "step": self._step,
            "ranges": {
                name: quantizer.input_range.detach().cpu().clone()
                for name, quantizer in self._quantizers.items()
                if quantizer.input_range is not None
            },
        }

    def renamed_state(self, renamed: Callable[[str], str | None]) -> dict[str, Any]:
        state = self.state_dict()
        ranges = {renamed(name): input_range for name, input_range in state["ranges"].items()}
        return {**state, "ranges": {name: r for name, r in ranges.items() if name is not None}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, quantizer in self._quantizers.items():
            saved = state["ranges"].get(name)
            quantizer.input_range = None if saved is None else saved.to(torch.float32).clone()
            quantizer.observed = None
        self._use_schedule_at(int(state["step"]))

    def metrics(self) -> dict[str, float]:
        """`mean_bits` over layers, 0 for those that do not quantize yet; `layers_with_range`, of a static grid."""
        quantizers = self._quantizers.values()
        count = max(1, len(quantizers))
        numbers = {"mean_bits": sum(q.grid.bits for q in quantizers if q.is_active) / count}
        if self._observing:
            observing = self._observing.values()
            numbers["layers_with_range"] = float(sum(q.input_range is not None for q in observing))
        return numbers

    @property
    def lacks_ranges(self) -> bool:
        """Whether a layer still waits for its static range, and does not quantize its input until then."""
        return any(q.grid.static and q.input_range is None for q in self._observing.values())

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
            quantizer.observes = target.module_name in self._observing

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

    def _update_ranges(self) -> None:
        """All layers at once: one reduction, and no look at the values once every layer has a range."""
        quantizers = list(self._observing.values())
        device = self._targets[0].param.device
        nothing = torch.full((2,), -torch.inf, device=device)
        observed = torch.stack([nothing if q.observed is None else q.observed.to(device) for q in quantizers])
        if self._shards is not None:
            observed = self._shards.reduce_max(observed)
        # Observed is (-min, max), so that one maximum serves both.
        fresh = torch.stack([observed[:, 0].neg(), observed[:, 1]], dim=1)
        finite = torch.isfinite(fresh).all(dim=1, keepdim=True)
        old = torch.stack([_on(device, q.input_range, f) for q, f in zip(quantizers, fresh, strict=True)])
        momentum = self._shared.range_momentum
        ranges = torch.where(finite, torch.lerp(fresh, old, momentum), old).unbind()
        if all(quantizer.input_range is not None for quantizer in quantizers):
            known = [True] * len(quantizers)
        else:
            known = finite.flatten().tolist()
        for quantizer, new_range, is_known in zip(quantizers, ranges, known, strict=True):
            if is_known:
                quantizer.input_range = new_range
            quantizer.observed = None


def _as_params(params: Any, stretch: Any) -> Any:
    """The params of a group while an earlier format lasts."""
    changes = {"format": stretch.format, "bits": stretch.bits, "group_size": None, "granularity": None}
    return params.model_copy(update=changes)


def _on(device: torch.device, given: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise if given is None else given.to(device)
