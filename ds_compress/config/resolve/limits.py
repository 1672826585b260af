"""Limits that the weights themselves set: frozen ones, and shapes that a pattern does not divide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ds_compress.config.schema.sparse_pruning import METHODS_WITHOUT_TRAINING, SparsePruning, parse_pattern
from ds_compress.config.schema.weight_quantization import WeightQuantization
from ds_compress.config.targets import Target
from ds_compress.errors import Problem, dotted, listed, shown
from ds_compress.modelinfo.inventory import exact_pattern, few
from ds_compress.modelinfo.kinds import ModuleKind


def limits_of(key: str, block: Any, targets: tuple[Target, ...]) -> Iterator[Problem]:
    """Problems of the weights `targets` that the block `key` claims."""
    if isinstance(block, SparsePruning):
        yield from _frozen(key, block, targets)
        yield from _uneven_n_of_m(key, block, targets)
    if isinstance(block, WeightQuantization):
        yield from _uneven_groups(key, block, targets)
        yield from _unsuitable_embeddings(key, block, targets)


def inputs_of(target: Target) -> int:
    """Weights that one output sums over."""
    return target.shape[0] if target.kind is ModuleKind.CONV1D else math.prod(target.shape[1:])


def _frozen(key: str, block: SparsePruning, targets: tuple[Target, ...]) -> Iterator[Problem]:
    shared = block.shared_parameters
    if shared.method in METHODS_WITHOUT_TRAINING and not shared.effective_regrowth:
        return
    frozen = [target.module_name for target in targets if not target.param.requires_grad]
    if frozen:
        yield Problem(
            dotted(key, "shared_parameters", "method"),
            f"{shown(shared.method)}{' with regrowth' if shared.regrowth else ''} on {few(frozen)}, whose weight is "
            "frozen (requires_grad is False)",
            f"{listed(METHODS_WITHOUT_TRAINING)} without regrowth: a weight that does not train has no gradient to "
            "score by",
            "choose such a method, unfreeze these weights, or add them to shared_parameters.excluded_modules, "
            f"e.g. {shown(exact_pattern(frozen[0]))}",
        )


def _uneven_n_of_m(key: str, block: SparsePruning, targets: tuple[Target, ...]) -> Iterator[Problem]:
    text = block.shared_parameters.effective_pattern
    pattern = parse_pattern(text)
    if pattern.kind != "n_of_m":
        return
    uneven = [target for target in targets if inputs_of(target) % pattern.columns]
    if uneven:
        given = "pattern" if block.shared_parameters.pattern else "block_pattern"
        names = few([f"{target.module_name} ({inputs_of(target)} inputs)" for target in uneven])
        yield Problem(
            dotted(key, "shared_parameters", given),
            f'"{text}" with {names}',
            f"layers whose number of inputs is a multiple of {pattern.columns}",
            "exclude these layers in excluded_modules, or choose another pattern",
        )


def _uneven_groups(key: str, block: WeightQuantization, targets: tuple[Target, ...]) -> Iterator[Problem]:
    shared = block.shared_parameters
    if shared.granularity not in (None, "per_group"):
        return
    # An embedding has one scale per row, whatever quantize_groups says.
    counted = [target for target in targets if target.kind is not ModuleKind.EMBEDDING]
    uneven = [target for target in counted if math.prod(target.shape) % shared.quantize_groups]
    if uneven:
        names = few([f"{target.module_name} {list(target.shape)}" for target in uneven])
        yield Problem(
            dotted(key, "shared_parameters", "quantize_groups"),
            f"{shared.quantize_groups} with {names}",
            "a divisor of the number of weights of each layer",
            'choose another number, exclude these layers, or set granularity to "per_channel"',
        )


def _unsuitable_embeddings(
    key: str, block: WeightQuantization, targets: tuple[Target, ...]
) -> Iterator[Problem]:
    obstacles = {
        "sparse": "sparse=True has no gradient for the whole weight",
        "max_norm": "max_norm rewrites the weight in forward",
    }
    if block.shared_parameters.learned_scale:
        obstacles["scale_grad_by_freq"] = "learned_scale does not know scale_grad_by_freq"
    for target in targets:
        for option, why in obstacles.items():
            if target.kind is ModuleKind.EMBEDDING and getattr(target.module, option) not in (None, False):
                yield Problem(
                    dotted(key, "different_groups", target.group, "modules"),
                    f"{target.module_name}, an embedding built with {option}",
                    f"embeddings without it: {why}",
                    f"build it without {option}, or add {shown(exact_pattern(target.module_name))} to "
                    "shared_parameters.excluded_modules",
                )
