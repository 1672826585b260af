"""Layers that quantize in forward, made from existing modules by changing their class.

`attach` sets `module.__class__` and nothing else: parameters, buffers, hooks, `training`, `requires_grad`, ties and
state-dict keys stay, also on a module whose weight is sharded and empty at the moment. The quantizers are plain
attributes (see `quantizers`); only a learned step size is a new parameter, `weight_step_size`. With both quantizers
off, forward is exactly the base class's. Fused experts, see `experts`, have quantizers and step sizes for each of their
matrices.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ds_compress.modelinfo.experts import fused_experts
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.modelinfo.linear_activation import LINEAR, builtin_linear
from ds_compress.quant.embedding import fake_quantized_embedding
from ds_compress.quant.experts import check_experts, experts_class_for
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight
from ds_compress.quant.fake_quantized_linear import fake_quantized_linear
from ds_compress.quant.linear_ops import Conv1dOp, Conv2dOp, DenseOp, LinearOp
from ds_compress.quant.packed_linear import packed_linear
from ds_compress.quant.packed_weight import packed_weight_of
from ds_compress.quant.qat_module import (
    MATRICES,
    STEP_SIZE,
    WEIGHT,
    QATModule,
    is_step_size,
    step_size_name,
    weight_of_step_size,
)
from ds_compress.quant.quantizers import ExpertsInputQuantizer, InputQuantizer, WeightQuantizer

__all__ = [
    "STEP_SIZE",
    "WEIGHT",
    "ExpertsInputQuantizer",
    "InputQuantizer",
    "QATModule",
    "WeightQuantizer",
    "attach",
    "check",
    "detach",
    "fake_quant_of",
    "input_quantizers_of",
    "is_step_size",
    "qat_class",
    "quantized_parameters",
    "quantized_weight",
    "step_size_name",
    "take_quantizers",
    "weight_of_step_size",
]


class _QATLayer(QATModule):
    """A module with one weight."""

    def _rebuilder(self) -> tuple[Any, tuple[Any, ...]]:
        return _rebuild, (self._ds_compress_base_class,)


class _QATMatmul(_QATLayer):
    """A layer that multiplies its input by its weight.

    `forward` of each has the argument names of the class that it replaces, for calls by keyword.
    """

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        fake_quant, grid, fixed_range = self._fake_quant(), None, None
        if self.input_quantizer is not None:
            grid, fixed_range = self.input_quantizer.active(x, self.training)
        if packed_weight_of(self) is not None:
            bias = cast("torch.Tensor | None", self.bias)
            return packed_linear(self._padded(x), self, bias, self._linear_op(), grid, fixed_range)
        if fake_quant is None and grid is None:
            return self._ds_compress_base_class.forward(self, x)
        weight, bias = cast(torch.Tensor, self.weight), cast("torch.Tensor | None", self.bias)
        step_size = self._step_size(fake_quant)
        return fake_quantized_linear(
            self._padded(x), weight, bias, self._linear_op(), fake_quant, grid, step_size, fixed_range
        )

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _linear_op(self) -> LinearOp:
        raise NotImplementedError


class _QATLinear(_QATMatmul):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    def _linear_op(self) -> LinearOp:
        return DenseOp()


class _QATLinearActivation(_QATMatmul):
    """A module whose forward does more than its linear op: only that op is replaced."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._fake_quant() is None and self.input_quantizer is None:
            result: torch.Tensor = self._ds_compress_base_class.forward(self, *args, **kwargs)
            return result
        with builtin_linear(), _FakeQuantizedMatmul(self) as matmul:
            result = self._ds_compress_base_class.forward(self, *args, **kwargs)
        if matmul.calls != 1:
            raise RuntimeError(
                f"{self._ds_compress_base_class.__name__} multiplied {matmul.calls} times by its weight where it "
                "was seen to do so once: its quantizers were not active; exclude the module"
            )
        return result

    def _linear_op(self) -> LinearOp:
        return DenseOp()


class _FakeQuantizedMatmul(TorchFunctionMode):
    """F.linear by the weight of one module becomes the linear op on fake-quantized input and weight."""

    def __init__(self, layer: _QATLinearActivation) -> None:
        super().__init__()
        self._layer, self.calls = layer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if func is not LINEAR or not isinstance(weight, nn.Parameter) or weight is not self._layer.weight:
            return func(*args, **kwargs)
        self.calls += 1
        layer, fake_quant = self._layer, self._layer._fake_quant()
        x, bias = (
            kwargs.get("input", args[0] if args else None),
            kwargs.get("bias", args[2] if len(args) > 2 else None),
        )
        grid, fixed_range = None, None
        if layer.input_quantizer is not None:
            grid, fixed_range = layer.input_quantizer.active(x, layer.training)
        if fake_quant is None and grid is None:
            return func(*args, **kwargs)
        step_size = layer._step_size(fake_quant)
        return fake_quantized_linear(
            x, weight, bias, layer._linear_op(), fake_quant, grid, step_size, fixed_range
        )


