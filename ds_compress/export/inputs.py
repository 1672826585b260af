"""Small fixed inputs for any model of transformers, and the logits that it gives."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.quant.layers import input_quantizers_of

_TOKENS, _DECODER_TOKENS, _SENTENCES = 12, 7, 2


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two random sequences (the second with three masked tokens), images or spectrograms.

    Raises:
        ExportError: the inputs of the model are not known.
    """
    try:
        return _example_inputs(model)
    except ExportError:
        raise
    except Exception as error:  # configs and dummy inputs of a thousand classes
        raise ExportError(f"{unknown_inputs(model)} ({type(error).__name__}: {error})") from error


def checked_inputs(model: nn.Module, given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """`given`; raises ExportError for what the model does not take by name."""
    taken = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    unknown = [name for name in given if name not in taken and not takes_any]
    if unknown or not given:
        got = ", ".join(unknown) or "nothing"
        raise ExportError(f"inputs= has {got}, and a {type(model).__name__} takes {', '.join(taken)}")
    return given


def unknown_inputs(model: nn.Module) -> str:
    """A sentence for errors: the user has to say what the model takes."""
    taken = ", ".join(inspect.signature(model.forward).parameters)
    return (
        f"no inputs for a {type(model).__name__} could be generated: pass inputs={{name: tensor}} to check it with "
        f"(its forward takes {taken}), or check=False"
    )


def _example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    taken = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    if config is None:
        dummy = getattr(model, "dummy_inputs", None)
        if isinstance(dummy, Mapping):
            return {name: value.clone() for name, value in dummy.items()}
        raise ExportError(unknown_inputs(model))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    low, high = (
        min(3, text.vocab_size - 1) if hasattr(text, "vocab_size") else 0,
        getattr(text, "vocab_size", 2),
    )
    length = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    tokens = torch.randint(low, high, (_SENTENCES, length), generator=generator)
    inputs: dict[str, torch.Tensor] = {}
    if "pixel_values" in taken and model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(_SENTENCES, channels, height, width, generator=generator)}
    if "input_features" in taken:
        frames = 2 * getattr(config, "max_source_positions", 20)
        bins = getattr(config, "num_mel_bins", 80)
        inputs["input_features"] = torch.randn(_SENTENCES, bins, frames, generator=generator)
    elif "input_ids" in taken:
        mask = torch.ones_like(tokens)
        mask[1, -3:] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask}
    else:
        inputs = dict(model.dummy_inputs)  # type: ignore[arg-type]
    if "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = tokens[:, :_DECODER_TOKENS].contiguous()
    return inputs


@torch.no_grad()
def run(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Logits (else the first output) in eval mode, fp32 on the CPU; modes are as before afterwards.

    dtype: of inputs that are floats; None: that of the model.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    given: dict[str, Any] = {
        name: value.to(parameter.device, (dtype or parameter.dtype) if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    if getattr(getattr(model, "config", None), "use_cache", None):
        given["use_cache"] = False
    with _in_eval_mode(model):
        output = model(**given)
    if isinstance(output, torch.Tensor):
        found = output
    else:
        found = output["logits"] if isinstance(output, Mapping) and "logits" in output else output[0]
    return found.detach().float().cpu().contiguous()


@contextlib.contextmanager
def exact_activations(model: nn.Module, only: Collection[str] | None = None) -> Iterator[None]:
    """No input is quantized inside. only: of the modules with these names; None: of all."""
    quantizers = [
        quantizer
        for name, module in model.named_modules()
        if only is None or name in only
        for quantizer in input_quantizers_of(module).values()
    ]
    before = [quantizer.enabled for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
