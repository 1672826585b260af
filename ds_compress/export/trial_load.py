"""Whether vanilla HF transformers loads packed weights of a model class: tried, without weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import nn


def loads_with(model: nn.Module, quantization_config: Mapping[str, Any], untied: bool = False) -> bool:
    """Whether `from_pretrained` succeeds with this `quantization_config`, on the meta device.

    Classes whose initialisation reads the weight of a layer (T5's scales it by its width) fail where packing has
    put another tensor in its place, and so do those with a tied head that is packed.

    model: only its class, config and shapes are used. untied: its tied weights are stored apart.
    """
    import transformers
    import transformers.integrations.deepspeed

    held: Any = model
    config = copy.deepcopy(held.config)
    config.quantization_config = dict(quantization_config)
    if untied:
        config.tie_word_embeddings = False
    integration: Any = transformers.integrations.deepspeed
    reference, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    is_initialized, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        type(held).from_pretrained(None, config=config, state_dict={}, device_map={"": "meta"})
    except Exception:  # as many kinds of errors as model classes
        return False
    finally:
        # compressed-tensors would divide the work among processes that do not take part.
        torch.distributed.is_initialized = is_initialized
        # Under ZeRO-3 transformers would partition the model.
        integration._hf_deepspeed_config_weak_ref = reference
        transformers.logging.set_verbosity(level)
    return True


def loads_packed(model: nn.Module, targets: Sequence[str], untied: bool = False) -> bool:
    """Whether it loads with the weights of `targets`, each an nn.Linear, packed."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {
        "targets": list(targets),
        "weights": weights,
        "input_activations": None,
        "format": "pack-quantized",
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }
    return loads_with(model, config, untied)
