"""README.md of an export: what a hub reads of it, and that it says what the folder holds and how it loads."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from torch import nn

from ds_compress.api import export
from ds_compress.errors import ExportError
from ds_compress.export.load import from_pretrained
from ds_compress.export.model_card import card_data, read_fields, write_card
from ds_compress.export.report import ExportReport
from tests.quantized import quantized
from tests.zoo.models import ZOO

DYNAMIC = {"range_calibration": "dynamic"}
RESULT = {
    "task_type": "text-classification",
    "dataset_type": "glue",
    "dataset_name": "GLUE SST-2",
    "metric_type": "accuracy",
    "metric_value": 0.912,
}


def bert() -> nn.Module:
    return quantized(ZOO["bert_classifier"](), inputs=DYNAMIC, modules=("layer",))


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("format", ["hf", "compressed-tensors", "torch"])
def test_its_code_loads_the_folder_in_a_fresh_process(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "small"
    export(bert(), folder, format, check=False)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(folder).text, re.DOTALL)
    program = code.replace("path/of/this/folder", str(folder)) + "print(type(model).__name__)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith("BertForSequenceClassification")


def test_it_says_what_the_report_says(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    report = export(bert(), folder)
    text = card_of(folder).text.lstrip()
    assert text.startswith("# small\n")
    assert f"{report.bytes:,} bytes" in text and f"{report.sparsity:.1%}" in text
    assert report.check["verdict"] in text
    counts = [int(count.replace(",", "")) for count in re.findall(r"\(([\d,]+) parameters\)", text)]
    assert sum(counts) == report.parameters
    assert "int8, inputs int8 dynamic" in text


def test_a_hub_reads_its_head(tmp_path: Path) -> None:
    given = {"license": "mit", "base_model": "you/big", "tags": ["reviews"], "eval_results": [RESULT]}
    export(bert(), tmp_path / "small", check=False, card=given)
    data = card_of(tmp_path / "small").data
    assert (data.license, data.base_model, data.library_name) == ("mit", "you/big", "transformers")
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["reviews", "ds_compress", "compressed-tensors"]
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_name, data.model_name) == (0.912, "GLUE SST-2", "small")
    assert "| accuracy | 0.912 | GLUE SST-2 |" in card_of(tmp_path / "small").text


def test_what_is_given_goes_before_what_is_known(tmp_path: Path) -> None:
    export(bert(), tmp_path / "small", check=False, card={"library_name": "vllm", "model_name": "mine"})
    data = card_of(tmp_path / "small").data
    assert data.library_name == "vllm" and data.model_name == "mine"


@pytest.mark.parametrize(
    "card", [{"eval_results": [{"metric_type": "accuracy"}]}, {"eval_results": 3}, {"license": object()}]
)
def test_a_wrong_field_is_an_error_before_anything_is_written(tmp_path: Path, card: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=r"^card: .*ModelCardData"):
        export(bert(), tmp_path / "small", card=card)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("content", ["[mit]", "license: [mit", ""])
def test_a_file_without_fields_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "card.yaml").write_text(content)
    with pytest.raises(ExportError, match=r"^card: .*card\.yaml"):
        read_fields(tmp_path / "card.yaml")


def test_fields_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text("license: mit\ntags: [a]\n")
    (tmp_path / "card.json").write_text('{"license": "mit", "tags": ["a"]}')
    for name in ("card.yaml", "card.json"):
        assert read_fields(tmp_path / name) == {"license": "mit", "tags": ["a"]}


def test_an_edited_card_is_no_damage(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    export(bert(), folder, "torch", check=False)
    with open(folder / "README.md", "a") as file:
        file.write("\nTrained on reviews.\n")
    from_pretrained(folder)
    assert ExportReport.read(folder).format == "torch"


def test_a_served_model_is_not_saved_without_its_weights(tmp_path: Path) -> None:
    """transformers would write none of the integers, and say nothing."""
    export(bert(), tmp_path / "small", "torch", check=False)
    served = from_pretrained(tmp_path / "small")
    for save in (served.save_pretrained, served.push_to_hub):
        with pytest.raises(ExportError, match="upload_folder"):
            save(str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    copied = copy.deepcopy(served)
    with pytest.raises(ExportError, match="upload_folder"):
        copied.save_pretrained(tmp_path / "again")


def test_many_notes_are_cut(tmp_path: Path) -> None:
    report = ExportReport("", "hf", "BertModel", notes=[f"note number {n}" for n in range(25)])
    write_card(tmp_path, report, card_data(None, "hf", "BertModel", "x"), "x")
    text = (tmp_path / "README.md").read_text()
    assert "note number 19" in text and "note number 20" not in text and "and 5 more" in text
