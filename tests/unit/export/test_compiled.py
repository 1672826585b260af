"""A served model as a whole under torch.compile: one graph, with the logits that it has without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from tests.quantized import quantized
from tests.zoo.models import ZOO, inputs_of


@pytest.mark.parametrize("ranges", ["static", "dynamic"])
def test_an_encoder_of_integers_is_one_graph(ranges: str, tmp_path: Path) -> None:
    model = ZOO["bert_classifier"]()
    inputs = inputs_of(model)
    run = inputs if ranges == "static" else None
    quantized(model, 8, {"range_calibration": ranges}, ("layer",), run=run)
    ds_compress.export(model, tmp_path / "out", format="torch", embeddings="int8", check=False)
    served: Any = ds_compress.from_pretrained(tmp_path / "out")
    compiled: Any = torch.compile(served, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(**inputs).logits, served(**inputs).logits, rtol=1e-5, atol=1e-5)
