"""Layer-wise distillation: a quantized model learns one layer at a time to compute what it computed before.

For post-training quantization (Yao et al. 2022, ZeroQuant, section 4.3): layer k, quantized, is trained on the inputs
that layer k has in the unquantized model, to give the same outputs. There are no labels, no second model and no
gradient that crosses a layer; on ZeRO-3 one layer is whole at a time. Hidden states of the batches wait in host memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from ds_compress.engine.teachers.self_teacher import frozen_copy, quantizers_off
from ds_compress.engine.zero.parameters import full_parameters
from ds_compress.errors import ConfigError, Problem
from ds_compress.modelinfo.evaluating import evaluating
from ds_compress.modelinfo.layers import find_layers
from ds_compress.quant import layers as quant_layers

logger = logging.getLogger("ds_compress")

_PRUNING = ("sparse_pruning", "row_pruning", "head_pruning", "channel_pruning", "hidden_pruning")


@dataclass(frozen=True)
class LayerResult:
    """Mean squared error of a quantized layer's output, over all batches of all processes."""

    name: str
    before: float
    after: float


@dataclass
class _Inputs:
    """What the layers of the unquantized model were given: hidden states of the next layer, the rest for each."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)


def distill_layers(
    engine: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    steps: int = 100,
    learning_rate: float = 1e-4,
    module_name_prefix: str | None = None,
) -> list[LayerResult]:
    """Trains every layer of `engine`'s quantized model towards its unquantized self; a collective.

    Args:
        engine: with an enabled `weight_quantization` block whose `schedule_offset` has passed, on any ZeRO stage.
        batches: inputs of the model, labels or not, of this process; the same number in each.
        steps: of Adam, per layer; one batch each.
        module_name_prefix: the ModuleList of layers; absent: found as by `layer_reduction`.

    Returns:
        One result for each layer. Weights of 16-bit copies and fp32 masters are changed; weights that are zero under a
        pruning block stay zero.

    Raises:
        ConfigError: nothing is quantized (now). ValueError: there is no batch.
    """
    run = getattr(engine, "compression", None)
    if run is None or not _is_quantized(engine.module):
        path = "compression_training.weight_quantization"
        allowed = (
            'an enabled block that quantizes now ("schedule_offset": 0, start_bits equal to target_bits)'
        )
        raise ConfigError([Problem(path, "no quantized weight", allowed)])
    name, layers = find_layers(engine.module, module_name_prefix)
    given = [dict(batch) for batch in batches]
    if not given:
        raise ValueError("distill_layers: there is no batch to learn from")
    _calibrate(engine, run, given)
    inputs = _recorded(engine.module, layers, given)
    results = []
    for index, layer in enumerate(layers):
        result = _distill_layer(f"{name}.{index}", index, layer, inputs, run, steps, learning_rate)
        results.append(result)
        logger.info("ds_compress: %s: error %.3g -> %.3g", result.name, result.before, result.after)
    return results


def _distill_layer(
    name: str,
    index: int,
    layer: nn.Module,
    inputs: _Inputs,
    run: Any,
    steps: int,
    learning_rate: float,
) -> LayerResult:
    student = _alone(layer)
    device = next(student.parameters()).device

    def call(at: int) -> tuple[Any, ...]:
        return inputs.hidden[at].to(device, torch.float32), *_in_fp32(inputs.others[at][index], device)

    with torch.no_grad(), quantizers_off(student):
        targets = [_output(student, call(at)).cpu() for at in range(len(inputs.hidden))]

    def error(at: int) -> torch.Tensor:
        return F.mse_loss(_output(student, call(at)), targets[at].to(device))

    pairs = zip(student.parameters(), layer.parameters(), strict=True)
    trained = [parameter.requires_grad_() for parameter, own in pairs if own.requires_grad]
    kept = [p.detach() != 0 for p in trained] if any(key in run.techniques for key in _PRUNING) else None
    before = _mean_error(error, len(targets))
    best, least = [p.detach().clone() for p in trained], before
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        error(step % len(targets)).backward()
        _average([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        if kept is not None:
            for parameter, mask in zip(trained, kept, strict=True):
                parameter.data.mul_(mask)
        if (step + 1) % len(targets) == 0 or step == steps - 1:
            now = _mean_error(error, len(targets))
            if now < least:
                best, least = [p.detach().clone() for p in trained], now
    own = [p for p in layer.parameters() if p.requires_grad]
    _write(run, layer, name, dict(zip(map(id, own), best, strict=True)))
    inputs.hidden = targets
    return LayerResult(name, before, least)


def _is_quantized(model: nn.Module) -> bool:
    return any(quant_layers.quantized_parameters(module) for module in model.modules())


@torch.no_grad()
def _calibrate(engine: Any, run: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Static ranges of activations that do not exist yet are observed on the batches."""
    technique = run.techniques.get("activation_quantization")
    if technique is None or not technique.lacks_ranges:
        return
    quantized = [m for m in engine.module.modules() if isinstance(m, quant_layers.QATModule)]
    with evaluating(engine.module), quantizers_off(engine.module, ("weight_quantizer",)):
        for module in quantized:
            module.training = True  # it observes then
        for batch in batches:
            engine.module(**_without_labels(engine, batch))
    technique.before_step(run.applied_steps)


@torch.no_grad()
def _recorded(
    model: nn.Module, layers: nn.ModuleList, batches: Sequence[Mapping[str, torch.Tensor]]
) -> _Inputs:
    inputs = _Inputs()

    def hook(index: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest = _split(args, kwargs)
            if index == 0:
                inputs.hidden.append(hidden.detach().cpu())
                inputs.others.append([])
            inputs.others[-1].append(rest)

        return record

    handles = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with evaluating(model), quantizers_off(model):
            for batch in batches:
                model(**_without_labels(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Hidden states, and everything else that a layer is called with."""
    if args:
        return args[0], (args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def _without_labels(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    module = getattr(model, "module", model)
    device = next(module.parameters()).device
    inputs: dict[str, Any] = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    if getattr(getattr(module, "config", None), "use_cache", False):
        inputs["use_cache"] = False  # a layer that is called again must not find its own keys
    return inputs


def _alone(layer: nn.Module) -> nn.Module:
    """A whole fp32 copy of a layer, its quantizers included, without anybody's hooks."""
    copied = frozen_copy(layer, 0, torch.float32).eval()
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


def _output(layer: nn.Module, call: tuple[Any, ...]) -> torch.Tensor:
    hidden, args, kwargs = call
    output = layer(hidden, *args, **kwargs)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _in_fp32(rest: tuple[tuple[Any, ...], dict[str, Any]], device: torch.device) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

    args, kwargs = rest
    return pytree.tree_map(cast, args), pytree.tree_map(cast, kwargs)


@torch.no_grad()
def _mean_error(error: Callable[[int], torch.Tensor], batches: int) -> float:
    mean = torch.stack([error(at) for at in range(batches)]).mean()
    _average([mean])
    return float(mean)


def _average(tensors: Sequence[torch.Tensor]) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


@torch.no_grad()
def _write(run: Any, layer: nn.Module, name: str, trained: Mapping[int, torch.Tensor]) -> None:
    """The same values everywhere: into the parameters, and into this process' fragments of their masters."""
    for local, parameter in layer.named_parameters():
        if id(parameter) not in trained:
            continue
        value = trained[id(parameter)]
        with full_parameters([parameter], write=True):
            parameter.data.copy_(value)
        fragment = run.shards.fragments.get(f"{name}.{local}")
        if fragment is not None:
            part = value.flatten()[fragment.start : fragment.start + fragment.numel]
            fragment.values.copy_(part)
