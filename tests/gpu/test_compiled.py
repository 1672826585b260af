"""torch.compile with inductor around pruned and quantized training: as in eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.runs import BLOCKS, assert_same_zeros, engine_of
from tests.models import tiny_bert
from tests.multirank.common import batches, full_weights, train

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]


def one_layer() -> torch.nn.Module:
    return tiny_bert(layers=1)


def losses_of(layout: str, block: dict[str, Any] | None, dtype: str, compiles: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    with engine_of(layout, block, dtype, model=one_layer) as engine:
        if compiles:
            engine.compile(backend="inductor")
        losses = train(engine, batches(4))
        targets = engine.compression.techniques["sparse_pruning"].targets if block else {}
        weights = {name.replace("_orig_mod.", ""): w for name, w in full_weights(engine.module).items()}
        return {"losses": losses, "weights": weights, "targets": sorted(targets)}


@pytest.mark.parametrize(("layout", "dtype"), [("0", "fp32"), ("2", "bf16"), ("3", "bf16")])
def test_inductor(layout: str, dtype: str) -> None:
    block = BLOCKS["everything"]
    got, expected = (losses_of(layout, block, dtype, compiles) for compiles in (True, False))
    torch.testing.assert_close(
        got["losses"], expected["losses"], rtol=0, atol=1e-3 if dtype == "fp32" else 2e-2
    )
    assert_same_zeros(got, expected, 0.005)