class _QATConv1D(_QATMatmul):
    __repr__ = nn.Module.__repr__  # Conv1D's own shows nothing else than its sizes

    def _sizes(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._compute(x)

    def _linear_op(self) -> LinearOp:
        return Conv1dOp()


class _QATConv2d(_QATMatmul):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        conv = cast(nn.Conv2d, self)
        if conv.padding_mode == "zeros":
            return x
        # These modes repeat values of the image, so that padding before quantizing changes no range.
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)

    def _linear_op(self) -> LinearOp:
        return _conv2d_op(cast(nn.Conv2d, self))


class _QATEmbedding(_QATLayer):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        table, fake_quant = cast(nn.Embedding, self), self._fake_quant()
        if fake_quant is None:
            return self._ds_compress_base_class.forward(self, input)
        return fake_quantized_embedding(
            input,
            table.weight,
            fake_quant,
            self._step_size(fake_quant),
            table.padding_idx,
            table.scale_grad_by_freq,
        )


class QATLinear(_QATLinear, nn.Linear):
    """nn.Linear with fake-quantized weight and input."""

    _ds_compress_base_class = nn.Linear


class QATConv2d(_QATConv2d, nn.Conv2d):
    """nn.Conv2d with fake-quantized weight and input."""

    _ds_compress_base_class = nn.Conv2d


class QATEmbedding(_QATEmbedding, nn.Embedding):
    """nn.Embedding with a fake-quantized table."""

    _ds_compress_base_class = nn.Embedding


_classes: dict[type[nn.Module], type[QATModule]] = {
    nn.Linear: QATLinear,
    nn.Conv2d: QATConv2d,
    nn.Embedding: QATEmbedding,
}


def fake_quant_of(module: nn.Module, parameter: str = WEIGHT) -> FakeQuantConfig | None:
    """How this weight of `module` is quantized now; None when it is not."""
    return quantized_parameters(module).get(parameter)


def quantized_parameters(module: nn.Module) -> dict[str, FakeQuantConfig]:
    """{local name: how it is quantized}, of the weights of `module` that are quantized now."""
    if not isinstance(module, QATModule):
        return {}
    return {name: q.fake_quant for name, q in module.weight_quantizers() if q.fake_quant is not None}


def input_quantizers_of(module: nn.Module) -> dict[str, InputQuantizer]:
    """{local name of a weight: what quantizes its input}; empty for a module that has none."""
    return dict(module.input_quantizers()) if isinstance(module, QATModule) else {}


def take_quantizers(module: nn.Module) -> None:
    """The module has its own class again."""
    if isinstance(module, QATModule):
        for name in dict(module.weight_quantizers()):
            module.set_weight_quantizer(name, None)
        for name in dict(module.input_quantizers()):
            module.set_input_quantizer(name, None)
        detach(module)


def quantized_weight(module: nn.Module, parameter: str = WEIGHT) -> torch.Tensor:
    """The weight that forward computes with, in the dtype and shape of the weight, which must be gathered."""
    if (packed := packed_weight_of(module)) is not None:
        return packed.dequantized(module)
    fake_quant, weight = fake_quant_of(module, parameter), module.get_parameter(parameter)
    if fake_quant is None:
        return weight
    step_size = cast(QATModule, module)._step_size(fake_quant, parameter)
    return fake_quantize_weight(weight, fake_quant, step_size).values


def __getattr__(name: str) -> Any:
    if name == "QATConv1D":  # made on demand: transformers need not be installed
        from transformers.pytorch_utils import Conv1D

        return qat_class(Conv1D)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def qat_class(base: type[nn.Module], kind: ModuleKind | None = None) -> type[QATModule]:
    """The quantizing class for modules of class `base`, which may be a subclass that inherits its forward.

    kind: what its own forward was seen to compute, LINEAR or LINEAR_ACTIVATION.
    Raises TypeError for unknown classes, and for those that have a forward of their own.
    """
    if base not in _classes:
        of_kind = {ModuleKind.LINEAR: _QATLinear, ModuleKind.LINEAR_ACTIVATION: _QATLinearActivation}
        mixin = of_kind[kind] if kind in of_kind else _mixin_for(base)
        namespace = {"_ds_compress_base_class": base, "__module__": __name__, "__doc__": mixin.__doc__}
        _classes[base] = cast(Any, type(f"QAT{base.__name__}", (mixin, base), namespace))
    return _classes[base]


