"""Structured pruning on a GPU: the model that is cut in the middle of training, and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from tests.gpu.runs import engine_of, structures
from tests.gpu.where import ON
from tests.models import tiny_bert
from tests.multirank.common import batches, train
from tests.multirank.structured import QUANTIZED, SPARSE, logits_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]

DTYPES = [
    ("0", "fp32"),
    ("2", "fp32"),
    ("3", "fp32"),
    ("0", "bf16"),
    ("2 offload", "bf16"),
    ("3 offload", "bf16"),
]


def four_layers() -> torch.nn.Module:
    return tiny_bert(layers=4)


def blocks(**shared: Any) -> dict[str, Any]:
    return {**structures(method="l1", **shared), **SPARSE, **QUANTIZED}


@pytest.mark.parametrize(("layout", "dtype"), [*DTYPES, ("2", "fp16"), ("3", "fp16")])
def test_a_shrink_in_the_middle_of_training(layout: str, dtype: str) -> None:
    """The losses after it are those of the model that is only masked."""
    losses, sizes = [], []
    for shrinks in (True, False):
        block = blocks(shrink_at_end_of_schedule=shrinks)
        with engine_of(layout, block, dtype, model=four_layers) as engine:
            losses.append(train(engine, batches(12 if dtype == "fp16" else 6)))
            sizes.append(sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()))
            assert all(p.device.type in (ON, "cpu") for p in engine.module.parameters())
    assert sizes[0] < 0.8 * sizes[1], sizes
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=5e-4 if dtype == "fp32" else 2e-2)


@pytest.mark.parametrize(("layout", "dtype"), DTYPES)
def test_finalized_is_what_was_masked(layout: str, dtype: str) -> None:
    with engine_of(layout, structures(method="l1"), dtype, model=four_layers) as engine:
        train(engine, batches(5))
        engine.eval()
        masked = logits_of(engine)
        final = ds_compress.finalize(engine)
        assert sum(p.numel() for p in final.parameters()) < 0.8 * sum(
            p.numel() for p in four_layers().parameters()
        )
        final = final.to(masked.device)
        tolerance = 1e-4 if dtype == "fp32" else 2e-2
        torch.testing.assert_close(logits_of(final), masked, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", ["0", "3", "2 offload"])
def test_a_checkpoint_of_a_shrunk_run(layout: str, tmp_path: Path) -> None:
    block, data = blocks(shrink_at_end_of_schedule=True), list(batches(8))
    with engine_of(layout, block, model=four_layers) as engine:
        train(engine, iter(data[:5]))
        engine.save_checkpoint(str(tmp_path))
        unbroken = train(engine, iter(data[5:]))
    with engine_of(layout, block, model=four_layers) as engine:
        engine.load_checkpoint(str(tmp_path))
        resumed = train(engine, iter(data[5:]))
    assert resumed == unbroken


@pytest.mark.parametrize("layout", ["0", "3"])
def test_back_to_a_checkpoint_from_before_the_shrink(layout: str, tmp_path: Path) -> None:
    block, data = blocks(shrink_at_end_of_schedule=True), list(batches(8))
    with engine_of(layout, block, model=four_layers) as engine:
        train(engine, iter(data[:1]))
        engine.save_checkpoint(str(tmp_path))
        first = train(engine, iter(data[1:]))
        engine.load_checkpoint(str(tmp_path))
        assert train(engine, iter(data[1:])) == first
