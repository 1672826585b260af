"""`depth_pruning`: whole layers go, by importance, at a step of the schedule.

    "depth_pruning": {"shared_parameters": {"enabled": true, "dense_ratio": 0.67, "schedule_offset": 100}}

Until it is removed, a dropped layer hands its input on: what it computed is thrown away, so that schedules may
change their mind. `activation` keeps the layers that change their input most (1 - cosine, Men et al. 2024,
"ShortGPT"); `l1`, `l2` and `taylor` sum over all weights of a layer. See `techniques.structured_pruning` for the keys,
and `layer_reduction` for dropping layers at the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ds_compress.select.unit_scores import MeanActivation
from ds_compress.structure.prunable_group import CoupledSlice, PrunableGroup
from ds_compress.techniques.structured_pruning import StructuredPruning, first_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ds_compress.sharding.fragment import Fragment


class DepthPruning(StructuredPruning):
    name: ClassVar[str] = "depth_pruning"

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        super().prepare(model, full_parameters)
        self._bypassed: set[nn.Module] = set()
        for structure in self.structures.values():
            for unit, name in enumerate(structure.layers):
                layer = model.get_submodule(name)
                self._handles.append(layer.register_forward_hook(self._bypass, with_kwargs=True))
                for inner, _ in layer.named_parameters():
                    whole = CoupledSlice(
                        f"{name}.{inner}", 0, torch.tensor([[unit]]), scored=True, masked=False
                    )
                    self._places.setdefault(whole.tensor, []).append((structure, whole))
        return {}

    def _unit_sums(
        self, structure: PrunableGroup, member: CoupledSlice, fragment: Fragment, values: torch.Tensor
    ) -> torch.Tensor:
        sums = torch.zeros(structure.units, dtype=torch.float64, device=values.device)
        sums[int(member.index)] = values.sum(dtype=torch.float64)
        return sums

    def _units_changed(self) -> None:
        self._bypassed.clear()
        for name, kept in self.kept.items():
            layers = self.structures[name].layers
            gone = set(range(len(layers))) - set(kept.tolist())
            self._bypassed |= {self._model.get_submodule(layers[index]) for index in gone}

    def _bypass(self, layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if layer not in self._bypassed:
            return None
        handed_on = _HandOn.apply(first_argument(args, kwargs), first_tensor(output))
        return replace_hidden(output, handed_on)

    def _observe(self, model: nn.Module, structure: PrunableGroup) -> Iterator[Any]:
        score = self.score
        assert isinstance(score, MeanActivation)
        for unit, name in enumerate(structure.layers):

            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any, unit: int = unit) -> None:
                if not layer.training or self._done:
                    return
                before, after = first_argument(args, kwargs).detach(), first_tensor(output).detach()
                cosine = F.cosine_similarity(
                    before.flatten(0, -2).float(), after.flatten(0, -2).float(), dim=-1
                )
                influence = torch.zeros(structure.units, dtype=torch.float64, device=after.device)
                influence[unit] = (1 - cosine).double().mean()
                score.observe(structure.name, influence, 1)

            yield model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)


class _HandOn(torch.autograd.Function):
    """The first of two tensors; the second gets a gradient of zeros.

    Without any, ZeRO-3 would go on with the last gradients of a layer that takes no part: in its updates, and in
    the global norm that everything is clipped by.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        ctx.like = output.new_empty(0), output.shape
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like, shape = ctx.like
        return gradient, like.new_zeros(shape)


def first_tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def replace_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A layer's output with `hidden` in the place of its hidden states."""
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden
