"""Stock `from_pretrained` on folders of format="torch": the same model with ds_compress imported, an error without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import ds_compress
from ds_compress.api import export
from ds_compress.export.inputs import run
from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.find import find_groups
from ds_compress.structure.prunable_group import GroupKind
from ds_compress.structure.pruning_plan import PruningPlan
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of

DYNAMIC = {"range_calibration": "dynamic"}
CASES: dict[str, tuple[int, dict[str, Any] | None, dict[str, Any]]] = {
    "bert_classifier": (8, DYNAMIC, {}),
    "distilbert": (4, DYNAMIC, {"quantization_type": "asymmetric"}),
    "llama": (3, None, {"granularity": "per_column_group", "group_size": 16}),
    "gpt2": (8, DYNAMIC, {}),
    "t5": (2, None, {}),
    "whisper": (1, DYNAMIC, {}),
    "vit": (8, DYNAMIC, {}),
    "modernbert": (4, DYNAMIC, {}),
    "resnet": (8, None, {}),
}


def stored(tmp_path: Path, model: nn.Module, **options: Any) -> Path:
    export(model, tmp_path / "out", "torch", check=False, **options)
    return tmp_path / "out"


def cut_heads() -> nn.Module:
    model = ZOO["bert_classifier"]()
    groups = find_groups(model, GroupKind.HEAD).groups
    apply_pruning(
        model, PruningPlan.of(groups, {g.name: torch.arange(2 + n % 2) for n, g in enumerate(groups)})
    )
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_as_our_own_loader_gives(tmp_path: Path, name: str) -> None:
    bits, inputs, shared = CASES[name]
    model = quantized(ZOO[name](), bits, inputs, **shared)
    folder = stored(tmp_path, model)
    loaded, info = getattr(hf, type(model).__name__).from_pretrained(folder, output_loading_info=True)
    given = inputs_of(model)
    assert torch.equal(run(loaded, given), run(ds_compress.from_pretrained(folder), given))
    assert not any(info.values()), info


def test_cuts_that_no_config_can_say(tmp_path: Path) -> None:
    model = cut_heads()
    folder = stored(tmp_path, model, embeddings="float")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.allclose(run(loaded, inputs_of(model)), run(model, inputs_of(model)), atol=1e-6)


def test_numbers_that_no_config_can_say(tmp_path: Path) -> None:
    model = ZOO["bert_classifier"]()
    for layer in model.get_submodule("bert.encoder.layer"):  # type: ignore[union-attr]
        layer.attention.self.scaling *= 2.0
    folder = stored(tmp_path, model, embeddings="float")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.allclose(run(loaded, inputs_of(model)), run(model, inputs_of(model)), atol=1e-6)
    assert "size" in _without_us(folder)


def test_the_base_model_of_a_model_with_a_head(tmp_path: Path) -> None:
    model = quantized(ZOO["bert_classifier"](), 4, DYNAMIC, ("layer",))
    folder = stored(tmp_path, model)
    base, given = hf.AutoModel.from_pretrained(folder), inputs_of(model)
    with torch.no_grad():
        expected = ds_compress.from_pretrained(folder).bert(**given).last_hidden_state
        assert torch.equal(base(**given).last_hidden_state, expected)


def test_a_head_over_a_base_model(tmp_path: Path) -> None:
    model = quantized(ZOO["bert_classifier"]().get_submodule("bert"), 4, DYNAMIC, ("layer",))
    folder = stored(tmp_path, model)
    loaded, info = hf.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    given: Any = inputs_of(model)
    with torch.no_grad():
        expected = ds_compress.from_pretrained(folder)(**given).last_hidden_state
        assert torch.equal(loaded.bert(**given).last_hidden_state, expected)
    assert {"classifier.weight", "classifier.bias"} <= set(info["missing_keys"])


def test_several_files(tmp_path: Path) -> None:
    model = quantized(ZOO["llama"](), 8, DYNAMIC)
    folder = stored(tmp_path, model, shard_bytes=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    given = inputs_of(model)
    assert torch.equal(run(loaded, given), run(ds_compress.from_pretrained(folder), given))


def test_what_it_cannot_do_is_an_error(tmp_path: Path) -> None:
    folder = stored(tmp_path, quantized(ZOO["bert_classifier"](), 8, DYNAMIC))
    with pytest.raises(ValueError, match="float32"):
        hf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="CPU"):
        hf.AutoModelForSequenceClassification.from_pretrained(folder, device_map={"": "cuda:0"})
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("embeddings", ["int8", "float"])
@pytest.mark.parametrize("name", ["bert_classifier", "t5"])
def test_without_us_transformers_refuses(tmp_path: Path, name: str, embeddings: str) -> None:
    modules = ("layer", "block") if embeddings == "float" else ("classifier", "lm_head")
    model = quantized(ZOO[name](), 4, None, modules[:1] if name == "bert_classifier" else modules[1:])
    error = _without_us(stored(tmp_path, model, embeddings=embeddings), type(model).__name__)
    assert "size" in error and "ds_compress" in error


@pytest.mark.parametrize(
    "imports",
    [
        "import ds_compress, transformers",
        "import transformers, ds_compress",
        "from transformers import AutoModelForSequenceClassification\nimport ds_compress, transformers",
        "import transformers.quantizers, ds_compress, importlib; importlib.reload(ds_compress)",
    ],
)
def test_whichever_is_imported_first(tmp_path: Path, imports: str) -> None:
    model = quantized(ZOO["bert_classifier"](), 8, DYNAMIC)
    folder = stored(tmp_path, model)
    program = (
        f"{imports}\nfrom ds_compress.export.inputs import run\n"
        f"model = transformers.AutoModelForSequenceClassification.from_pretrained({str(folder)!r})\n"
        f"own = ds_compress.from_pretrained({str(folder)!r})\n"
        "import torch\nx = {'input_ids': torch.arange(3, 19)[None]}\n"
        "assert torch.equal(run(model, x), run(own, x))\n"
    )
    process = _python(program)
    assert process.returncode == 0, process.stderr[-2000:]


def test_transformers_is_not_imported_for_it() -> None:
    process = _python("import sys, ds_compress\nassert 'transformers' not in sys.modules")
    assert process.returncode == 0, process.stderr[-2000:]


def _without_us(folder: Path, cls: str = "AutoModelForSequenceClassification") -> str:
    process = _python(f"import transformers\ntransformers.{cls}.from_pretrained({str(folder)!r})")
    assert process.returncode == 1
    return process.stderr


def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ)
    )
