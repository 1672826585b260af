"""A fragment: what one process owns of the fp32 master of one parameter. Weights are changed through it only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ds_compress.ops import bitmask


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [start, start + numel) of one flattened parameter, as owned by this process.

    `master` is the tensor that the optimizer updates; the fragment lies at `offset` in its flat view.
    `group` is the process group over which the parameter is sharded; None when every process
    holds the whole parameter.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    numel: int
    master: torch.Tensor
    offset: int
    group: dist.ProcessGroup | None
    has_optimizer: bool = True
    """False: no optimizer ever writes to `master`, which is (a part of) the weight in the model's own dtype."""

    @property
    def values(self) -> torch.Tensor:
        """Flat view of the master weights, shape (numel,): writing to it changes the weights."""
        return self.master.data.view(-1).narrow(0, self.offset, self.numel)

    @property
    def gradient(self) -> torch.Tensor | None:
        """Flat view of the gradient that the optimizer is about to use, shape (numel,), or None.

        Of a sparse gradient a dense copy: see `mask_gradient` for changes.
        """
        gradient = self.master.grad
        if gradient is None:
            return None
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        return gradient.view(-1).narrow(0, self.offset, self.numel)

    def mask_gradient(self, mask: torch.Tensor) -> None:
        """Clears the elements of the gradient that the packed `mask` does not keep."""
        gradient, flat = self.master.grad, self.gradient
        if gradient is None or flat is None:
            return
        bitmask.apply_(flat, mask)
        if gradient.is_sparse:
            # Of nn.Embedding(sparse=True), at stage 0: the fragment is the whole table.
            rows = gradient.coalesce().indices()
            values = flat.view(gradient.shape)[rows[0]]
            self.master.grad = torch.sparse_coo_tensor(rows, values, gradient.shape, is_coalesced=True)


def plain_fragments(model: nn.Module) -> Iterator[Fragment]:
    """The parameters of a model without an engine: each that trains is its own master, full in every process."""
    for name, parameter in model.named_parameters():
        if parameter.numel():
            yield full_fragment(name, parameter, parameter, 0, has_optimizer=parameter.requires_grad)


def full_fragment(
    name: str, parameter: nn.Parameter, master: torch.Tensor, offset: int, has_optimizer: bool = True
) -> Fragment:
    """All elements of a parameter, which every process holds; they begin at `offset` in the flat view of `master`."""
    shape, numel = tuple(parameter.shape), parameter.numel()
    return Fragment(name, parameter, shape, 0, numel, master, offset, None, has_optimizer)
