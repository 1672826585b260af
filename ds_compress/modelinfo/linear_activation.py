"""Modules that are a Linear and its activation in one, as much BERT code has them: weight, bias, `act(F.linear(...))`.

They are no subclasses of nn.Linear, so what they compute is asked of a small twin: a module with the same class and
attributes, and a weight of (3, 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

LINEAR: Any = torch._C._nn.linear
"""What F.linear is, unless somebody has replaced it, as DeepSpeed does once there is a ZeRO-3 engine."""
_PARAMETERS = {"weight", "bias", "weight_step_size"}
_OUTPUTS, _INPUTS = 3, 5


@torch.no_grad()
def computes_linear_activation(module: nn.Module) -> bool:
    """Whether forward takes x, multiplies it by its weight in one F.linear, and goes on element by element.

    An output whose weights and bias are zero must be zero, so that masking it is removing it; and an output may depend
    on its own row of the weight only.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or len(getattr(weight, "ds_shape", weight.shape)) != 2:
        return False
    if (
        set(module._parameters) - _PARAMETERS
        or module._buffers
        or next(_inner_parameters(module), None) is not None
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 4, _INPUTS), generator=generator)
    matrix, vector = (
        torch.randn((_OUTPUTS, _INPUTS), generator=generator),
        torch.randn(_OUTPUTS, generator=generator),
    )
    changed = matrix.clone()
    changed[1] += 1
    try:
        first, others = (_output(module, x, w, vector, bias is not None) for w in (matrix, changed))
        nothing = _output(module, x, torch.zeros_like(matrix), torch.zeros_like(vector), bias is not None)
    except Exception:  # a forward that needs other sizes, or more arguments
        return False
    if first is None or others is None or nothing is None:
        return False
    untouched = [0, 2]
    return not bool(nothing.any()) and torch.equal(first[..., untouched], others[..., untouched])


@contextlib.contextmanager
def builtin_linear() -> Iterator[None]:
    """F.linear is torch's own, which a TorchFunctionMode sees."""
    before, F.linear = F.linear, LINEAR
    try:
        yield
    finally:
        F.linear = before


def _inner_parameters(module: nn.Module) -> Any:
    return (parameter for child in module.children() for parameter in child.parameters())


def _output(
    module: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_bias: bool
) -> torch.Tensor | None:
    """What a twin with these parameters gives; None when it multiplies otherwise than once, or gives another shape."""
    cls: type[nn.Module] = getattr(type(module), "_ds_compress_base_class", type(module))
    twin = cls.__new__(cls)
    nn.Module.__init__(twin)
    known = vars(twin).keys()
    twin.__dict__.update({key: value for key, value in vars(module).items() if key not in known})
    twin._modules = dict(module._modules)
    twin._parameters["weight"] = own = nn.Parameter(weight, requires_grad=False)
    twin._parameters["bias"] = nn.Parameter(bias, requires_grad=False) if has_bias else None
    twin.training = False
    with builtin_linear(), _Products(x, own) as products:
        found = cls.forward(twin, x)
    if products.own != 1 or products.other or not isinstance(found, torch.Tensor):
        return None
    return found if found.shape == (*x.shape[:-1], len(weight)) else None


class _Products(TorchFunctionMode):
    """Counts the calls of F.linear with `x` and `weight`, and all other calls that get `weight`."""

    def __init__(self, x: torch.Tensor, weight: nn.Parameter) -> None:
        super().__init__()
        self._x, self._weight = x, weight
        self.own = self.other = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if any(value is self._weight for value in given):
            is_own = func is LINEAR and given[0] is self._x and given[1] is self._weight
            self.own, self.other = self.own + is_own, self.other + (not is_own)
        return func(*args, **(kwargs or {}))
