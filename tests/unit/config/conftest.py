"""Models that plans are made for."""

from __future__ import annotations

import pytest
from torch import nn

from tests.models import tiny_bert, tiny_gpt2


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return tiny_bert(
        layers=6, hidden=16, heads=2, intermediate_size=32, vocab_size=40, max_position_embeddings=8
    )


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return tiny_gpt2(n_positions=8, bos_token_id=0, eos_token_id=0)
