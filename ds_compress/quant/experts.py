"""Fused experts that quantize in forward: the matrices of all experts of a layer are one parameter, and one op.

The class of the module is changed, as for other layers, and its own forward runs, whatever implementation it chooses
(a loop over experts, batched or grouped products, one that was registered): what it reads as `self.gate_up_proj` is the
fake-quantized stack while it runs. The stacks live as long as that forward, see `presented`; compiled code keeps for
backward what its compiler decides to keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ds_compress.imports import not_compiled
from ds_compress.modelinfo.experts import fused_experts
from ds_compress.modelinfo.linear_activation import builtin_linear
from ds_compress.quant.expert_products import ExpertProducts
from ds_compress.quant.fake_quant import FakeQuantConfig, autocast_dtype
from ds_compress.quant.presented import Stack, present, without_copies
from ds_compress.quant.qat_module import MATRICES, QATModule
from ds_compress.quant.quantizers import ExpertsInputQuantizer, InputQuantizer, WeightQuantizer

_GROUPED_ROW = 16
_VALUES, _UNREAD = "_ds_compress_presented", "_ds_compress_unread"
_WEIGHTS, _INPUTS = f"weight_quantizer{MATRICES}", f"input_quantizer{MATRICES}"


class QATExperts(QATModule):
    """Fused experts with fake-quantized matrices, and inputs of these.

    The quantizers are those of a matrix: `set_weight_quantizer("down_proj", ...)`.
    """

    _ds_compress_matrices: ClassVar[tuple[str, str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the base class, on what is presented.

        Raises:
            RuntimeError: it computed without reading what is presented, or multiplied by it unseen.
        """
        configs = {name: q.fake_quant for name, q in self.weight_quantizers() if q.fake_quant is not None}
        inputs = {name: q for name, q in self.input_quantizers() if q.enabled}
        if not configs and not inputs:
            return self._ds_compress_base_class.forward(self, *args, **kwargs)
        if inputs:
            return self._with_inputs(configs, inputs, *args, **kwargs)
        with self._presented(configs) as unread:
            result = self._ds_compress_base_class.forward(self, *args, **kwargs)
            if self._must_read(result):
                self._check(unread)
        return result

    @not_compiled
    def _with_inputs(
        self,
        configs: Mapping[str, FakeQuantConfig],
        inputs: Mapping[str, ExpertsInputQuantizer],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Not compiled: where a matrix lies in memory says whose it is."""
        with self._presented(configs) as unread:
            stacks = {name: getattr(self, name) for name in self._ds_compress_matrices}
            # DeepSpeed's F.linear under ZeRO-3 would hide what it is given.
            with builtin_linear(), ExpertProducts(stacks, inputs, self.training) as products:
                result = self._ds_compress_base_class.forward(self, *args, **kwargs)
            if self._must_read(result):
                self._check(unread, products.rows)
        return result

    def _check(self, unread: Collection[str], rows: Mapping[str, int] | None = None) -> None:
        name = self._ds_compress_base_class.__name__
        if unread:
            raise RuntimeError(
                f"{name} computed without reading {sorted(unread)}: its quantizers were not active; exclude the module "
                "from quantization"
            )
        if rows is not None and (len(set(rows.values())) > 1 or 0 in rows.values()):
            seen = ", ".join(f"{count} by {matrix}" for matrix, count in rows.items())
            how = getattr(getattr(self, "config", None), "_experts_implementation", None)
            raise RuntimeError(
                f"{name} multiplied rows by its matrices in a way that was not seen ({seen}), so its inputs were not "
                f'quantized: set the experts implementation of the model ({how!r} now) to "grouped_mm", "batched_mm" '
                'or "eager", or exclude the module from activation_quantization'
            )

    def set_weight_quantizer(self, parameter: str, quantizer: WeightQuantizer | None) -> None:
        _set(self.__dict__.setdefault(_WEIGHTS, {}), parameter, quantizer)

    def set_input_quantizer(self, parameter: str, quantizer: InputQuantizer | None) -> None:
        _set(self.__dict__.setdefault(_INPUTS, {}), parameter, quantizer)

    def weight_quantizers(self) -> Iterator[tuple[str, WeightQuantizer]]:
        yield from (self.__dict__.get(_WEIGHTS) or {}).items()

    def input_quantizers(self) -> Iterator[tuple[str, ExpertsInputQuantizer]]:
        yield from (self.__dict__.get(_INPUTS) or {}).items()

    def extra_repr(self) -> str:
        """The base class's, and how the matrices and their inputs are quantized now."""
        parts = [self._sizes()]
        parts += [f"{name}={quantizer.describe()}" for name, quantizer in self.weight_quantizers()]
        parts += [f"input of {name}={quantizer.describe()}" for name, quantizer in self.input_quantizers()]
        return ", ".join(part for part in parts if part)

    def _rebuilder(self) -> tuple[Any, tuple[Any, ...]]:
        return _rebuild, (self._ds_compress_base_class, self._ds_compress_matrices)

    @contextlib.contextmanager
    def _presented(self, configs: Mapping[str, FakeQuantConfig]) -> Iterator[set[str]]:
        """Inside, the stacks read as fake-quantized; gives the names of those that were not read so far."""
        stacks = {name: self._stack(name, fake_quant) for name, fake_quant in configs.items()}
        values = {name: present(stack) for name, stack in stacks.items()}
        self.__dict__[_VALUES], self.__dict__[_UNREAD] = values, set(values)
        try:
            with without_copies({stack: values[name] for name, stack in stacks.items()}):
                yield self.__dict__[_UNREAD]
        finally:
            del self.__dict__[_VALUES], self.__dict__[_UNREAD]

    def _stack(self, name: str, fake_quant: FakeQuantConfig) -> Stack:
        parameter = self._parameters[name]
        assert parameter is not None
        # A cast by autocast would be a copy for each product, which autograd keeps. Grouped products, which autocast
        # does not know, want rows of whole 16 bytes.
        dtype = autocast_dtype(parameter)
        if dtype is None or parameter.shape[-1] * dtype.itemsize % _GROUPED_ROW:
            dtype = parameter.dtype
        return Stack(parameter, self._step_size(fake_quant, name), fake_quant, dtype)

    def _must_read(self, result: Any) -> bool:
        is_empty = isinstance(result, torch.Tensor) and not result.numel()
        # Of experts that are spread over processes, those of this one may have no token.
        return not is_empty and not getattr(self, "_is_expert_parallel", False)


def experts_class(base: type[nn.Module], matrices: tuple[str, str]) -> type[QATExperts]:
    """The quantizing class for experts of class `base` whose matrices have these names."""
    if (base, matrices) not in _classes:
        namespace: dict[str, Any] = {
            "_ds_compress_base_class": base,
            "_ds_compress_matrices": matrices,
            "__module__": __name__,
            "__doc__": QATExperts.__doc__,
            **{name: _presented_or_own(name) for name in matrices},
        }
        made = type(f"QAT{base.__name__}", (QATExperts, base), namespace)
        _classes[base, matrices] = cast("type[QATExperts]", made)
    return _classes[base, matrices]


_classes: dict[tuple[type[nn.Module], tuple[str, str]], type[QATExperts]] = {}


def experts_class_for(module: nn.Module) -> type[QATExperts]:
    """The quantizing class for a module of fused experts that has none yet."""
    found = fused_experts(module)
    assert found is not None
    return experts_class(type(module), found.matrices)


def check_experts(module: nn.Module) -> None:
    """Raises TypeError for experts whose forward was replaced on the module, past that of any class."""
    if "forward" in vars(module):
        raise TypeError(
            f"the forward of this {type(module).__name__} was replaced on the module itself, which never calls that of "
            "its class; quantize before that, or exclude the module"
        )


def _rebuild(base: type[nn.Module], matrices: tuple[str, str]) -> QATExperts:
    made = experts_class(base, matrices)
    return made.__new__(made)


def _presented_or_own(name: str) -> property:
    def read(self: nn.Module) -> Any:
        values: dict[str, torch.Tensor] = self.__dict__.get(_VALUES, {})
        if name not in values:
            return self._parameters[name]
        self.__dict__[_UNREAD].discard(name)
        return values[name]

    return property(read)


def _set(held: dict[str, Any], parameter: str, quantizer: Any) -> None:
    held.pop(parameter, None)
    if quantizer is not None:
        held[parameter] = quantizer
