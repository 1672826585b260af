"""The inputs of experts, quantized where they are multiplied: between the gate and `down_proj` nothing else is called.

While the forward of the experts runs, each product with one of their stacks is seen (`TorchFunctionMode`), whoever
makes it: `F.linear` and `@` in a loop over experts, `torch.bmm` of matrices that were looked up, `torch._grouped_mm`.
Which expert a row belongs to shows in the place of the matrix in its stack, in the indices that it was looked up with,
or in the offsets of the groups.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ds_compress.quant.quantizers import ExpertsInputQuantizer

_PRODUCTS = frozenset(["linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm"])
_GROUPED = frozenset(["grouped_mm", "_grouped_mm", "grouped_mm_fallback", "transformers.grouped_mm_fallback"])
_LOOK_UPS = frozenset(["__getitem__", "index_select"])
_COPIES = frozenset(["to", "contiguous", "clone", "float", "bfloat16", "half", "type", "type_as"])


@dataclass(frozen=True, eq=False)
class _Matrices:
    """Memory that holds matrices of experts. ids: whose they are, where they were looked up; None: the whole stack."""

    name: str
    experts: int
    numel: int
    itemsize: int
    begin: int
    owner: weakref.ref[torch.Tensor]
    ids: torch.Tensor | None = None

    def holds(self, tensor: torch.Tensor) -> bool:
        place = tensor.data_ptr()
        return self.begin <= place < self.begin + self.numel * self.itemsize and self.owner() is not None


class ExpertProducts(TorchFunctionMode):
    """Quantizes the inputs of the products with `stacks` inside; `rows` counts those of each stack.

    Args:
        stacks: {name: [experts, ..., ...]}, what the forward multiplies by.
        quantizers: of those inputs that are quantized, by the same names.
        training: whether ranges are observed.
    """

    def __init__(
        self,
        stacks: Mapping[str, torch.Tensor],
        quantizers: Mapping[str, ExpertsInputQuantizer],
        training: bool,
    ) -> None:
        super().__init__()
        self._quantizers, self._training = quantizers, training
        self._known = [_matrices(name, stack) for name, stack in stacks.items()]
        self.rows = dict.fromkeys(stacks, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS or name in _GROUPED:
            args = self._quantized(name, args, kwargs)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if (name in _LOOK_UPS or name in _COPIES) and isinstance(result, torch.Tensor):
            self._follow(name, result, args, kwargs)
        return result

    def _find(self, value: Any) -> _Matrices | None:
        if not isinstance(value, torch.Tensor) or not value.numel():
            return None
        return next((known for known in self._known if known.holds(value)), None)

    def _follow(self, name: str, result: torch.Tensor, args: Any, kwargs: Any) -> None:
        """A copy of matrices is what they were."""
        source = self._find(args[0]) if args else None
        if source is None or self._find(result) is not None:
            return
        ids = source.ids
        if name in _LOOK_UPS:
            index = kwargs.get("index", args[-1])
            if ids is not None or not isinstance(index, torch.Tensor) or index.dim() > 1:
                return  # what it is shows in no place: its product will be missed, and said so
            ids = index.reshape(-1)
        elif result.numel() != source.numel:
            return
        per_matrix = source.numel // source.experts
        experts = result.numel() // per_matrix
        self._known.append(
            _Matrices(
                source.name,
                experts,
                result.numel(),
                result.element_size(),
                result.data_ptr(),
                weakref.ref(result),
                ids,
            )
        )

    def _quantized(self, name: str, args: Any, kwargs: Any) -> Any:
        """The arguments of a product, with the input of a stack quantized."""
        given = list(args)
        if len(given) < 2:
            return args
        for weight, other in ((1, 0), (0, 1)):
            matrices = self._find(given[weight])
            if matrices is None or not isinstance(given[other], torch.Tensor):
                continue
            # On the right of a matrix a row is a column.
            is_column = weight == 0
            x = given[other].transpose(-1, -2) if is_column and given[other].dim() > 1 else given[other]
            offsets = kwargs.get("offs", given[2] if len(given) > 2 and name in _GROUPED else None)
            expert = _experts_of(matrices, given[weight], x, offsets)
            if expert is None:
                return args
            self.rows[matrices.name] += x.numel() // max(1, x.shape[-1])
            quantizer = self._quantizers.get(matrices.name)
            if quantizer is not None:
                x = quantizer.quantize(x, expert, self._training)
            given[other] = x.transpose(-1, -2) if is_column and given[other].dim() > 1 else x
            return tuple(given)
        return args


def _matrices(name: str, stack: torch.Tensor) -> _Matrices:
    return _Matrices(
        name, stack.shape[0], stack.numel(), stack.element_size(), stack.data_ptr(), weakref.ref(stack)
    )


def _experts_of(
    matrices: _Matrices, weight: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor | None
) -> int | torch.Tensor | None:
    """Whose rows x has: one expert's, or int64 that broadcasts to x.shape[:-1]; None where that does not show."""
    per_matrix = matrices.numel // matrices.experts
    if offsets is not None:
        rows = torch.arange(x.shape[0], device=x.device)
        return torch.searchsorted(offsets.to(torch.int64), rows, right=True)
    if weight.dim() == 2:
        number = (weight.data_ptr() - matrices.begin) // matrices.itemsize // per_matrix
        if matrices.ids is not None:
            number = int(matrices.ids[number])
        return number
    if weight.dim() != 3 or weight.shape[0] != matrices.experts or x.dim() != 3:
        return None
    ids = matrices.ids
    if ids is None:
        ids = torch.arange(matrices.experts, device=x.device)
    return ids.view(-1, 1)
