"""Every architecture x every kind of structure: cut equals masked; stock transformers loads it, or we say why not."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from ds_compress.structure.pruning_plan import PruningPlan
from ds_compress.structure.vanilla_hf import vanilla_hf_obstacles
from tests.zoo.masked import kept_units, masked_copy
from tests.zoo.models import ZOO, inputs_of, logits_of

_ROW, _HEAD, _LAYER, _HIDDEN, _CHANNEL = (
    GroupKind.ROW,
    GroupKind.HEAD,
    GroupKind.LAYER,
    GroupKind.HIDDEN,
    GroupKind.CHANNEL,
)
_TOLERANCE = (
    3e-5  # fp32 logits of a few units; smaller products are summed in another order, which depends on the CPU
)
_TRANSFORMERS = [name for name in ZOO if name not in ("resnet", "cnn")]
_EXACT_HIDDEN = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "olmo2",
    "smollm3",
    "glm",
    "granite",
    "llama_untied",
}
_HEADS_IN_CONFIG = {"t5", "t5_gated", "vit", "gemma2", "gemma3", "phi"} | _EXACT_HIDDEN
"""Where stock transformers says the size of a head apart from their number."""
_CASES = [(name, (kind,)) for name in ZOO for kind in GroupKind if kind is not GroupKind.EXPERT] + [
    (name, (_ROW, _HEAD, _LAYER, _HIDDEN)) for name in _TRANSFORMERS
]

_FRESH = """
import sys, torch, transformers
worst = 0.0
for folder in sys.argv[1:]:
    case = torch.load(folder + "/case.pt", weights_only=True)
    model = getattr(transformers, case["class"]).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**case["inputs"]).logits
    error = float((logits - case["logits"]).abs().max())
    assert error < 1e-5, f"{folder}: {error}"
assert not [name for name in sys.modules if name.startswith(("ds_compress", "tests"))]
print(len(sys.argv) - 1, "loaded")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut")


@pytest.mark.parametrize(
    ("name", "kinds"), _CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_cut_equals_masked_and_reloads(name: str, kinds: Sequence[GroupKind], folders: Path) -> None:
    model = ZOO[name]()
    for position, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(position % 3 != 0)
    groups = _found(model, name, kinds)
    if not groups:
        return
    kept = kept_units(groups)
    pruning_plan = PruningPlan.of(groups, kept)
    masked, original = masked_copy(model, groups, kept), copy.deepcopy(model)
    obstacles = vanilla_hf_obstacles(model, pruning_plan)
    ties, flags = _ties(model), {n: p.requires_grad for n, p in model.named_parameters()}

    apply_pruning(model, pruning_plan)

    expected = logits_of(masked)
    assert (logits_of(original) - expected).abs().max() > 0.01, "the mask changes nothing"
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=_TOLERANCE)
    assert _size(model) < _size(original)
    assert _ties(model) == ties
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        renamed: flag for n, flag in flags.items() if (renamed := pruning_plan.renamed(n)) is not None
    }
    _check_streaming(original, model, pruning_plan)
    _check_rebuilding(original, model, pruning_plan)
    assert vanilla_hf_obstacles(model) == obstacles
    if obstacles:
        assert any(_names_a_module(original, text) for text in obstacles), obstacles
        assert name in ("resnet", "cnn") or (_HEAD in kinds and name not in _HEADS_IN_CONFIG), obstacles
    else:
        _save(model, folders / f"{name}-{'-'.join(kinds)}")


def test_a_fresh_process_loads_them_all(folders: Path) -> None:
    """The last one: stock transformers, in a process that has never heard of us."""
    saved = sorted(str(path) for path in folders.iterdir())
    if len(saved) < 60:
        pytest.skip("only with all the others")
    command = [sys.executable, "-c", _FRESH, *saved]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folders, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{len(saved)} loaded"


def _found(model: nn.Module, name: str, kinds: Sequence[GroupKind]) -> list[PrunableGroup]:
    """Structures of all `kinds`; checks that each kind is there, or refused by name where it should be."""
    groups: list[PrunableGroup] = []
    for kind in kinds:
        found = find_groups(model, kind)
        if kind is _CHANNEL:
            expected = name in ("resnet", "cnn")
            assert expected or not found.groups
        elif kind is _HIDDEN:
            expected = name in _EXACT_HIDDEN
            assert expected or "hidden size cannot be cut exactly" in found.unsupported[0].reason
        else:
            expected = name in _TRANSFORMERS
        assert bool(found.groups) == expected
        assert not (expected and found.unsupported), found.unsupported
        groups += found.groups
    assert len({group.name for group in groups}) == len(groups)
    return groups


def _check_streaming(original: nn.Module, model: nn.Module, pruning_plan: PruningPlan) -> None:
    """Tensor by tensor by name is the same as the whole model at once."""
    streamed = PruningPlan.of(pruning_plan.groups, pruning_plan.kept, original)
    result = model.state_dict()
    seen = set()
    for name, tensor in original.state_dict().items():
        renamed = streamed.renamed(name)
        if renamed is not None:
            seen.add(renamed)
            assert torch.equal(streamed.prune_tensor(name, tensor), result[renamed])
            assert streamed.shape_of(name, tensor.shape) == tuple(result[renamed].shape)
    assert seen == set(result)


def _check_rebuilding(original: nn.Module, model: nn.Module, pruning_plan: PruningPlan) -> None:
    """A skeleton of the model before the cut, cut alike, is the cut model without its weights."""
    if hasattr(original, "config"):
        with torch.device("meta"):
            meta_model = type(original)(copy.deepcopy(original.config)).eval()
    else:
        meta_model = copy.deepcopy(original).to("meta")
    apply_pruning(meta_model, pruning_plan, meta=True)
    for name, buffer in model.named_buffers():
        # As from_pretrained does for those that are not saved.
        owner, _, key = name.rpartition(".")
        meta_model.get_submodule(owner)._buffers[key] = buffer
    meta_model.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(logits_of(meta_model), logits_of(model), rtol=0, atol=0)


def _save(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]
    logits = logits_of(model)
    case = {"class": type(model).__name__, "inputs": inputs_of(model), "logits": logits}
    torch.save(case, folder / "case.pt")
    reloaded = type(model).from_pretrained(folder).eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(logits_of(reloaded), logits, rtol=0, atol=_TOLERANCE)
    assert isinstance(reloaded, nn.Module) and _size(reloaded) == _size(model)


def _ties(model: nn.Module) -> int:
    return len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.named_parameters()))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _names_a_module(model: nn.Module, text: str) -> bool:
    words = re.split(r"[\s,]+", text)
    names = dict(model.named_modules())
    has_config = "has no config" in text
    return has_config or any(
        word in names or word.rpartition(".")[0] in names for word in words if "." in word
    )
