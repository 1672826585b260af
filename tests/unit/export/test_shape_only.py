"""Who reads the weight of a served layer gets its shape and dtype, or an error; never memory that nobody wrote."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import ds_compress
from ds_compress.errors import ExportError
from ds_compress.export.shape_only import ShapeOnly
from tests.zoo.mixtures import mixture, tokens


def test_what_models_ask_for() -> None:
    weight = ShapeOnly.of(3, 5)
    assert weight.shape == (3, 5) and weight.size(0) == 3 and weight.dim() == 2 and weight.numel() == 15
    assert weight.dtype is torch.float32 and weight.device.type == "meta" and weight.is_floating_point()
    assert len(weight) == 3


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w @ torch.ones(5),
        lambda w: torch.nn.functional.linear(torch.ones(5), w),
        lambda w: w.to(torch.float16),
        lambda w: w + 1,
        lambda w: w[0],
        lambda w: w.t(),
        lambda w: copy.deepcopy(w),
    ],
)
def test_anything_else_is_an_error(use: object) -> None:
    assert callable(use)
    with pytest.raises(RuntimeError, match="activations=False"):
        use(ShapeOnly.of(3, 5))


def test_a_model_that_reads_past_the_layer_is_refused(tmp_path: Path) -> None:
    """Jamba's mixer multiplies by `dt_proj.weight` itself; training quantized refuses it at the first step."""
    with pytest.raises(ExportError, match="reads the weight past the layer"):
        ds_compress.export(
            mixture("jamba"), tmp_path / "x", "torch", scheme="W8A8", inputs={"input_ids": tokens()}
        )
    assert not (tmp_path / "x").exists()
