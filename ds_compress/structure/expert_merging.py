"""Merging experts that go into those that stay (M-SMoE, Li et al. 2023, arXiv 2310.01334).

An expert that goes joins the kept one whose row of the router is most similar; the weights of such a cluster are
averaged by the tokens that each member has seen. Neurons are averaged by their place: experts that were copied from
one feed-forward block, as upcycled ones are, have theirs in the same order.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.prunable_group import PrunableGroup


def clusters(router: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """int64 [experts]: for each expert the kept one that it becomes part of; kept ones stay themselves.

    router: [experts, hidden]; rows are compared by their cosine. kept: sorted int64 indices.
    """
    rows = F.normalize(router.detach().double(), dim=-1)
    # Rounded, so that the last digits, which depend on the device, decide nothing.
    similar = (rows @ rows[kept].T).mul(1e6).round()
    heads = kept[similar.argmax(dim=-1)]
    heads[kept] = kept
    return heads


def merge_weights(heads: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """fp64 [experts]: the share of each expert in its cluster, by `tokens` [experts]; these add up to 1 per cluster.

    A cluster that saw no token at all is that of its head alone.
    """
    tokens = tokens.double()
    of_cluster = torch.zeros_like(tokens).index_add_(0, heads, tokens)[heads]
    alone = (heads == torch.arange(heads.numel())).double()
    return torch.where(of_cluster > 0, tokens / of_cluster.clamp_min(1), alone)


def merged(experts: torch.Tensor, heads: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """fp32 [experts, ...]: the head of each cluster is the weighted average of its members, the others are as before.

    experts: [experts, ...]. heads, shares: of `clusters` and `merge_weights`.
    """
    result = experts.float().clone()
    for head in heads.unique().tolist():
        members = (heads == head).nonzero().flatten()
        if members.numel() > 1:
            parts = experts[members].double() * shares[members].view(-1, *[1] * (experts.dim() - 1))
            result[head] = parts.sum(0).float()
    return result


def router_of(model: nn.Module, group: PrunableGroup) -> str:
    """Name of the parameter [experts, hidden] that routes tokens to the experts of `group`."""
    parameters = dict(model.named_parameters())
    names = (s.tensor for s in group.slices if not s.scored and s.dim == 0 and s.tensor in parameters)
    return next(name for name in names if len(shape_of(parameters[name])) == 2)


def tensors_of_experts(model: nn.Module, group: PrunableGroup) -> list[list[str]]:
    """Names of the parameters that hold the weights of experts: one [experts, ...], or one for each expert."""
    if not group.layers:
        parameters = {name for name, _ in model.named_parameters()}
        return [[s.tensor] for s in group.slices if s.scored and s.tensor in parameters]
    inner = (name for name, _ in model.get_submodule(group.layers[0]).named_parameters())
    return [[f"{expert}.{name}" for expert in group.layers] for name in inner]


@torch.no_grad()
def merge_experts(model: nn.Module, group: PrunableGroup, kept: torch.Tensor) -> None:
    """Merges the experts of `group` that are not `kept` (sorted int64) in place, all members of a cluster alike.

    Experts of zeros have been merged before, when training masked them, and do not count.
    """
    parameters = dict(model.named_parameters())
    tensors = tensors_of_experts(model, group)
    heads = clusters(parameters[router_of(model, group)].cpu(), kept)
    used = torch.stack([_is_used([parameters[name] for name in names]) for names in tensors]).any(0)
    shares = merge_weights(heads, used)
    for names in tensors:
        if len(names) == 1:
            whole = parameters[names[0]]
            whole.copy_(merged(whole.cpu(), heads, shares))
            continue
        after = merged(torch.stack([parameters[name].cpu() for name in names]), heads, shares)
        for name, own in zip(names, after, strict=True):
            parameters[name].copy_(own)


def _is_used(tensors: list[nn.Parameter]) -> torch.Tensor:
    """bool [experts]: whether an expert has a weight that is not zero. One stack, or a tensor of each expert."""
    rows = tensors[0] if len(tensors) == 1 else tensors
    return torch.tensor([bool(row.any()) for row in rows])
