"""Which modules can be compressed: the kind decides how the weight is laid out, not the class alone."""

from __future__ import annotations

import sys
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.modelinfo.linear_activation import builtin_linear, computes_linear_activation

_OF_LINEAR = {"weight", "bias"}
STEP_SIZE_SUFFIX = "_step_size"
"""Behind the name of a weight: its given scales, a parameter that quantization adds."""


class ModuleKind(StrEnum):
    """How a module uses its `weight`."""

    LINEAR = "Linear"
    """[outputs, inputs]"""
    CONV1D = "Conv1D"
    """[inputs, outputs]: GPT-2's transposed Linear, from transformers."""
    CONV2D = "Conv2d"
    """[outputs, inputs / groups, height, width]"""
    EMBEDDING = "Embedding"
    """[entries, columns]"""
    LINEAR_ACTIVATION = "Linear with its activation"
    """[outputs, inputs]; no nn.Linear: see `linear_activation`"""
    EXPERTS = "fused experts"
    """[experts, outputs, inputs], one of the parameters of a module: see `experts`"""
    TRANSPOSED_EXPERTS = "transposed fused experts"
    """[experts, inputs, outputs]"""
    ROUTER = "router of experts"
    """[experts, inputs]; no nn.Linear"""

    @property
    def is_experts(self) -> bool:
        return self in (ModuleKind.EXPERTS, ModuleKind.TRANSPOSED_EXPERTS)

    @property
    def is_transposed(self) -> bool:
        """Whether the outputs are the last axis."""
        return self in (ModuleKind.CONV1D, ModuleKind.TRANSPOSED_EXPERTS)


MIXTURES = frozenset({ModuleKind.EXPERTS, ModuleKind.TRANSPOSED_EXPERTS, ModuleKind.ROUTER})
"""What a mixture of experts has beside Linear layers."""


def kind_of(module: nn.Module) -> ModuleKind | None:
    """The kind of a module whose forward is exactly that of its kind; None for everything else.

    A subclass of nn.Linear with a forward of its own is asked what it computes (Falcon's does what Linear does).
    A subclass that computes something else, a forward replaced on the instance, or a weight that is not a
    plain parameter (parametrized, weight-normed, lazy) is None: a swapped class would compute something else.
    A module whose class this package swapped has the kind of the class that it had before.
    """
    cls = getattr(type(module), "_ds_compress_base_class", type(module))
    if "forward" in vars(module) or not _has_plain_weight(module):
        return None
    for kind, base in _bases().items():
        if issubclass(cls, base) and (_computes_like(cls, base) or computes_linear(module)):
            return kind
    if not isinstance(module, tuple(_bases().values())) and computes_linear_activation(module):
        return ModuleKind.LINEAR_ACTIVATION
    return None


@torch.no_grad()
def computes_linear(module: nn.Module) -> bool:
    """Whether a module of a subclass of nn.Linear computes x @ weight.T + bias, tried on a small twin of it.

    The twin has the module's own attributes, so that a factor among them shows.
    """
    cls: type[nn.Module] = getattr(type(module), "_ds_compress_base_class", type(module))
    if not issubclass(cls, nn.Linear) or issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if set(module._parameters) - _OF_LINEAR - {"weight_step_size"} or module._buffers or module._modules:
        return False
    twin = cls.__new__(cls)
    nn.Module.__init__(twin)
    known = vars(twin).keys()
    twin.__dict__.update({key: value for key, value in vars(module).items() if key not in known})
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 5), (3,), (2, 4, 5)
    weight, bias, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    has_bias = module._parameters.get("bias") is not None
    twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    twin._parameters["bias"] = nn.Parameter(bias, requires_grad=False) if has_bias else None
    try:
        with builtin_linear():
            found = cls.forward(twin.eval(), x)
    except Exception:  # a forward that needs other sizes, or more arguments
        return False
    expected = F.linear(x, weight, bias if has_bias else None)
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return bool(torch.allclose(found, expected, rtol=1e-12))


def is_layer(module: nn.Module) -> bool:
    """Whether the module says of itself that it is a Linear, Conv1D or Conv2d, supported or not."""
    return isinstance(
        module, tuple(base for kind, base in _bases().items() if kind is not ModuleKind.EMBEDDING)
    )


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Full shape, also of a parameter of which this process holds a part only."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _bases() -> dict[ModuleKind, type[nn.Module]]:
    bases: dict[ModuleKind, type[nn.Module]] = {
        ModuleKind.LINEAR: nn.Linear,
        ModuleKind.CONV2D: nn.Conv2d,
        ModuleKind.EMBEDDING: nn.Embedding,
    }
    # No model holds a Conv1D unless transformers is loaded: no need to load it for the question.
    transformers_layers = sys.modules.get("transformers.pytorch_utils")
    if transformers_layers is not None:
        bases[ModuleKind.CONV1D] = transformers_layers.Conv1D
    return bases


def _has_plain_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(weight, nn.Parameter) and not isinstance(weight, nn.parameter.UninitializedParameter)


def _computes_like(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    if issubclass(cls, nn.modules.linear.NonDynamicallyQuantizableLinear):
        # nn.MultiheadAttention reads this weight without ever calling the module.
        return False
    methods = ("forward", "_conv_forward") if base is nn.Conv2d else ("forward",)
    return all(getattr(cls, method) is getattr(base, method) for method in methods)
