"""What a block without a regex leaves out: "every layer" is every Linear, Conv1D, Conv2d and matrix of experts.

Models have more. A parameter of a module of its own may be most of a model: a block that takes the default then reaches
a few percent of it, and its sparsity of 0.5 is one of 0.015 of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.targets import Weight
from ds_compress.modelinfo.inventory import EVERY_LAYER
from ds_compress.regexes import occurs

_EMBEDDING = "Embedding"


@dataclass(frozen=True)
class LeftOut:
    """What the default `modules` of one block did not reach, of all parameters with two dimensions or more.

    block: its key. reached, total: elements that it reaches, and that the model has. by_owner: {class of the module:
    (elements, name of the first parameter)}, largest first; what excluded_modules names is not counted, nor are the
    routers of experts, which nobody means by "every layer".
    """

    block: str
    reached: int
    total: int
    by_owner: dict[str, tuple[int, str]]

    @property
    def is_expected(self) -> bool:
        """Whether only embeddings are left out, which the docs say of the default."""
        return all(owner == _EMBEDDING for owner in self.by_owner)

    def __str__(self) -> str:
        parts = [
            f"{self._share(elements)} in {owner} (such as {name})"
            for owner, (elements, name) in self.by_owner.items()
        ]
        return (
            f"{self.block} without a regex reaches {self._share(self.reached)} of the model's weights; "
            f"left out: {', '.join(parts)}"
        )

    def _share(self, elements: int) -> str:
        return f"{100 * elements / max(1, self.total):.3g} %"


def left_out(plan: ResolvedPlan) -> Iterator[LeftOut]:
    """Of each enabled block with targets of its own that has a group with the default `modules`."""
    total = sum(weight.numel for weight in plan.weights)
    for key, technique in plan.techniques.items():
        groups = getattr(plan.config, key).groups.values()
        if not any(EVERY_LAYER in group.modules for group in groups):
            continue
        reached = {target.param_name: target for target in technique.targets}
        by_owner: dict[str, tuple[int, str]] = {}
        for weight in plan.weights:
            if weight.name in reached or len(weight.shape) < 2 or weight.routes:
                continue
            if _is_excluded(weight, technique.shared):
                continue
            elements, first = by_owner.get(weight.owner, (0, weight.name))
            by_owner[weight.owner] = elements + weight.numel, first
        if by_owner:
            largest_first = dict(sorted(by_owner.items(), key=lambda item: -item[1][0]))
            numel = sum(weight.numel for weight in plan.weights if weight.name in reached)
            yield LeftOut(key, numel, total, largest_first)


def _is_excluded(weight: Weight, shared: object) -> bool:
    module = weight.name.rpartition(".")[0]
    return any(occurs(pattern, module) for pattern in getattr(shared, "excluded_modules", ()))
