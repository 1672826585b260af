"""Contrastive losses, attention maps, schedules and conflicts of distillation, each against what defines it."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.config import parse_config
from ds_compress.config.schema.distillation import AttentionLoss, ContrastiveLoss, LogitsLoss
from ds_compress.distill.activation_capture import ActivationCapture, CapturedActivations
from ds_compress.distill.attention_scores import expose_scores, hide_scores
from ds_compress.distill.losses.attention import MapDistillation
from ds_compress.distill.losses.base import ModelPair
from ds_compress.distill.losses.contrastive import ContrastiveDistillation
from tests.models import tiny_bert, tiny_llama
from tests.multirank.common import ds_config
from tests.single import init_single_process
from tests.unit.config.schema.test_compression_training import only_problem_of

WIDTHS = (6, 10)
SMALL = {"vocab_size": 61, "max_position_embeddings": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


# --- contrastive --------------------------------------------------------------------------------------------


def contrastive(**settings: Any) -> ContrastiveDistillation:
    torch.manual_seed(0)
    return ContrastiveDistillation(
        ContrastiveLoss(**{"dimension": 5, "temperature": 0.2, **settings}), ModelPair(WIDTHS)
    )


def pooled(examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, WIDTHS[0], generator=generator), torch.randn(
        examples, WIDTHS[1], generator=generator
    )


def cosine(loss: ContrastiveDistillation, own: torch.Tensor, theirs: torch.Tensor) -> float:
    sides = []
    for side, vector in (("student", own), ("teacher", theirs)):
        matrix: Any = loss.module[side]
        sides.append(matrix.weight.double() @ vector.double() + matrix.bias.double())
    a, b = sides
    return float((a @ b) / a.norm() / b.norm())


def exact_infonce(loss: ContrastiveDistillation, own: Any, candidates: Any, temperature: float) -> float:
    total = 0.0
    for i, student in enumerate(own):
        exponentials = [math.exp(cosine(loss, student, teacher) / temperature) for teacher in candidates]
        total -= math.log(exponentials[i] / sum(exponentials))
    return total / len(own)


def exact_crd(
    loss: ContrastiveDistillation, own: Any, candidates: Any, temperature: float, examples: int
) -> float:
    total, negatives = 0.0, len(candidates) - 1
    for i, student in enumerate(own):
        for j, teacher in enumerate(candidates):
            e = math.exp(cosine(loss, student, teacher) / temperature)
            h = e / (e + negatives / examples)
            total -= math.log(h if i == j else 1 - h)
    return total / len(own)


@pytest.mark.parametrize("kind", ["infonce", "crd"])
def test_contrastive_losses_of_batches_of_two_sizes_and_a_queue(kind: str) -> None:
    extra = {"examples": 50} if kind == "crd" else {}
    loss = contrastive(kind=kind, queue=6, **extra)
    remembered = torch.empty(0, WIDTHS[1])
    for step, examples in enumerate((3, 5, 2, 4)):
        own, theirs = pooled(examples, step)
        candidates = torch.cat([theirs, remembered])
        expected = (
            exact_infonce(loss, own, candidates, 0.2)
            if kind == "infonce"
            else exact_crd(loss, own, candidates, 0.2, 50)
        )
        assert float(loss(CapturedActivations(last=own), CapturedActivations(last=theirs))) == pytest.approx(
            expected, rel=1e-4
        )
        # Newest first, and no more than six.
        remembered = candidates[:6]
        torch.testing.assert_close(loss.state_dict()["queue"], remembered)


def test_the_queue_comes_back_from_its_state() -> None:
    one, other = contrastive(queue=6), contrastive(queue=6)
    for step in range(3):
        own, theirs = pooled(4, step)
        one(CapturedActivations(last=own), CapturedActivations(last=theirs))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    own, theirs = pooled(4, 9)
    a, b = (loss(CapturedActivations(last=own), CapturedActivations(last=theirs)) for loss in (one, other))
    fresh = contrastive(queue=6)(CapturedActivations(last=own), CapturedActivations(last=theirs))
    assert torch.equal(a, b) and not torch.equal(a, fresh)


def test_nothing_is_remembered_without_a_queue_nor_while_evaluating() -> None:
    own, theirs = pooled(4, 0)
    none, evaluated = contrastive(queue=0), contrastive(queue=6)
    evaluated.module.eval()
    for loss in (none, evaluated):
        loss(CapturedActivations(last=own), CapturedActivations(last=theirs))
        assert loss.state_dict()["queue"] is None


@pytest.mark.parametrize("kind", ["infonce", "crd"])
def test_gradients_reach_both_projections_and_the_student_only(kind: str) -> None:
    loss = contrastive(kind=kind, **({"examples": 50} if kind == "crd" else {}))
    own, theirs = (x.requires_grad_() for x in pooled(4, 0))
    loss(CapturedActivations(last=own), CapturedActivations(last=theirs)).backward()
    assert own.grad is not None and own.grad.any() and theirs.grad is None
    assert all(p.grad is not None and p.grad.any() for p in loss.module.parameters())


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_represents_the_same_example(pooling: str, side: str) -> None:
    lengths, longest = (2, 4, 3), 5
    generator = torch.Generator().manual_seed(0)
    examples = [[torch.randn(length, width, generator=generator) for width in WIDTHS] for length in lengths]
    of = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1]}[pooling]
    own, theirs = (torch.stack([of(example[s]) for example in examples]) for s in (0, 1))
    expected = contrastive(pooling=pooling)(CapturedActivations(last=own), CapturedActivations(last=theirs))
    padded = [torch.full((len(lengths), longest, width), 7.0) for width in WIDTHS]
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(longest - length, longest)
        mask[row, where] = True
        for target, values in zip(padded, examples[row], strict=True):
            target[row, where] = values
    loss = contrastive(pooling=pooling)
    got = loss(CapturedActivations(last=padded[0], token_mask=mask), CapturedActivations(last=padded[1]))
    torch.testing.assert_close(got, expected)


# --- attention maps -----------------------------------------------------------------------------------------


def bert(heads: int = 4) -> nn.Module:
    return tiny_bert(hidden=16, heads=heads, head="Model", intermediate_size=24, vocab_size=61)


def llama() -> nn.Module:
    return tiny_llama(hidden=16, intermediate=24, tied=False, head="Model", vocab_size=61)


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    # A cap that bends these small scores, and a window that is narrower than the text.
    return Gemma2Model(
        Gemma2Config(
            **SMALL,
            hidden_size=16,
            intermediate_size=24,
            num_key_value_heads=2,
            head_dim=4,
            attn_logit_softcapping=0.02,
            query_pre_attn_scalar=1,
            sliding_window=4,
            initializer_range=0.5,
        )
    )


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def layers_of(model: Any) -> Any:
    return model.encoder.layer if hasattr(model, "encoder") else model.layers


def recorded(model: nn.Module) -> CapturedActivations:
    layers = layers_of(model)
    recorder = ActivationCapture(list(layers), range(len(layers)), {"maps"})
    recorder.start()
    model(**tokens())
    record = recorder.finish()
    recorder.remove()
    return record


@pytest.mark.parametrize("make", [bert, llama])
def test_scores_are_those_behind_the_models_own_probabilities(make: Any) -> None:
    """Eager attention shows its probabilities: the softmax of our scores, masked."""
    model = make()
    model.set_attn_implementation("eager")
    probabilities = model(**tokens(), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    expose_scores(model)
    record = recorded(model)
    assert len(record.maps) == len(probabilities) == 2
    allowed = tokens()["attention_mask"].bool()[:, None, None, :].expand(2, 1, 7, 7)
    for scores, expected in zip(record.maps, probabilities, strict=True):
        assert scores.is_causal == (make is llama)
        visible = allowed & torch.ones(7, 7, dtype=torch.bool).tril() if scores.is_causal else allowed
        got = scores.scores().masked_fill(~visible, -math.inf).softmax(-1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# SDPA has no soft caps, so Gemma 2 has only one kernel here.
@pytest.mark.parametrize(
    ("make", "kernel"),
    [(bert, "eager"), (bert, "sdpa"), (llama, "eager"), (llama, "sdpa"), (gemma2, "eager")],
)
def test_a_model_whose_scores_are_shown_says_what_it_said(make: Any, kernel: str) -> None:
    model = make()
    model.set_attn_implementation(kernel)
    expected = model(**tokens()).last_hidden_state
    expose_scores(model)
    expose_scores(model)
    real = tokens()["attention_mask"].bool()
    torch.testing.assert_close(model(**tokens()).last_hidden_state[real], expected[real])


def test_map_loss_is_the_mean_square_over_pairs_that_may_attend() -> None:
    model, teacher = llama(), llama()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        expose_scores(teacher)
        theirs = recorded(teacher)
    expose_scores(model)
    own = recorded(model)
    own.token_mask = tokens()["attention_mask"].bool()
    squares = []
    for a, b in zip(own.maps, theirs.maps, strict=True):
        errors = (a.scores().double() - b.scores().double()) ** 2
        of_layer = [
            errors[row, :, i, j].mean()
            for row, length in enumerate((7, 5))
            for i in range(length)
            for j in range(i + 1)
        ]
        squares.append(torch.stack(of_layer).mean())
    got = MapDistillation(AttentionLoss(kind="maps"))(own, theirs)
    assert float(got) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-4)
    got.backward()
    attention = model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        assert projection.weight.grad is not None and projection.weight.grad.any()
    assert attention.v_proj.weight.grad is None or not attention.v_proj.weight.grad.any()
    assert model.layers[0].self_attn.v_proj.weight.grad.any()


def test_the_config_of_a_model_never_mentions_us(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)  # it puts the name of the class and the dtype into the config
    before = model.config.to_dict()
    kernel = model.config._attn_implementation
    expose_scores(model)
    model.save_pretrained(tmp_path)
    assert "ds_compress" not in (tmp_path / "config.json").read_text()
    hide_scores(model)
    assert model.config.to_dict() == before and model.config._attn_implementation == kernel
    model.save_pretrained(tmp_path)
    assert "ds_compress" not in (tmp_path / "config.json").read_text()


def test_detaching_gives_student_and_teacher_their_kernels_back() -> None:
    init_single_process()
    student, teacher = bert(), bert()
    block = {"distillation": {"enabled": True, "losses": {"attention": {"kind": "maps"}}}}
    engine, *_ = ds_compress.initialize(
        model=student, model_parameters=student.parameters(), config=ds_config(0, block), teacher=teacher
    )
    assert "ds_compress" in student.config._attn_implementation
    engine.compression.detach()
    for model in (student, teacher):
        assert model.config._attn_implementation == "sdpa"
    engine.destroy()


def test_unequal_heads_are_refused_with_what_to_do() -> None:
    init_single_process()
    student = bert()
    block = {"distillation": {"enabled": True, "losses": {"attention": {"kind": "maps"}}}}
    with pytest.raises(ds_compress.ConfigError, match='use "kind": "relation"') as caught:
        ds_compress.initialize(
            model=student,
            model_parameters=student.parameters(),
            config=ds_config(0, block),
            teacher=bert(heads=2),
        )
    (problem,) = caught.value.problems
    assert problem.path == "compression_training.distillation.losses.attention.kind"


def test_a_model_without_exchangeable_kernels_is_refused() -> None:
    with pytest.raises(ds_compress.ConfigError, match='"maps" with a Linear'):
        expose_scores(nn.Linear(2, 2))


# --- schedules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weight": 2.0}, [2.0, 2.0, 2.0, 2.0, 2.0]),
        ({"weight": 1.0, "final_weight": 0.0, "schedule_offset_end": 4}, [1.0, 0.75, 0.25, 0.0, 0.0]),
        ({"weight": 0.0, "final_weight": 3.0, "schedule_offset_end": 3}, [0.0, 1.0, 3.0, 3.0, 3.0]),
        (
            {"weight": 1.0, "final_weight": 2.0, "schedule_offset": 3, "schedule_offset_end": 5},
            [1.0, 1.0, 1.0, 1.5, 2.0],
        ),
    ],
)
def test_factors_move_linearly_between_their_steps(settings: dict[str, Any], expected: list[float]) -> None:
    loss = LogitsLoss(**settings)
    assert [loss.weight_at(step) for step in (0, 1, 3, 4, 500)] == pytest.approx(expected)


# --- conflicts ----------------------------------------------------------------------------------------------

QUANTIZED = {
    "weight_quantization": {
        "shared_parameters": {"enabled": True},
        "different_groups": {"all": {"params": {"start_bits": 8, "target_bits": 8}}},
    }
}


def shrinking(technique: str) -> dict[str, Any]:
    return {
        technique: {
            "shared_parameters": {"enabled": True, "shrink_at_end_of_schedule": True},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}}},
        }
    }


CONFLICTS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    # the block of distillation, other blocks, where the problem is, words of its message
    ({"losses": {}}, {}, "losses", 'at least one of "logits"'),
    ({"teacher": "x", "teacher_cache": "y"}, {}, "teacher_cache", 'no "teacher" beside it'),
    ({"teacher": "x", "self_teacher": {"weights": "ema"}}, {}, "self_teacher", 'no "teacher" beside it'),
    ({"teacher_cache": "y", "self_teacher": {"weights": "ema"}}, {}, "self_teacher", "keep one"),
    ({"teacher_offload": "cpu", "teacher_zero_stage": 0}, {}, "teacher_offload", "teacher_zero_stage 3"),
    (
        {"self_teacher": {"weights": "ema"}, "teacher_dtype": "bf16"},
        {},
        "teacher_dtype",
        "sharded as the student is",
    ),
    ({"teacher_cache": "folder", "teacher_zero_stage": 0}, {}, "teacher_zero_stage", "no model of its own"),
    ({"teacher_cache": "folder", "teacher_offload": "cpu"}, {}, "teacher_offload", "no model of its own"),
    (
        {"self_teacher": {"weights": "current"}, "layer_map": [0]},
        QUANTIZED,
        "layer_map",
        "every layer imitates itself",
    ),
    ({"self_teacher": {"weights": "initial", "decay": 0.9}}, {}, "self_teacher.decay", '"ema"'),
    (
        {"self_teacher": {"weights": "current"}},
        {},
        "self_teacher.weights",
        'an enabled weight_quantization or activation_quantization beside it.*"initial" or "ema"',
    ),
    (
        {"self_teacher": {"weights": "ema"}},
        shrinking("row_pruning"),
        "self_teacher.weights",
        '"initial" where shrink_at_end',
    ),
    (
        {"losses": {"hidden": {}}},
        shrinking("hidden_pruning"),
        "losses.hidden",
        "set shrink_at_end_of_schedule to false",
    ),
    (
        {"layer_map": [0, 1], "losses": {"hidden": {}}},
        {"layer_reduction": "two of three"},
        "layer_map",
        "3 entries",
    ),
    (
        {"layer_map": [0, 1], "losses": {"logits": {}, "embedding": {}, "contrastive": {}}},
        {},
        "layer_map",
        'no loss is by layer.*"hidden" or "attention"',
    ),
    *(
        (
            {"teacher_cache": "y", "losses": {name: {}, "logits": {}}},
            {},
            f"losses.{name}",
            "logits only.*name a teacher",
        )
        for name in ("hidden", "attention", "embedding", "contrastive")
    ),
    (
        {"teacher_cache": "y", "losses": {"logits": {"top_k": 5}}},
        {},
        "losses.logits.top_k",
        "cache fixed it.*remove it",
    ),
    ({"losses": {"logits": {"beta": 0.3}}}, {}, "losses.logits.beta", 'kind "jsd"'),
    ({"losses": {"logits": {"kind": "jsd", "beta": 1.0}}}, {}, "losses.logits.beta", "< 1"),
    ({"losses": {"logits": {"top_k": 0}}}, {}, "losses.logits.top_k", ">= 1"),
    ({"losses": {"logits": {"final_weight": 0.0}}}, {}, "losses.logits.schedule_offset_end", "a value"),
    ({"losses": {"hidden": {"schedule_offset_end": 5}}}, {}, "losses.hidden.final_weight", "belong together"),
    (
        {"losses": {"logits": {"final_weight": 0.0, "schedule_offset": 5, "schedule_offset_end": 5}}},
        {},
        "losses.logits.schedule_offset_end",
        r"more than schedule_offset \(5\)",
    ),
    ({"losses": {"logits": {"schedule_offset": 5}}}, {}, "losses.logits.schedule_offset", "nothing to move"),
    (
        {"losses": {"attention": {"kind": "maps", "relation_heads": 2}}},
        {},
        "losses.attention.relation_heads",
        'kind "relation"',
    ),
    (
        {"losses": {"contrastive": {"kind": "crd"}}},
        {},
        "losses.contrastive.examples",
        "number of training examples",
    ),
    ({"losses": {"contrastive": {"examples": 5}}}, {}, "losses.contrastive.examples", 'kind "crd"'),
]


@pytest.mark.parametrize(
    ("settings", "others", "path", "words"), CONFLICTS, ids=lambda value: str(value)[:60]
)
def test_conflicts_name_the_place_and_the_fix(
    settings: dict[str, Any], others: dict[str, Any], path: str, words: str
) -> None:
    if others == {"layer_reduction": "two of three"}:
        others = {
            "layer_reduction": {
                "enabled": True,
                "keep_number_layer": 3,
                "module_name_prefix": "m",
                "teacher_layer": [0, 1, 2],
            }
        }
    problem = only_problem_of(
        {"distillation": {"enabled": True, **settings}, **others}, f"distillation.{path}"
    )
    message = str(problem)
    assert f"compression_training.distillation.{path}" in message
    assert re.search(words, message.replace("\n", " ")), message


def test_a_block_that_is_off_conflicts_with_nothing() -> None:
    parsed = parse_config(
        {"distillation": {"enabled": False, "losses": {}, "teacher": "x", "teacher_cache": "y"}}
    )
    assert parsed.distillation is not None and not parsed.distillation.enabled
