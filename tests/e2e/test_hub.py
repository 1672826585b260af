"""An export goes to a model hub by stock `huggingface_hub`, and is loaded from there by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ds_compress
from tests.hub import hub
from tests.quantized import quantized
from tests.zoo.models import ZOO

PROGRAM = """
from huggingface_hub import HfApi
api = HfApi(token="hf_of_a_test")
api.create_repo("me/small", exist_ok=True)
api.upload_folder(repo_id="me/small", folder_path="small")

import torch
from transformers import AutoModelForSequenceClassification

def logits(name):
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 10)[None]).logits

assert torch.equal(logits("me/small"), logits("./small"))
"""


@pytest.mark.parametrize(("format", "first"), [("compressed-tensors", ""), ("torch", "import ds_compress")])
def test_an_export_on_a_hub(tmp_path: Path, format: str, first: str) -> None:
    model = quantized(ZOO["bert_classifier"](), inputs={"range_calibration": "dynamic"}, modules=("layer",))
    folder = tmp_path / "small"
    ds_compress.export(model, folder, format, check=False)
    with hub() as at:
        online = {"HF_ENDPOINT": at.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", f"{first}\n{PROGRAM}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **online, **quiet},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        there, here = at.files["me/small"], {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: there[name] for name in here} == here
    assert "Bearer hf_of_a_test" in at.tokens
