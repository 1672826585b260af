"""An exported folder in a process that imports transformers and compressed_tensors only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from ds_compress.api import export
from tests.floats import model_of, quantized_to
from tests.quantized import quantized
from tests.zoo.models import ZOO

PROGRAM = """
import sys, torch, transformers
import compressed_tensors
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1])
out = model(input_ids=torch.arange(1, 9).view(1, 8)).logits
assert out.isfinite().all() and not {"ds_compress", "deepspeed"} & set(sys.modules)
ids = model.generate(torch.arange(1, 5).view(1, 4), max_new_tokens=4, do_sample=False)
print(tuple(ids.shape))
"""


def integers() -> nn.Module:
    return quantized(ZOO["llama_untied"](), 8, {"range_calibration": "dynamic"}, ("mlp", "self_attn"))


def mixed_floats() -> nn.Module:
    return quantized_to(quantized_to(model_of("llama"), "FP8", ("self_attn",)), "NVFP4", ("mlp",))


@pytest.mark.parametrize("build", [integers, mixed_floats])
def test_stock_process_loads_and_generates(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    model = build()
    report = export(model, tmp_path / "out")
    assert "lm_head" not in {name for name, module in report.modules.items() if "scheme" in module}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.strip().endswith("(1, 8)")
