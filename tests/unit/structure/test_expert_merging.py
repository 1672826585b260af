"""Which experts are merged, and into what."""

from __future__ import annotations

import torch

from ds_compress.structure.expert_merging import clusters, merge_weights, merged

ROUTER = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 0.1], [-1.0, 0.1], [0.1, 9.0]])


def test_each_goes_to_the_kept_one_with_the_most_similar_row() -> None:
    """By direction, not by length, and a kept one stays itself."""
    assert clusters(ROUTER, torch.tensor([0, 1])).tolist() == [0, 1, 0, 1, 1]
    assert clusters(ROUTER, torch.tensor([0, 2])).tolist() == [0, 2, 2, 2, 2]


def test_members_count_by_their_tokens() -> None:
    heads = torch.tensor([0, 1, 0, 1, 1])
    shares = merge_weights(heads, torch.tensor([30, 0, 10, 0, 0]))
    assert shares.tolist() == [
        0.75,
        1,
        0.25,
        0,
        0,
    ]  # nobody in the second cluster saw a token: its head stays


def test_the_average_of_a_cluster() -> None:
    experts = torch.arange(5.0).view(5, 1, 1).expand(5, 2, 3).contiguous()
    heads, shares = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0.75, 1, 0.25, 0, 0], dtype=torch.float64)
    after = merged(experts, heads, shares)
    assert after[:, 0, 0].tolist() == [0.5, 1, 2, 3, 4]
    assert experts[0, 0, 0] == 0
