"""What the routing of one mixture of experts does: who sees which token, and routing as if some experts were gone.

Experts are excluded by running the routing as the smaller model will: while a module of the block runs, its router
rows, biases and numbers of experts are those of the kept experts alone, and what the experts are called with is
translated back. So whatever a router computes (softmax before or after the choice, sigmoid with a correction bias,
groups, sampling), the result is that of the removed model, and the weights of excluded experts get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.experts import MoeBlock, remember_excluded
from ds_compress.select.units import on_device
from ds_compress.structure.experts import counts_experts, routing_slices


class Narrowing:
    """While `module` runs, it has the routing tensors, counts and list of the kept experts only.

    slices: {own parameter or buffer: dimension with an entry per expert}. experts: how many there are. own_list: name
    of the ModuleList of the experts, if this module has it.
    """

    def __init__(
        self, module: nn.Module, slices: Mapping[str, int], experts: int, own_list: str | None = None
    ) -> None:
        self.module, self.slices, self.own_list = module, dict(slices), own_list
        counts = (key for key, value in vars(module).items() if type(value) is int and value == experts)
        self.counts = tuple(filter(counts_experts, counts))
        self.experts = experts
        self.kept: torch.Tensor | None = None
        self._list: nn.ModuleList | None = None

    @property
    def is_needed(self) -> bool:
        return bool(self.slices or self.counts or self.own_list)

    def keep(self, kept: torch.Tensor | None) -> None:
        """None: all."""
        self.kept = kept
        self._list = None
        if kept is not None and self.own_list is not None:
            experts = getattr(self.module, self.own_list)
            self._list = nn.ModuleList(experts[index] for index in kept.tolist())

    def hooks(self) -> list[Any]:
        # Behind the hooks that gather the module's parameters, and in front of those that release them.
        return [
            self.module.register_forward_pre_hook(self._enter),
            self.module.register_forward_hook(self._leave, prepend=True, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self.kept is None:
            return
        # In the instance's own dictionary they hide parameters, buffers and modules of the same name, which stay.
        shown = vars(module)
        for name, dim in self.slices.items():
            whole = getattr(module, name)
            shown[name] = whole.index_select(dim, on_device(self.kept, whole.device))
        for name in self.counts:
            shown[name] = self.kept.numel()
        if self._list is not None and self.own_list is not None:
            shown[self.own_list] = self._list

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        shown = vars(module)
        for name in (*self.slices, *([self.own_list] if self.own_list else ())):
            shown.pop(name, None)
        for name in self.counts:
            shown[name] = self.experts


class ExpertRouting:
    """The hooks on one block.

    tokens, norms: fp64 [experts], what this process has seen since `take`: tokens routed to each expert, and the sum
    over them of gate weight times norm of the expert's output; norms only while `measures_norms`.
    """

    def __init__(self, model: nn.Module, block: MoeBlock) -> None:
        self.block = block
        self.kept: torch.Tensor | None = None
        self.measures_norms = False
        self._experts = model.get_submodule(block.experts_name)
        self._is_checked = False
        self._call: tuple[torch.Tensor, torch.Size] | None = None
        self._seen: torch.Tensor | None = None
        self.narrowings = list(self._narrowings())

    def _narrowings(self) -> Iterator[Narrowing]:
        slices: dict[str, dict[str, int]] = {}
        for name, dim in routing_slices(self.block).items():
            owner, _, own = name.rpartition(".")
            slices.setdefault(owner, {})[own] = dim
        local = self.block.experts_name.removeprefix(f"{self.block.name}.")
        for name, module in self.block.module.named_modules():
            if name == local or name.startswith(f"{local}."):
                continue
            own_list = local if name == "" and self.block.fused is None else None
            narrowing = Narrowing(module, slices.get(name, {}), self.block.experts, own_list)
            if narrowing.is_needed:
                yield narrowing

    def hooks(self) -> list[Any]:
        handles = [handle for narrowing in self.narrowings for handle in narrowing.hooks()]
        if self.block.fused is not None:
            handles.append(self._experts.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(self._experts.register_forward_hook(self._after, prepend=True))
        return handles

    def exclude_all_but(self, kept: torch.Tensor | None) -> None:
        """Sorted int64 indices of the experts that tokens may be routed to from now on; None: all."""
        self.kept = None if kept is None or kept.numel() == self.block.experts else kept
        self._is_checked = False
        for router in self.block.full_routers:
            remember_excluded(self.block.submodule(router), self.kept)
        for narrowing in self.narrowings:
            narrowing.keep(self.kept)

    def take(self) -> torch.Tensor | None:
        """fp64 [2, experts], norms and tokens since the last call; None when nothing was observed."""
        seen, self._seen = self._seen, None
        return seen

    # -- around the fused experts ----------------------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
        self._call = None
        call = dict(enumerate(args)) | dict(kwargs)
        index_key = next((k for k, v in call.items() if isinstance(v, torch.Tensor) and is_index(v)), None)
        hidden_key = next(iter(call))
        if index_key is None:
            call[hidden_key] = self._all_rows(call[hidden_key])
        else:
            self._route(call, hidden_key, index_key)
        return tuple(call[i] for i in range(len(args))), {key: call[key] for key in kwargs}

    def _route(self, call: dict[Any, Any], hidden_key: Any, index_key: Any) -> None:
        """Experts that are called with the tokens, the chosen experts [tokens, chosen] and their gate weights."""
        index: torch.Tensor = call[index_key]
        if self.kept is not None:
            self._check(index)
            index = call[index_key] = on_device(self.kept, index.device)[index]
        if not self._experts.training:
            return
        if not self.measures_norms:
            self._count(index.flatten())
            return
        # Each pair of token and expert becomes a token of its own, so that the output shows what each expert adds.
        hidden = call[hidden_key]
        for key, value in call.items():
            if key != hidden_key and isinstance(value, torch.Tensor) and value.shape == index.shape:
                call[key] = value.reshape(-1, 1)
        call[hidden_key] = hidden.reshape(-1, hidden.shape[-1]).repeat_interleave(index.shape[-1], 0)
        self._call = index, hidden.shape

    def _all_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Experts that are called with all tokens each, scaled by the gate weights: [experts * tokens, hidden]."""
        experts, kept = self.block.experts, self.kept
        shown = experts if kept is None else kept.numel()
        by_expert = rows.view(shown, -1, rows.shape[-1])
        if kept is not None:
            full = by_expert.new_zeros((experts, *by_expert.shape[1:]))
            by_expert = full.index_copy(0, on_device(kept, rows.device), by_expert)
        if self._experts.training:
            # Of a token that is not routed to an expert, that expert sees zeros.
            self._add(1, (by_expert.detach() != 0).any(-1).sum(1))
        self._call = torch.empty(0), rows.shape
        return by_expert.reshape(-1, rows.shape[-1])

    def _after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self._call is None:
            return None
        index, shape = self._call
        self._call = None
        if not index.numel():
            return self._kept_rows(output, shape)
        norms = torch.linalg.vector_norm(output.detach(), dim=-1, dtype=torch.float32)
        flat = index.flatten()
        self._count(flat)
        self._add(0, torch.zeros(self.block.experts, device=flat.device).index_add_(0, flat, norms))
        return output.view(-1, index.shape[-1], output.shape[-1]).sum(1).to(output.dtype).view(shape)

    def _kept_rows(self, output: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        by_expert = output.view(self.block.experts, -1, output.shape[-1])
        if self._experts.training and self.measures_norms:
            norms = torch.linalg.vector_norm(by_expert.detach(), dim=-1, dtype=torch.float32)
            self._add(0, norms.sum(1))
        if self.kept is not None:
            by_expert = by_expert.index_select(0, on_device(self.kept, output.device))
        return by_expert.reshape(shape)

    # -- counting --------------------------------------------------------------------------------------

    def _count(self, index: torch.Tensor) -> None:
        ones = torch.ones(index.numel(), device=index.device)
        self._add(1, torch.zeros(self.block.experts, device=index.device).index_add_(0, index, ones))

    def _add(self, row: int, values: torch.Tensor) -> None:
        if self._seen is None or self._seen.device != values.device:
            self._seen = torch.zeros((2, self.block.experts), dtype=torch.float64, device=values.device)
        self._seen[row] += values

    def _check(self, index: torch.Tensor) -> None:
        """Once after each exclusion: a router that goes past the narrowed tensors chooses among all experts."""
        assert self.kept is not None
        if not self._is_checked and index.numel() and int(index.max()) >= self.kept.numel():
            raise ValueError(
                f"expert_pruning: the routing of {self.block.name} chooses experts that are excluded; leave it out by "
                "shared_parameters.excluded_modules"
            )
        self._is_checked = True


def is_index(tensor: torch.Tensor) -> bool:
    """Whether it may say which experts each token goes to: [tokens, chosen]."""
    return tensor.dim() == 2 and not (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    )
