"""What the routers of a mixture of experts say of each token, before any choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.errors import ConfigError, Problem
from ds_compress.modelinfo.experts import moe_blocks, original_experts


@dataclass(frozen=True, eq=False)
class RouterLogits:
    """logits: (tokens of all rows, experts). left: int64 (experts,), which ones, as the model was made; None: all."""

    logits: torch.Tensor
    left: torch.Tensor | None = None

    @property
    def experts(self) -> torch.Tensor:
        """int64 (experts,), as `left`."""
        return torch.arange(self.logits.shape[-1]) if self.left is None else self.left

    def of_experts(self, student: RouterLogits) -> torch.Tensor:
        """The logits of those experts alone that the student has.

        Raises:
            ConfigError: some of them are not here, or nothing says which of these they are.
        """
        wanted = student.experts
        found = self.experts.unsqueeze(0) == wanted.unsqueeze(1)
        known = student.left is not None or len(wanted) == len(self.experts)
        if not known or not bool(found.any(1).all()):
            raise ConfigError(
                [
                    Problem(
                        "compression_training.distillation.losses.router",
                        f"a student with {len(wanted)} experts where the teacher has {len(self.experts)}",
                        "the experts of the teacher, or fewer after expert_pruning in this run",
                        "use logits or hidden, which need no correspondence between experts",
                    )
                ]
            )
        index = found.int().argmax(1)
        return self.logits.index_select(-1, index.to(self.logits.device))


def routers_of(layer: nn.Module) -> list[nn.Module]:
    """Those inside one layer of a model, with a row for each expert."""
    return [layer.get_submodule(name) for block in moe_blocks(layer) for name in block.full_routers]


def subscribe_logits(router: nn.Module, receive: Callable[[RouterLogits], None]) -> Any:
    """A hook by which `receive` gets the logits of each forward of the router; remove it by its `remove`."""
    place: list[int] = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not place:
            place.append(_place_of_logits(module, _first(args, kwargs), outputs))
        logits = outputs[place[0]]
        flat = logits.reshape(-1, logits.shape[-1])
        receive(RouterLogits(flat, original_experts(module)))

    # In front of the hooks that release gathered weights.
    return router.register_forward_hook(hook, prepend=True, with_kwargs=True)


@torch.no_grad()
def _place_of_logits(router: nn.Module, hidden: torch.Tensor, outputs: tuple[Any, ...]) -> int:
    """Which output is nearest to hidden @ weight.T + bias: some routers return it first, others last.

    Raises:
        ConfigError: none has an entry for each expert.
    """
    # As the router computes it, with the rows of some experts only where others are excluded.
    weight, bias = cast(torch.Tensor, router.weight), getattr(router, "bias", None)
    bias = bias.float() if isinstance(bias, torch.Tensor) else None
    expected = F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), weight.float(), bias)
    errors = {
        place: float((found.float().reshape(expected.shape) - expected).abs().nan_to_num(torch.inf).max())
        for place, found in enumerate(outputs)
        if isinstance(found, torch.Tensor) and found.is_floating_point() and found.numel() == expected.numel()
    }
    if not errors:
        raise ConfigError(
            [
                Problem(
                    "compression_training.distillation.losses.router",
                    f"a {type(router).__name__}, which returns no logits",
                    "routers that return a number for each token and expert",
                    "use logits or hidden instead",
                )
            ]
        )
    return min(errors, key=errors.__getitem__)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return found
