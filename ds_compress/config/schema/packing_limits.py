"""What `frozen_weights: "packed"` needs of the model: frozen weights, of Linear layers, that nobody else reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ds_compress.config.targets import Target
from ds_compress.errors import Problem, dotted, shown
from ds_compress.modelinfo.inventory import covering_patterns, few
from ds_compress.modelinfo.kinds import ModuleKind


def problems(key: str, shared: Any, targets: Sequence[Target]) -> Iterator[Problem]:
    """Nothing to pack, and weights that cannot be packed."""
    if shared.frozen_weights != "packed":
        return
    path = dotted(key, "shared_parameters", "frozen_weights")
    frozen = [target for target in targets if not target.param.requires_grad]
    if targets and not frozen:
        yield Problem(
            path,
            '"packed" where every weight that the block claims trains',
            '"full", unless weights are frozen, as under the adapters of PEFT',
            "add the adapters before deepspeed.initialize, or remove the key",
        )
    others = [target for target in frozen if target.kind is not ModuleKind.LINEAR]
    if others:
        patterns = ", ".join(shown(pattern) for pattern in covering_patterns(t.module_name for t in others))
        yield Problem(
            path,
            f'"packed" with {few([f"{t.module_name} ({t.kind})" for t in others])}',
            "frozen weights of Linear layers",
            f'add {patterns} to shared_parameters.excluded_modules, or set it to "full"',
        )
    pruned = [target.module_name for target in frozen if target.pruned]
    if pruned:
        yield Problem(path, f'"packed" with {few(pruned)}, which are pruned', '"full" for pruned weights')
