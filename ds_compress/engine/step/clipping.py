"""`gradient_clipping` counts the gradients that will be applied: those of weights that stay masked are none of them.

DeepSpeed takes its global norm over all gradients, before the optimizer steps and our masks are applied. Of a model
with 95 % of its weights masked most of that norm belongs to weights that do not move, and the rest would be clipped far
below the limit. What is left out is exactly what no weight, visible or hidden, will get in this step; a method that
scores masked weights by their gradients still sees those, scaled by the same factor. A gradient that is NaN or Inf
anywhere skips the step as before. `get_global_grad_norm()` is the norm that the limit was compared with. Without
clipping nothing is changed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_compress.engine.patches import Patches
from ds_compress.engine.zero import internals
from ds_compress.engine.zero.tensor_parallel import layer_shards
from ds_compress.ops import bitmask
from ds_compress.sharding.fragment import Fragment
from ds_compress.sharding.shards import Shards
from ds_compress.techniques.base import Technique


class AppliedNorm:
    """Stands in for DeepSpeed's norms of gradients, on every ZeRO stage.

    ZeRO's optimizers have a method each for gradients on the device and for offloaded ones. The others take the norm
    in the middle of their step: there the limit is moved by the ratio of both norms, for that step.
    """

    def __init__(self, engine: Any, techniques: Sequence[Technique]) -> None:
        self._engine, self._wrapper, self._techniques = engine, engine.optimizer, techniques
        self._patches = Patches()
        self._is_zero = hasattr(self._wrapper, "get_grad_norm_direct")
        if self._is_zero:
            self._direct = self._patches.install(self._wrapper, "get_grad_norm_direct", self._norm)
            self._offloaded = self._patches.install(
                self._wrapper, "complete_grad_norm_calculation_for_cpu_offload", self._norm_of_offloaded
            )

    def use(self, shards: Shards) -> None:
        self._shards, self._layers = shards, layer_shards(self._engine)
        self._by_parameter = {id(f.parameter): f for f in shards.fragments.values() if f.has_optimizer}

    def remove(self) -> None:
        self._patches.close()

    @property
    def _clears(self) -> bool:
        """The same in every process."""
        return any(technique.clears_gradients for technique in self._techniques)

    def _mask_of(self, fragment: Fragment) -> torch.Tensor | None:
        """The packed bits of what of a gradient will be applied; None: all of it."""
        masks = [
            mask
            for technique in self._techniques
            if (mask := technique.gradient_mask(fragment.name)) is not None
        ]
        return functools.reduce(torch.bitwise_and, masks) if masks else None

    def _applied(self, fragment: Fragment, gradient: torch.Tensor) -> torch.Tensor:
        """`gradient` of a fragment, (numel,), as it will be applied; itself where all of it is."""
        mask = self._mask_of(fragment)
        if mask is not None:
            gradient = gradient.clone()
            bitmask.apply_(gradient, mask)
        return gradient

    # -- ZeRO ------------------------------------------------------------------------------------------

    def _norm(self, gradients: Sequence[torch.Tensor], params: Sequence[Any], norm_type: float = 2) -> Any:
        total = self._direct(gradients, params, norm_type)
        if not self._counts(total):
            return total
        own = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        part = self._norm_of_part if norm_type == 2 else self._part
        return self._direct([part(g, p) for g, p in zip(own, params, strict=False)], params, norm_type)

    def _norm_of_part(self, gradient: torch.Tensor, parameter: Any) -> torch.Tensor:
        """(1,), as long as the part that will be applied: DeepSpeed sums up norms, and one number is its own."""
        fragment = self._by_parameter.get(id(parameter))
        mask = None if fragment is None else self._mask_of(fragment)
        if fragment is None or mask is None:
            return gradient
        flat = gradient.view(-1)
        square = bitmask.square_sums(flat[: fragment.numel], mask)[1]
        # What lies behind the end of a parameter is padding of the last slice.
        return (square + flat[fragment.numel :].double().square().sum()).sqrt().view(1)

    def _part(self, gradient: torch.Tensor, parameter: Any) -> torch.Tensor:
        fragment = self._by_parameter.get(id(parameter))
        if fragment is None:
            return gradient
        # What lies behind the end of a parameter is padding of the last slice.
        flat = gradient.view(-1)
        applied = self._applied(fragment, flat[: fragment.numel])
        return torch.cat([applied, flat[fragment.numel :]]) if fragment.numel < flat.numel() else applied

    def _norm_of_offloaded(self, params: Sequence[Any]) -> Any:
        total = self._offloaded(params)
        if not self._counts(total):
            return total
        norms = self._wrapper.norm_for_param_grads
        before = dict(norms)
        for parameter in params:
            fragment, key = self._by_parameter.get(id(parameter)), self._wrapper.get_param_id(parameter)
            gradient = None if fragment is None else fragment.gradient
            if fragment is not None and gradient is not None and key in norms:
                applied = self._applied(fragment, gradient)
                if applied is not gradient:
                    # Masters and their gradients are in host memory, DeepSpeed's norms on the device.
                    norms[key] = applied.float().norm(2).to(norms[key].device)
        try:
            return self._offloaded(params)
        finally:
            norms.update(before)

    def _counts(self, total: Any) -> bool:
        """DeepSpeed marks a norm that is NaN or Inf by a negative one."""
        return (
            self._wrapper.clip_grad > 0 and self._clears and math.isfinite(float(total)) and float(total) > 0
        )

    # -- others ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around a step of an optimizer that is not ZeRO's."""
        ratio = (
            1.0
            if self._is_zero or not self._clears or internals.clip_limit(self._engine) <= 0
            else self._ratio()
        )
        if ratio == 1.0:
            yield
            return
        with internals.clip_limit_times(self._engine, ratio):
            yield
        internals.divide_reported_norm(self._engine, ratio)

    def _is_ours_to_count(self, parameter: Any) -> bool:
        """Weights that every process of a tensor-parallel group holds alike are counted by the first one."""
        if self._layers is None or internals.is_tensor_parallel_shard(parameter):
            return True
        return dist.get_rank(self._layers.group) == 0

    def _ratio(self) -> float:
        """The norm of all gradients over that of the applied ones; 1 where there is none."""
        squares: list[torch.Tensor] = []
        for parameter, gradient in internals.full_gradients(self._engine):
            fragment = self._by_parameter.get(id(parameter))
            if fragment is not None and self._is_ours_to_count(parameter):
                dense = gradient.to_dense() if gradient.is_sparse else gradient
                # Of a weight whose shards are in several processes, this one's gradient begins where its shard does.
                start = fragment.start - (self._layers.start_of(fragment.name) if self._layers else 0)
                part = dense.view(-1)[start : start + fragment.numel]
                squares.append(bitmask.square_sums(part, self._mask_of(fragment)))
        # One look at all of them: every single one would wait for the device.
        sums = torch.stack(squares).sum(0) if squares else torch.zeros(2).double()
        total, counted = self._shards.sum(sums).tolist()
        return math.sqrt(total / counted) if counted > 0 and math.isfinite(total) else 1.0
