"""Attention of short sequences in plain torch; its kernel lies in `csrc/cpu/attention`."""

from __future__ import annotations

import torch

from ds_compress.ops.attention_checks import check_attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """softmax(scale query @ key.T + mask) @ value, for each head, computed in fp32.

    query (batch, heads, queries, width), key (batch, groups, keys, width), value (batch, groups, keys, value width):
    fp32, bf16 or fp16, of any strides; heads / groups heads share their keys and values (grouped-query attention,
    arXiv:2305.13245). mask: (batch or 1, heads or 1, queries or 1, keys), fp32 to be added, or bool, True where a key
    counts. is_causal: query i attends to the keys up to i. A query with no key that counts gives 0; one with a NaN, or
    an Inf among its scores, gives NaN.

    Returns (batch, queries, heads, value width) in the dtype of query: heads beside each other, for the product that
    follows.

    Raises:
        ValueError: wrong dtypes or shapes.

    >>> query, value = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0], [3.0]]]])
    >>> F.attention(query, torch.zeros(1, 1, 2, 2), value, scale=1.0)
    tensor([[[[2.]]]])
    """
    check_attention(query, key, value, mask)
    shared = query.shape[1] // key.shape[1]
    keys, values = (t.float().repeat_interleave(shared, 1) for t in (key, value))
    scores = (query.float() * scale) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    if is_causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(unseen, -torch.inf)
    nothing = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    largest = torch.cat([nothing, scores], -1).amax(-1, keepdim=True)
    powers = (scores - torch.where(largest == -torch.inf, 0.0, largest)).exp()
    sums = powers.sum(-1, keepdim=True)
    y = (powers @ values) * torch.where(sums == 0, 0.0, 1 / sums)
    return y.transpose(1, 2).to(query.dtype).contiguous()
