"""What is sent uncompressed beside quantized gradients, and what that and the ends of blocks cost in bytes."""

from __future__ import annotations

import pytest
import torch

from ds_compress.ops.sizes import payload_bytes
from ds_compress.reduce.codec import BlockCodec
from ds_compress.reduce.slices import Segment, Slices, packed, packed_numel, unpack
from ds_compress.reduce.uncompressed import is_sent_uncompressed

MODELS = ("minilm", "bert", "llama")


def shapes(model: str) -> list[torch.Size]:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        if model == "llama":
            config = LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
            made: torch.nn.Module = LlamaForCausalLM(config)
        elif model == "minilm":
            made = BertModel(
                BertConfig(
                    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
                )
            )
        else:
            made = BertModel(BertConfig())
    return [p.shape for p in made.parameters()]


@pytest.mark.parametrize("owners", [1, 2, 8])
@pytest.mark.parametrize(("bits", "block"), [(8, 512), (4, 128)])
@pytest.mark.parametrize("model", MODELS)
def test_the_bytes_of_a_step_hardly_change(model: str, bits: int, block: int, owners: int) -> None:
    """Against one payload of everything; each parameter in equal slices for the owners, as at stage 3."""
    found, elements = 0.0, 0
    for shape in shapes(model):
        numel = shape.numel()
        elements += numel
        if is_sent_uncompressed(shape):
            found += (
                2 * 2 * numel
            )  # an all-reduce of 16-bit numbers sends nearly twice what a reduce-scatter does
        else:
            found += owners * payload_bytes(-(-numel // owners), bits, block)
    assert found < 1.015 * payload_bytes(elements, bits, block)


@pytest.mark.parametrize(
    ("shape", "exactly"),
    [
        ((), True),
        ((100_000,), True),
        ((1, 1, 100_000), True),
        ((64, 1, 1), True),
        ((2, 64), True),
        ((31, 33), True),
        ((32, 32), False),
        ((2, 100_000), False),
        ((8, 3, 7, 7), False),
    ],
)
def test_small_and_one_dimensional_parameters_travel_exactly(shape: tuple[int, ...], exactly: bool) -> None:
    assert is_sent_uncompressed(shape) is exactly


def test_no_parameter_is_rounded_in_the_steps_of_another() -> None:
    """Every size of gradients from 1 to 1e-30, side by side: each arrives within half a step of its own."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2000 + 77 * i, generator=generator) * 10.0**-i for i in range(30)]
    for bits, block in ((8, 512), (4, 128)):
        codec = BlockCodec(bits, block)
        slices = Slices([Segment(t, 0) for t in tensors], 1, 8 * block, block)
        arrived: dict[int, list[torch.Tensor]] = {}
        for chunk in range(slices.chunks):
            parts = slices.parts(0, chunk)
            payload = torch.empty(codec.payload_bytes(packed_numel(parts)), dtype=torch.uint8)
            codec.encode(packed(parts), payload)
            read = torch.empty(packed_numel(parts))
            codec.decode(payload, read)
            for part, values in zip(parts, unpack(read, parts), strict=True):
                arrived.setdefault(id(part.segment.values), []).append(values.clone())
        for tensor in tensors:
            read = torch.cat(arrived[id(tensor)])
            steps = 127 if bits == 8 else 7
            assert float((read - tensor).abs().max()) <= 0.501 * float(tensor.abs().max()) / steps
