"""Structured pruning and exports of every mixture: removed equals masked, and stock transformers loads what is left."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ds_compress
from ds_compress.modelinfo.experts import fused_experts
from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.structure.vanilla_hf import vanilla_hf_obstacles
from tests.zoo.masked import kept_units, masked_copy
from tests.zoo.mixtures import ARCHITECTURES, mixture, tokens

_ROW, _HEAD, _LAYER, _HIDDEN = GroupKind.ROW, GroupKind.HEAD, GroupKind.LAYER, GroupKind.HIDDEN
_RELATIVE = 1e-5
"""Of the largest logit."""
_KINDS: dict[str, tuple[GroupKind, ...]] = {
    "row": (_ROW,),
    "head": (_HEAD,),
    "hidden": (_HIDDEN,),
    "all": (_ROW, _HEAD, _LAYER, _HIDDEN),
}
_WITHOUT_HEADS = {"qwen3_next", "deepseek_v2", "deepseek_v3", "hunyuan_moe", "stranger"}
"""Attentions with a gate, of low rank, or with a norm of heads between, which no finder knows."""
_HEADS_REFUSED = {"olmoe": "q_norm", "minimax": "slope_rate"}
"""What stock transformers would build otherwise with fewer heads."""
_WITH_HIDDEN = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1", "gpt_oss", "granite_moe", "ernie_moe"),
}
_INEXACT = {"qwen3_moe": 1e-4, "dots1": 1e-4, "olmoe": 2e-4}
"""Whose epsilon is shared by norms over all hidden entries, or all heads, and others: it is left as it is."""

_FRESH = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    case = torch.load(folder + "/case.pt", weights_only=True)
    model = getattr(transformers, case["class"]).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=case["inputs"]).logits
    error = float((logits - case["logits"]).abs().max() / case["logits"].abs().max())
    assert error < 1e-5, f"{folder}: {error}"
assert not [name for name in sys.modules if name.startswith(("ds_compress", "tests"))]
print(len(sys.argv) - 1, "loaded")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    output = model(tokens())
    return output if isinstance(output, torch.Tensor) else output.logits


def groups_of(model: nn.Module, kinds: Sequence[GroupKind]) -> list[PrunableGroup]:
    return [group for kind in kinds for group in find_groups(model, kind).groups]


@pytest.mark.parametrize("kinds", _KINDS)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "stranger"])
def test_removed_equals_masked(name: str, kinds: str, folders: Path) -> None:
    model = mixture(name)
    groups = groups_of(model, _KINDS[kinds])
    if kinds in ("head", "hidden"):
        assert bool(groups) == (name not in _WITHOUT_HEADS if kinds == "head" else name in _WITH_HIDDEN)
    if not groups:
        return
    kept = kept_units(groups)
    plan = PruningPlan.of(groups, kept, model)
    masked, original = masked_copy(model, groups, kept), copy.deepcopy(model)
    obstacles = vanilla_hf_obstacles(model, plan)

    apply_pruning(model, plan)

    expected = logits_of(masked)
    largest = float(expected.abs().max())
    assert float((logits_of(original) - expected).abs().max()) > 0.05 * largest, "the mask changes nothing"
    error = float((logits_of(model) - expected).abs().max()) / largest
    assert error <= (_INEXACT.get(name, _RELATIVE) if kinds != "row" else _RELATIVE)
    state = model.state_dict()
    for key, tensor in original.state_dict().items():
        renamed = plan.renamed(key)
        if renamed is not None:
            assert torch.equal(plan.prune_tensor(key, tensor), state[renamed])
            assert plan.shape_of(key, tensor.shape) == tuple(state[renamed].shape)
    assert vanilla_hf_obstacles(model) == obstacles
    if name == "stranger":
        assert "no config" in obstacles[0]
    elif _HEAD in _KINDS[kinds] and name in _HEADS_REFUSED:
        assert _HEADS_REFUSED[name] in obstacles[0]
    else:
        assert not obstacles
        _save(model, folders / f"{name}-{kinds}")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "jamba", "deepseek_v3"])
def test_each_expert_keeps_its_own(name: str) -> None:
    model = mixture(name)
    groups = [group for group in groups_of(model, (_ROW,)) if group.parts > 1]
    kept = kept_units(groups)
    for group in groups:
        chosen = kept[group.name].view(group.parts, -1) % group.width
        assert len({tuple(units.tolist()) for units in chosen}) > 1
    apply_pruning(model, PruningPlan.of(groups, kept))
    for group in groups:
        layout = fused_experts(model.get_submodule(group.name))
        assert layout is not None and layout.intermediate == len(kept[group.name]) // group.parts


def test_experts_that_keep_different_numbers_are_an_error() -> None:
    (group, *_) = groups_of(mixture("mixtral"), (_ROW,))
    units = torch.arange(group.width + 1)
    with pytest.raises(ValueError, match="each of its 4 experts must keep as many"):
        PruningPlan.of([group], {group.name: units})


_DEPTHS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 2}, {"first_k_dense_replace": 2}),
    ("glm4_moe", {"num_hidden_layers": 4}, {"first_k_dense_replace": 1}),
    ("qwen2_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3]}),
    ("qwen3_moe", {"num_hidden_layers": 5, "mlp_only_layers": [1, 3]}, {"mlp_only_layers": [1, 2]}),
    ("ernie_moe", {"num_hidden_layers": 5, "moe_layer_start_index": 2}, {"moe_layer_start_index": 2}),
    ("llama4", {"num_hidden_layers": 6, "interleave_moe_layer_step": 2}, {"moe_layers": [1, 2, 4]}),
    ("gpt_oss", {"num_hidden_layers": 4}, {}),
    ("mixtral", {"num_hidden_layers": 3}, {}),
]


@pytest.mark.parametrize(("name", "config", "rewritten"), _DEPTHS, ids=lambda value: str(value)[:12])
def test_layers_of_mixtures_and_dense_layers(
    name: str, config: dict[str, Any], rewritten: dict[str, Any], folders: Path
) -> None:
    model = mixture(name, **config)
    groups = groups_of(model, (_LAYER,))
    kept = kept_units(groups)
    plan = PruningPlan.of(groups, kept)
    masked = masked_copy(model, groups, kept)
    assert not vanilla_hf_obstacles(model, plan)
    apply_pruning(model, plan)
    torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=0, atol=1e-5)
    own: Any = model.config
    for key, value in rewritten.items():
        assert getattr(own, key) == value
    _save(model, folders / f"{name}-depth")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_has_the_names_of_the_hub(name: str, folders: Path) -> None:
    """Half of all weights zero, exported as `hf`: what `save_pretrained` writes, tensor by tensor."""
    model: Any = mixture(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape) < 0.5)
    ds_compress.export(model, folders / f"{name}-hf", format="hf", check=False)
    model.save_pretrained(folders / "stock")
    ours, stock = (load_file(folders / f / "model.safetensors") for f in (f"{name}-hf", "stock"))
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    names = [key for key in ours if ".experts." in key]
    is_fused = name in ("gpt_oss", "llama4", "granite_moe")
    assert any(".experts.3." in key for key in names) != is_fused
    _case(model, folders / f"{name}-hf")
    for file in (folders / "stock").iterdir():
        file.unlink()
    (folders / "stock").rmdir()


def test_a_fresh_process_loads_them_all(folders: Path) -> None:
    """The last one: stock transformers, in a process that has never heard of us."""
    saved = sorted(str(path) for path in folders.iterdir())
    if len(saved) < 60:
        pytest.skip("only with all the others")
    command = [sys.executable, "-c", _FRESH, *saved]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folders, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{len(saved)} loaded"


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    _case(model, folder)


def _case(model: Any, folder: Path) -> None:
    case = {"class": type(model).__name__, "inputs": tokens(), "logits": logits_of(model)}
    torch.save(case, folder / "case.pt")
