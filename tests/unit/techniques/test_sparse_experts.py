"""Sparse pruning of fused experts against a plain selection in each expert's matrix, in both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.errors import ConfigError
from ds_compress.modelinfo.experts import moe_blocks
from tests.zoo.mixtures import mixture

BOTH_LAYOUTS = ["qwen3_moe", "gpt_oss"]


def pruned(name: str, modules: list[str], **shared: Any) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Weights of a fresh model, and the model after one-shot pruning to half."""
    model = mixture(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    block = {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1", "pattern": "unstructured", **shared},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": modules}},
        }
    }
    return before, ds_compress.finalize(model, block)


def stacks(model: torch.nn.Module) -> list[tuple[str, bool]]:
    """(name, whether transposed) of every three-dimensional parameter of experts."""
    return [
        (f"{block.experts_name}.{matrix}", block.fused.transposed)
        for block in moe_blocks(model)
        if block.fused is not None
        for matrix in block.fused.matrices
    ]


@pytest.mark.parametrize("name", BOTH_LAYOUTS)
def test_each_matrix_keeps_its_own_largest_weights(name: str) -> None:
    before, model = pruned(name, ["layers"])
    for stack, _ in stacks(model):
        for matrix, now in zip(before[stack], model.get_parameter(stack).detach(), strict=True):
            order = matrix.abs().flatten().argsort(descending=True, stable=True)
            expected = torch.zeros(matrix.numel(), dtype=torch.bool)
            expected[order[: -(-matrix.numel() // 2)]] = True
            assert torch.equal(now.flatten() != 0, expected)


def test_layers_reaches_experts_and_leaves_routers_alone() -> None:
    before, model = pruned("qwen2_moe", ["layers"])
    for block in moe_blocks(model):
        for router in block.routers:
            name = f"{router}.weight"
            assert torch.equal(before[name], model.get_parameter(name))
    for stack, _ in stacks(model):
        assert (model.get_parameter(stack) == 0).float().mean() == 0.5


def test_a_regex_that_names_routers_only_prunes_them() -> None:
    _, model = pruned("mixtral", [r"mlp\.gate$"])
    for block in moe_blocks(model):
        assert (model.get_parameter(f"{block.routers[0]}.weight") == 0).float().mean() == 0.5


@pytest.mark.parametrize("name", BOTH_LAYOUTS)
def test_one_threshold_over_all_experts(name: str) -> None:
    before, model = pruned(name, ["experts"], scope="global")
    names = [stack for stack, _ in stacks(model)]
    flat = torch.cat([before[stack].abs().flatten() for stack in names])
    kept = torch.cat([(model.get_parameter(stack) != 0).flatten() for stack in names])
    assert int(kept.sum()) == -(-flat.numel() // 2)
    assert flat[kept].min() >= flat[~kept].max()


@pytest.mark.parametrize("name", BOTH_LAYOUTS)
def test_two_of_four_inputs_of_each_expert_survive(name: str) -> None:
    before, model = pruned(name, ["experts"], pattern="2:4")
    for stack, transposed in stacks(model):
        old, new = before[stack], model.get_parameter(stack).detach()
        if transposed:
            old, new = old.transpose(1, 2), new.transpose(1, 2)
        groups = old.abs().reshape(-1, 4)
        kept = (new != 0).reshape(-1, 4)
        assert bool((kept.sum(1) == 2).all())
        assert torch.allclose(groups.masked_fill(~kept, 0).sum(1), groups.topk(2, dim=1).values.sum(1))


@pytest.mark.parametrize("name", BOTH_LAYOUTS)
def test_blocks_live_or_die_whole_in_each_expert(name: str) -> None:
    before, model = pruned(name, ["down_proj"], pattern="4x2")
    for stack, transposed in stacks(model):
        if not stack.endswith("down_proj"):
            continue
        for old, new in zip(before[stack], model.get_parameter(stack).detach(), strict=True):
            if transposed:
                old, new = old.t(), new.t()
            rows, columns = old.shape

            def tiles(matrix: torch.Tensor, rows: int = rows, columns: int = columns) -> torch.Tensor:
                return matrix.reshape(rows // 4, 4, columns // 2, 2).transpose(1, 2).reshape(-1, 8)

            alive = tiles(new != 0)
            assert bool((alive.all(1) | ~alive.any(1)).all())
            kept = alive.any(1)
            assert int(kept.sum()) == -(-len(kept) // 2)
            means = tiles(old.abs()).mean(1)
            assert means[kept].min() >= means[~kept].max()


def test_a_block_across_two_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="divide the matrix of each expert"):
        pruned("qwen3_moe", ["experts"], pattern="5x1")


def test_scores_that_are_not_finite_name_the_stack(caplog: pytest.LogCaptureFixture) -> None:
    model = mixture("mixtral")
    stack = "model.layers.0.mlp.experts.down_proj"
    model.get_parameter(stack).data[2, 0, 0] = float("nan")
    block = {"sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5}}}
    ds_compress.finalize(model, block)
    assert f"of {stack} are NaN or Inf" in caplog.text


def test_the_estimate_counts_every_expert() -> None:
    model = mixture("mixtral")
    block = {"sparse_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5}}}
    plan = ds_compress.plan(model, block)
    experts = [t for t in plan.techniques["sparse_pruning"].targets if t.kind.is_experts]
    assert len(experts) == 4 and all(target.matrices == 4 for target in experts)
