"""From the module of an engine to a plain, cut module: whole parameters, no ZeRO hooks or attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ds_compress.engine.zero import internals
from ds_compress.engine.zero.parameters import full_parameters
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.pruning_plan import PruningPlan


@torch.no_grad()
def cut_in_place(
    engine: Any,
    pruning_plan: PruningPlan,
    device: torch.device | None = None,
    before_cut: Callable[[nn.Module], None] | None = None,
) -> dict[int, nn.Parameter | None]:
    """Cuts `engine.module` as `pruning_plan` says and takes the engine down; a collective.

    One module's parameters are whole at a time; what remains is the smaller model, whole in every process, with new
    Parameter objects. `before_cut` sees the whole structure with empty parameters. Returns {id of an old parameter:
    the new one, None if its layer went}.
    """
    model: nn.Module = engine.module
    old = dict(model.named_parameters())
    pruning_plan.know_scales(model)
    values: dict[int, torch.Tensor] = {}
    names = {id(parameter): name for name, parameter in old.items()}
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) not in values]
        with full_parameters(own):
            for parameter in own:
                if pruning_plan.renamed(names[id(parameter)]) is not None:
                    whole = pruning_plan.prune_tensor(names[id(parameter)], parameter.detach())
                    values[id(parameter)] = whole.to(device or parameter.device, copy=True).contiguous()
                else:
                    values[id(parameter)] = parameter.new_empty(0)
    internals.take_down(engine)
    shells = {key: _shell(parameter) for key, parameter in zip(names, old.values(), strict=True)}
    _replace(model, shells)
    if before_cut is not None:
        before_cut(model)
    apply_pruning(model, pruning_plan, meta=True)
    final = dict(model.named_parameters())
    made: dict[int, nn.Parameter | None] = dict.fromkeys(names)
    by_shell: dict[int, nn.Parameter] = {}
    for key, name in names.items():
        renamed = pruning_plan.renamed(name)
        if renamed is None:
            continue
        shell = final[renamed]
        by_shell[id(shell)] = nn.Parameter(values.pop(key), requires_grad=shell.requires_grad)
        made[key] = by_shell[id(shell)]
    _replace(model, by_shell)
    return made


def _shell(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same full shape without memory."""
    empty = torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _replace(model: nn.Module, by_id: dict[int, nn.Parameter]) -> None:
    for module in model.modules():
        # ZeRO-3 leaves a dictionary behind that gathers what is asked for.
        module._parameters = {
            name: parameter if parameter is None else by_id.get(id(parameter), parameter)
            for name, parameter in module._parameters.items()
        }
