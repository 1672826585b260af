"""What hooks record, and when."""

from __future__ import annotations

import torch
from torch import nn

from ds_compress.distill.activation_capture import ActivationCapture


def test_nothing_is_recorded_outside_the_window() -> None:
    layer = nn.Linear(2, 2)
    recorder = ActivationCapture([layer], [0], {"hidden"})
    recorder.start()
    layer(torch.ones(1, 2))
    assert len(recorder.finish().hidden) == 1
    layer(torch.ones(1, 2))
    assert recorder.finish().hidden == []
