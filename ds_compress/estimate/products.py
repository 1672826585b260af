"""The products of matrices that a token goes through in a model, from its shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.structure_targets import ShapesLeft
from ds_compress.config.targets import Weight
from ds_compress.modelinfo.inventory import Entry, entries_of
from ds_compress.modelinfo.kinds import ModuleKind

_MULTIPLIED = frozenset(ModuleKind) - {ModuleKind.EMBEDDING, ModuleKind.CONV2D}
_FULL, _SLIDING = ("full_attention", "chunked_attention"), "sliding_attention"


@dataclass(frozen=True)
class Product:
    """One weight that tokens are multiplied with.

    module: its name. weight: name of the parameter. numel: weights of it. left: of them once structured pruning is
    done. share: of them that one token meets, of experts those that it is sent to. share_left: likewise of `left`.
    inputs, outputs: features of a token before and behind it, `inputs_left` and `outputs_left` in the end.
    trained: whether its gradient is computed.
    """

    module: str
    weight: str
    numel: int
    left: int
    share: Fraction
    share_left: Fraction
    inputs: int
    outputs: int
    trained: bool

    @property
    def flops(self) -> float:
        """Of one token: a multiplication and an addition for each weight that it meets."""
        return float(2 * self.numel * self.share)

    @property
    def flops_left(self) -> float:
        """Likewise, once structured pruning is done."""
        return float(2 * self.left * self.share_left)


@dataclass(frozen=True)
class Attention:
    """Scores and values: what a token is multiplied with that is no weight.

    widths: for each layer the features of all heads, of queries and values together. windows: for each layer the tokens
    that it looks back at; None: at all. left: the share of heads and layers that structured pruning leaves.
    """

    widths: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    left: float = 1.0

    def flops(self, sequence: int) -> float:
        """Of one token among `sequence`. As kernels without a causal cut count them."""
        return float(
            sum(
                2 * width * min(sequence, window or sequence)
                for width, window in zip(self.widths, self.windows, strict=True)
            )
        )


@dataclass(frozen=True)
class Work:
    """What a token costs. notes: what could not be counted."""

    products: tuple[Product, ...]
    attention: Attention
    notes: tuple[str, ...] = ()

    def forward_flops(self, sequence: int) -> float:
        """Of one token in a text of `sequence`, uncompressed."""
        return sum(product.flops for product in self.products) + self.attention.flops(sequence)

    def training_flops(self, sequence: int) -> float:
        """Forward, and of backward the gradients of inputs and of trained weights."""
        products = sum(product.flops * (3 if product.trained else 2) for product in self.products)
        return products + 3 * self.attention.flops(sequence)


def work_of(model: nn.Module, plan: ResolvedPlan) -> Work:
    """Of a model (on the meta device, too) as `plan` leaves it.

    Raises:
        ValueError: a model with convolutions, whose work depends on more than tokens.
    """
    weights = {weight.name: weight for weight in plan.weights}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    left = ShapesLeft(plan.structures)
    products, uncounted = [], []
    for entry in entries_of(model):
        if entry.kind is ModuleKind.CONV2D:
            raise ValueError(
                f"{entry.name} is a convolution: the work of one depends on the size of images, not on tokens; leave "
                "--tokens out"
            )
        if entry.is_unsupported:
            uncounted.append(entry.name)
        if entry.kind in _MULTIPLIED:
            name = names[id(entry.weight)]
            # A model that layer_reduction will cut is planned as it will be.
            if name in weights:
                products.append(_product(entry, weights[name], left))
    attention, notes = _attention(model, plan)
    if uncounted:
        notes.append(f"matrices whose use is not known are not counted: {', '.join(uncounted[:3])}")
    return Work(tuple(products), attention, tuple(notes))


def _product(entry: Entry, weight: Weight, structures: ShapesLeft) -> Product:
    assert entry.kind is not None
    shape, layers = structures.shape(weight.name, weight.shape), structures.share(weight.name)
    met = Fraction(weight.chosen, weight.experts)
    # A stack of experts loses a part of each tensor, a list of them whole tensors.
    experts = Fraction(shape[0], weight.experts) if entry.kind.is_experts else layers
    return Product(
        module=entry.name,
        weight=weight.name,
        numel=weight.numel,
        left=int(math.prod(shape) * layers),
        share=met,
        share_left=min(Fraction(1), met / experts) if weight.experts > 1 and experts else met,
        inputs=weight.shape[-2 if entry.kind.is_transposed else -1],
        outputs=weight.shape[-1 if entry.kind.is_transposed else -2],
        trained=weight.trainable,
    )


def _attention(model: nn.Module, plan: ResolvedPlan) -> tuple[Attention, list[str]]:
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    hidden = getattr(config, "hidden_size", None)
    if not (isinstance(heads, int) and isinstance(layers, int) and isinstance(hidden, int)):
        return Attention(), ["scores of attention are not counted: the model's config has no sizes of them"]
    head = getattr(config, "head_dim", None) or hidden // heads
    of_queries = getattr(config, "qk_head_dim", None) or head
    width = heads * (of_queries + (getattr(config, "v_head_dim", None) or head))
    reduction = plan.config.layer_reduction
    if reduction is not None and reduction.enabled:
        layers = min(layers, reduction.keep_number_layer or len(reduction.teacher_layer or range(layers)))
    kinds: Sequence[str] = (getattr(config, "layer_types", None) or [_FULL[0]] * layers)[:layers]
    known = [kind for kind in kinds if kind in _FULL or kind == _SLIDING]
    window = getattr(config, "sliding_window", None)
    windows = tuple(window if kind == _SLIDING else None for kind in known)
    notes = []
    if len(known) < len(kinds):
        others = sorted(set(kinds) - {*_FULL, _SLIDING})
        notes.append(f"of layers of {', '.join(others)} only the products with weights are counted")
    return Attention((width,) * len(known), windows, _left(plan, len(known))), notes


def _left(plan: ResolvedPlan, layers: int) -> float:
    left = 1.0
    for key, structures in plan.structures.items():
        if key not in ("head_pruning", "depth_pruning") or not layers:
            continue
        lost = 0.0
        for target in structures.targets:
            structure = target.structure
            of_layers = structure.units if key == "depth_pruning" else 1
            lost += of_layers * (1 - target.dense_ratio)
        left *= max(0.0, 1 - lost / layers)
    return left