def check(module: nn.Module, learned: bool = False) -> None:
    """Raises TypeError or ValueError where `attach` would, or where a `learned` scale is not possible."""
    if fused_experts(module) is not None:
        check_experts(module)
    elif not isinstance(module, QATModule):
        _class_for(module)
    if not isinstance(module, nn.Embedding):
        return
    if module.sparse:
        raise ValueError("an embedding with sparse=True cannot be quantized: build it with sparse=False")
    if module.max_norm is not None:
        raise ValueError("an embedding with max_norm rewrites its weight: build it without max_norm")
    if learned and module.scale_grad_by_freq:
        raise ValueError("learned_scale does not support scale_grad_by_freq: build the embedding without it")


def attach(module: nn.Module) -> QATModule:
    """Changes the class of `module` to its quantizing class, both quantizers unset; no-op when done already.

    Raises TypeError for a class that cannot be quantized, ValueError for an option that cannot.
    """
    if isinstance(module, QATModule):
        return module
    check(module)
    new_class = _class_for(module)
    module.__dict__["weight_quantizer"] = None
    module.__dict__["input_quantizer"] = None
    module.__class__ = new_class
    return cast(QATModule, module)


def detach(module: nn.Module) -> None:
    """Restores the class of the module, once neither quantizer is set; removes a learned step size."""
    if not isinstance(module, QATModule) or [*module.weight_quantizers(), *module.input_quantizers()]:
        return
    for kind in ("weight_quantizer", "input_quantizer"):
        for attribute in (kind, f"{kind}{MATRICES}"):
            module.__dict__.pop(attribute, None)
    for name in [name for name in module._parameters if is_step_size(name)]:
        del module._parameters[name]
    cast(Any, module).__class__ = module._ds_compress_base_class


def _class_for(module: nn.Module) -> type[QATModule]:
    if fused_experts(module) is not None:
        return experts_class_for(module)
    return qat_class(type(module), kind_of(module))


def _rebuild(base: type[nn.Module]) -> QATModule:
    # It was swapped when it was pickled, so its class can be.
    kind = ModuleKind.LINEAR if issubclass(base, nn.Linear) else None
    try:
        made = qat_class(base, kind)
    except TypeError:
        made = qat_class(base, ModuleKind.LINEAR_ACTIVATION)
    return made.__new__(made)


def _mixin_for(base: type[nn.Module]) -> type[QATModule]:
    if issubclass(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{base.__name__} belongs to nn.MultiheadAttention, which reads its weight without calling it; "
            "exclude the module from quantization"
        )
    mixins: dict[Any, type[QATModule]] = {
        nn.Linear: _QATLinear,
        nn.Conv2d: _QATConv2d,
        nn.Embedding: _QATEmbedding,
    }
    for ancestor in base.__mro__:
        # By name, so that transformers is imported by those who use it.
        is_conv1d = (ancestor.__module__, ancestor.__name__) == ("transformers.pytorch_utils", "Conv1D")
        found: type[QATModule] | None = _QATConv1D if is_conv1d else mixins.get(ancestor)
        if found is not None and base.forward is getattr(ancestor, "forward", None):
            return found
    raise TypeError(
        f"{base.__module__}.{base.__name__} cannot be quantized: Linear, Conv1D, Conv2d, Embedding and "
        "subclasses that inherit their forward can"
    )


def _conv2d_op(conv: nn.Conv2d) -> Conv2dOp:
    def pair(value: tuple[int, ...]) -> tuple[int, int]:
        return value[0], value[1]

    padding, extra = (0, 0), (0, 0, 0, 0)
    if conv.padding_mode == "zeros" and isinstance(conv.padding, str):  # "same" may pad one side more
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        padding = (min(top, bottom), min(left, right))
        extra = (left - padding[1], right - padding[1], top - padding[0], bottom - padding[0])
    elif conv.padding_mode == "zeros":
        padding = pair(cast("tuple[int, ...]", conv.padding))
    return Conv2dOp(pair(conv.stride), padding, pair(conv.dilation), conv.groups, extra)
