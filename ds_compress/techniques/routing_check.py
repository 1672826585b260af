"""Whether experts of a block can be excluded from its routing: tried on random tokens, before any training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from ds_compress.modelinfo.evaluating import evaluating
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.techniques.expert_routing import ExpertRouting, is_index

_TOKENS = 64


class _Reached(Exception):
    """The experts were called; all that is of interest has happened."""


@torch.no_grad()
def check_exclusion(
    routing: ExpertRouting,
    left: int,
    parts: int,
    full_parameters: Callable[..., Any] = contextlib.nullcontext,
) -> None:
    """Runs the block's routing with `left` of its experts, of each of `parts` groups as many.

    Raises:
        ValueError: it fails, or chooses one that is excluded.
    """
    block, module = routing.block, routing.block.module
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    experts = module.get_submodule(block.experts_name.removeprefix(f"{block.name}."))
    of_experts = {id(p) for p in experts.parameters()} if block.fused is not None else set()
    # The last ones stay: a router that goes on choosing among all would name others, too.
    run = torch.arange(block.experts).view(parts, -1)
    kept = run[:, run.shape[1] - left // parts :].flatten()
    weight = module.get_submodule(block.routers[0].removeprefix(f"{block.name}.")).get_parameter("weight")
    handles = [handle for narrowing in routing.narrowings for handle in narrowing.hooks()]
    if block.fused is not None:
        handles.append(
            experts.register_forward_pre_hook(
                lambda _, args, kwargs: _look(args, kwargs, left), with_kwargs=True
            )
        )
    routing.exclude_all_but(kept)
    try:
        with (
            full_parameters([p for p in module.parameters() if id(p) not in of_experts]),
            evaluating(module),
        ):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn((1, _TOKENS, shape_of(weight)[1]), generator=generator)
            module(x.to(weight.device, weight.dtype))
    except _Reached:
        pass
    except Exception as error:  # whatever a model's own code finds wrong with fewer experts
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the routing of {block.name} does not run with {left} of its {block.experts} experts ({what}); leave it "
            "out by shared_parameters.excluded_modules"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        routing.exclude_all_but(None)


def _look(args: tuple[Any, ...], kwargs: dict[str, Any], left: int) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    chosen = [tensor for tensor in tensors if is_index(tensor)]
    if any(int(tensor.max()) >= left for tensor in chosen):
        raise ValueError("it chooses experts that are excluded")
    if not chosen and (len(tensors) != 1 or tensors[0].shape[:-1].numel() != left * _TOKENS):
        raise ValueError("what its experts are called with is not known here")
    raise _Reached
