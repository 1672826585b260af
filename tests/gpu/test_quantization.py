"""Quantization-aware training on a GPU: its kernels against plain torch, every ZeRO stage, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_compress.ops import library
from tests.gpu.runs import BLOCKS, assert_close, cached, engine_of, everything, run
from tests.multirank.common import batches, full_weights, train
from tests.multirank.training import QUANTIZATIONS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]


@pytest.mark.parametrize("layout", ["2 overlap", "3", "3 offload all"])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_stages_agree(name: str, layout: str) -> None:
    got, expected = cached(layout, f"quantized {name}"), cached("0", f"quantized {name}")
    assert_close(got, expected, 5e-4)
    assert got["losses"] != cached(layout, "plain")["losses"], "quantized in earnest"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast", "fp16"])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_kernels_give_what_plain_torch_gives(name: str, dtype: str) -> None:
    if library.from_environment():
        pytest.skip(f"{library.VARIABLE} is set")
    runs = [run("0", {**QUANTIZATIONS[name], "kernels": kernels}, dtype) for kernels in ("auto", "reference")]
    library.prefer(library.Preference.AUTO)
    if library.failure():
        pytest.skip(f"no native kernels here: {library.failure()}")
    # In 16 bits one value that rounds to the other side is a different run from then on.
    assert runs[0]["losses"] == pytest.approx(runs[1]["losses"], abs=1e-6 if dtype == "fp32" else 1e-2)
    for key, weight in runs[1]["weights"].items():
        if dtype == "fp32":
            torch.testing.assert_close(runs[0]["weights"][key], weight, rtol=0, atol=1e-5)
        elif weight.dim() > 1:
            assert float((runs[0]["weights"][key] - weight).abs().mean()) < 3e-4, key


@pytest.mark.parametrize("layout", ["0", "2 offload", "3", "3 offload all"])
@pytest.mark.parametrize("name", ["static", "stochastic", "learned", "everything", "topk"])
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(name: str, layout: str, tmp_path: Path) -> None:
    block: Any = {"everything": everything(), "topk": BLOCKS["sparse topk"]}.get(name) or QUANTIZATIONS[name]
    data, found = list(batches(5)), []
    for saves in (True, False):
        with engine_of(layout, block) as engine:
            if saves:
                train(engine, iter(data[:2]))
                engine.save_checkpoint(str(tmp_path))
            else:
                engine.load_checkpoint(str(tmp_path))
            losses = train(engine, iter(data[2:]))
            found.append((losses, full_weights(engine.module), engine.compression.metrics()))
    (losses, weights, metrics), (resumed, got, metrics_too) = found
    assert resumed == losses and metrics_too == metrics
    for key, weight in weights.items():
        assert torch.equal(got[key], weight), key
