"""A plan as plain data, for programs: what the table says in words."""

from __future__ import annotations

from typing import Any

from ds_compress.config.report import size_estimate
from ds_compress.config.report.coverage import left_out
from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.report.table import describe
from ds_compress.config.schema.structured_pruning import StructuredPruningConfig


def as_data(plan: ResolvedPlan) -> dict[str, Any]:
    """The keys that `cli.results` describes for `ds_compress plan`, without those of its arguments."""
    everything = size_estimate.total(size_estimate.stored(plan).values())
    state = size_estimate.training_state(plan)
    return {
        "blocks": dict(describe(plan)),
        "weights": _weights(plan),
        "structures": _structures(plan),
        "bytes": {
            "before": everything.before,
            "after": everything.after,
            "as_bitmask": everything.bitmask,
            "format": size_estimate.format_of(plan),
        },
        "parameters": sum(weight.numel for weight in plan.weights),
        "nonzeros": everything.nonzeros,
        "training_state_bytes": {"masks": state.mask, "latent_weights": state.latent, "scores": state.scores},
        "left_out": [str(missing) for missing in left_out(plan)],
        "notes": list(plan.notes),
    }


def _weights(plan: ResolvedPlan) -> list[dict[str, Any]]:
    """One entry for each weight and block that claims it, or its inputs."""
    stored = size_estimate.stored(plan)
    return [
        {
            "module": target.module_name,
            "parameter": target.param_name,
            "shape": list(target.shape),
            "block": key,
            "group": target.group,
            "treatment": plan.weight_block(key).describe_target(target),
            "bytes_before": stored[target.param_name].before,
            "bytes_after": stored[target.param_name].after,
            "nonzeros": stored[target.param_name].nonzeros,
        }
        for key, technique in plan.techniques.items()
        for target in technique.targets
    ]


def _structures(plan: ResolvedPlan) -> list[dict[str, Any]]:
    found = []
    for key, structures in plan.structures.items():
        block = plan.config.enabled_blocks()[key]
        assert isinstance(block, StructuredPruningConfig)
        for target in structures.targets:
            entry = {"structure": target.structure.name, "block": key, "group": target.group}
            found.append({**entry, "kept": block.describe_target(target)})
    return found
