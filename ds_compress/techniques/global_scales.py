"""The one scale of a whole tensor that nvfp4 weights have: measured once a step, and shared by what servers fuse.

Block scales are stored relative to it in E4M3, so it follows the largest magnitude of the tensor. A server that keeps
q, k and v (or gate and up) in one matrix has room for one such scale, so these weights share it. Under ZeRO-3 they are
never whole at the same time: the magnitudes come from the fragments that each process owns, by one small reduction
after each optimizer step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ds_compress.ops.reference.float_formats import E2M1, global_scale_of
from ds_compress.quant.weights import largest_magnitude

if TYPE_CHECKING:
    from ds_compress.config.targets import Target
    from ds_compress.sharding.fragment import Fragment
    from ds_compress.sharding.shards import Shards

FUSED_BY_SERVERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of neighbouring layers of one input that vLLM and others multiply as one matrix."""


class GlobalScales:
    """Of the weights of `targets`, by name of the parameter. follow: whether they change as the weights do.

    A stack of experts has one for each expert.
    """

    def __init__(self, targets: Sequence[Target], follow: bool) -> None:
        self._targets = targets
        self._follow = follow
        self._largest: dict[str, torch.Tensor] = {}
        self._scales: dict[str, torch.Tensor] = {}
        self._shards: Shards | None = None
        self._members = fused_families([target.module_name for target in targets])

    def measure(self, full_parameters: Callable[..., Any]) -> None:
        """From the whole weights; a collective under ZeRO-3."""
        for target in self._targets:
            with full_parameters([target.param]):
                self._largest[target.param_name] = _largest(target)
        self._share()

    def attach(self, shards: Shards) -> None:
        self._shards = shards

    def update(self) -> None:
        """From the master weights as the optimizer left them; a collective where weights train."""
        if not self._follow or self._shards is None:
            return
        trained = [target for target in self._targets if target.param.requires_grad]
        if not trained:
            return
        fragments = self._shards.fragments
        device = trained[0].param.device
        found = [_of_matrices(fragments.get(target.param_name), target).to(device) for target in trained]
        # A maximum would lose a NaN of another process: it travels as Inf, and an Inf makes the scale NaN as well.
        together = torch.cat(found).nan_to_num(nan=torch.inf, posinf=torch.inf)
        reduced = self._shards.reduce_max(together).split([len(own) for own in found])
        for target, largest in zip(trained, reduced, strict=True):
            self._largest[target.param_name] = largest.reshape(self._largest[target.param_name].shape)
        self._share()

    def of(self, parameter: str) -> torch.Tensor:
        """fp32 (1,), of a stack of experts [experts]."""
        return self._scales[parameter]

    def state_dict(self) -> dict[str, Any]:
        if not self._largest:
            return {}
        return {"largest": {name: value.detach().cpu().clone() for name, value in self._largest.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, saved in state.get("largest", {}).items():
            if name in self._largest:
                self._largest[name] = saved.to(self._largest[name].device)
        self._share()

    def keep_experts(self, kept: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """kept: (name of a stack, [experts]) -> those of the experts that stay."""
        for target in self._targets:
            if target.kind.is_experts:
                self._largest[target.param_name] = kept(target.param_name, self._largest[target.param_name])
        self._share()

    def _share(self) -> None:
        by_module = {target.module_name: target.param_name for target in self._targets}
        for members in self._members:
            names = [by_module[module] for module in members]
            device = self._largest[names[0]].device
            together = torch.stack([self._largest[name].to(device) for name in names]).amax(0)
            scale = global_scale_of(together, E2M1).reshape(-1)
            self._scales.update(dict.fromkeys(names, scale))


def fused_families(modules: Sequence[str]) -> list[list[str]]:
    """Lists of modules that share one scale; every module is in one of them."""
    families: dict[tuple[str, int], list[str]] = {}
    alone = []
    for module in modules:
        parent, _, name = module.rpartition(".")
        family = next((n for n, names in enumerate(FUSED_BY_SERVERS) if name in names), None)
        if family is None:
            alone.append([module])
        else:
            families.setdefault((parent, family), []).append(module)
    return [*families.values(), *alone]


def _largest(target: Target) -> torch.Tensor:
    """fp32 (), of a stack of experts [experts]: the largest magnitude of the whole weight."""
    values = target.param.detach()
    if not values.numel():
        return torch.zeros((), device=values.device)
    return largest_magnitude(values, stacked=target.kind.is_experts).float()


def _of_matrices(fragment: Fragment | None, target: Target) -> torch.Tensor:
    """fp32 [matrices]: the largest magnitude of each, of what this process owns of it; 0 where that is nothing."""
    largest = torch.zeros(target.matrices, device=target.param.device)
    if fragment is None or not fragment.numel:
        return largest
    size = math.prod(target.shape) // target.matrices
    first, end = fragment.start, fragment.start + fragment.numel
    # A fragment may begin and end within a matrix; those between are whole.
    cuts = sorted(
        {first, *(cut for cut in (-(-first // size) * size, end // size * size) if first < cut < end), end}
    )
    for begin, stop in itertools.pairwise(cuts):
        part = fragment.values[begin - first : stop - first]
        rows = part.view(-1, size) if part.numel() > size else part.view(1, -1)
        found = largest_magnitude(rows, stacked=True).to(target.param.dtype).float()
        number = begin // size
        own = largest[number : number + len(rows)]
        own.copy_(torch.maximum(own, found.to(own.device)))
    return largest
