"""Finding the stack of repeated layers in a model: `encoder.layer`, `transformer.h`, `model.layers`, ..."""

from __future__ import annotations

from torch import nn

from ds_compress.errors import ConfigError, Problem, nearest, shown

_PREFIX_PATH = "compression_training.layer_reduction.module_name_prefix"


def find_layers(
    model: nn.Module, prefix: str | None = None, path: str = _PREFIX_PATH
) -> tuple[str, nn.ModuleList]:
    """Qualified name and ModuleList of the model's layers.

    With `prefix` that module; else the one ModuleList whose length is the `num_hidden_layers` of the model's
    config, or, for models without a config, the longest list of layers of one class.

    Raises:
        ConfigError: `prefix` names no ModuleList, or the choice is not unique; lists what there is.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if prefix is not None:
        # The wrapper of a base model may or may not be part of the name: `bert.encoder.layer`, `encoder.layer`.
        matches = [name for name in lists if name == prefix or name.endswith("." + prefix)]
        if len(matches) == 1:
            return matches[0], lists[matches[0]]
        close = nearest(prefix, lists, cutoff=0.0)
        hint = f"did you mean {close!r}?" if close else "this model has no ModuleList"
        raise ConfigError([Problem(path, shown(prefix), "the name of one ModuleList of layers", hint)])
    depth = _configured_depth(model)
    candidates = {
        name: layers
        for name, layers in lists.items()
        if len(layers)
        and len({type(layer) for layer in layers}) == 1
        and (depth is None or len(layers) == depth)
    }
    # A list inside a layer (experts, branches) is not the stack of layers.
    candidates = {
        name: layers
        for name, layers in candidates.items()
        if not any(name.startswith(other + ".") for other in candidates if other != name)
    }
    if depth is None and candidates:
        longest = max(len(layers) for layers in candidates.values())
        candidates = {name: layers for name, layers in candidates.items() if len(layers) == longest}
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    found = ", ".join(candidates) or "none"
    raise ConfigError(
        [
            Problem(
                path,
                "absent",
                "the name of the ModuleList of layers",
                f"not found by itself; candidates: {found}",
            )
        ]
    )


def _configured_depth(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for candidate in (config, getattr(config, "text_config", None)):
        depth = getattr(candidate, "num_hidden_layers", None)
        if isinstance(depth, int):
            return depth
    return None
