"""Models with a lazy head, and what they are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ds_compress.config.schema.distillation import LogitsLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.lazy_head import LazyHead
from ds_compress.distill.lm_head import lazy_head
from ds_compress.distill.losses.logits import LogitsDistillation
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.quantized import quantized

VOCABULARY = 61


BATCH = 3


TOKENS = 9


ROWS = BATCH * TOKENS


ALL_IN_ONE = 1000


TINY = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}


NO_PADDING = {"intermediate_size": 24, "pad_token_id": None}


SMALL = {**TINY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def llama(tied: bool = False, **changed: Any) -> nn.Module:
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "key_value_heads": 1, "intermediate": 24}
    return tiny_llama(None, **sizes, tied=tied, vocab_size=VOCABULARY, pad_token_id=None, **changed)


def gpt2() -> nn.Module:
    return tiny_gpt2(None, layers=1, vocab_size=VOCABULARY, n_positions=32)


def bert() -> nn.Module:
    model = tiny_bert(None, head="ForMaskedLM", layers=1, hidden=16, heads=2, **TINY, **NO_PADDING)
    nn.init.normal_(model.cls.predictions.decoder.bias)
    return model


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    # A cap that bends these small logits.
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05, pad_token_id=None
        )
    )


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    model = BartForConditionalGeneration(BartConfig(**TINY, d_model=16, dropout=0.0, **sides))
    model.final_logits_bias.normal_()
    return model


def quantized_head() -> nn.Module:
    return quantized(llama(), bits=4, modules=("lm_head",))


def learned_head() -> nn.Module:
    return quantized(
        llama(),
        bits=4,
        modules=("lm_head",),
        learned_scale=True,
        quantization_type="symmetric",
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "bert": bert,
    "gemma2": gemma2,
    "bart": bart,
    "quantized head": quantized_head,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batch_of(rows: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, ::4] = -100
    return {"input_ids": ids, "labels": labels}


def teacher_logits(rows: int = BATCH) -> torch.Tensor:
    return torch.randn(rows, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(2))


KD = LogitsDistillation(LogitsLoss(temperature=2.0))


@contextlib.contextmanager
def lazy(model: nn.Module, chunk: int, theirs: torch.Tensor | None = None) -> Iterator[LazyHead]:
    """The head of `model` is lazy inside, its imitation of `theirs` waiting as in a training forward."""
    head = lazy_head(model, chunk)
    assert head is not None
    head.is_on = True
    head.pending_loss = None if theirs is None else KD.pending_loss(CapturedActivations(logits=theirs), None)
    try:
        yield head
    finally:
        head.remove()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def plain_run(
    model: nn.Module, batch: dict[str, torch.Tensor], theirs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(**batch)
    return output.loss, KD(CapturedActivations(logits=output.logits), CapturedActivations(logits=theirs))


def plain_and_lazy(name: str = "llama") -> tuple[torch.Tensor, Any, Any]:
    """Real logits, the lazy ones of the same inputs, and what takes the hooks away."""
    model, batch = made(name), batch_of()
    real = model(input_ids=batch["input_ids"]).logits
    stack = contextlib.ExitStack()
    stack.enter_context(lazy(model, 7))
    return real, model(input_ids=batch["input_ids"]).logits, stack
