"""Imitated routing against its formula, and where the logits of a router are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ds_compress
from ds_compress.config.schema.distillation import RouterLoss
from ds_compress.distill.activation_capture import CapturedActivations
from ds_compress.distill.losses.router import RouterDistillation
from ds_compress.distill.router_logits import RouterLogits, routers_of, subscribe_logits
from ds_compress.errors import ConfigError
from tests.models import tiny_llama
from tests.multirank.common import ds_config
from tests.zoo.mixtures import ARCHITECTURES, VOCABULARY, mixture, tokens


def captured(logits: torch.Tensor, experts: torch.Tensor | None = None, **more: Any) -> CapturedActivations:
    return CapturedActivations(routers={0: RouterLogits(logits, experts)}, **more)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_formula(temperature: float) -> None:
    own, theirs = torch.randn(8, 6), torch.randn(8, 6)
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    p, q = ((x.double() / temperature).softmax(-1)[mask.flatten()] for x in (theirs, own))
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    loss = RouterDistillation(RouterLoss(temperature=temperature))
    got = loss(captured(own, token_mask=mask), captured(theirs))
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_experts_that_are_left_are_compared_among_themselves() -> None:
    left = torch.tensor([0, 3, 5])
    own, theirs = torch.randn(8, 3), torch.randn(8, 6)
    p, q = theirs[:, left].double().softmax(-1), own.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    got = RouterDistillation(RouterLoss())(captured(own, left), captured(theirs))
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    assert float(RouterDistillation(RouterLoss())(captured(theirs[:, left], left), captured(theirs))) < 1e-6


def test_layers_without_a_mixture_are_left_out() -> None:
    own, theirs = captured(torch.randn(8, 6)), captured(torch.randn(8, 6))
    alone = float(RouterDistillation(RouterLoss())(own, theirs))
    own.routers[1] = RouterLogits(torch.randn(8, 6))
    assert float(RouterDistillation(RouterLoss())(own, theirs)) == alone


@pytest.mark.parametrize("name", [*ARCHITECTURES, "stranger"])
def test_logits_are_found_among_the_outputs_of_every_router(name: str) -> None:
    model = mixture(name)
    (router,) = routers_of(_layers(model)[1])
    found: list[RouterLogits] = []
    inputs: list[torch.Tensor] = []
    router.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    subscribe_logits(router, found.append)
    with torch.no_grad():
        model(input_ids=tokens())
    weight, bias = router.get_parameter("weight"), router._parameters.get("bias")
    expected = F.linear(inputs[0].reshape(-1, weight.shape[1]).float(), weight.detach(), bias)
    torch.testing.assert_close(found[0].logits, expected, rtol=1e-4, atol=1e-5)
    assert found[0].left is None and torch.equal(found[0].experts, torch.arange(weight.shape[0]))


def _layers(model: torch.nn.Module) -> Any:
    return model.blocks if hasattr(model, "blocks") else model.model.layers  # type: ignore[union-attr]


def run(
    student: torch.nn.Module, teacher: torch.nn.Module | None, block: dict[str, Any], steps: int = 4
) -> Any:
    own = {"self_teacher": {"weights": "initial"}} if teacher is None else {}
    losses: dict[str, Any] = {"router": {}, "logits": {}}
    settings = {"enabled": True, "task_loss_weight": 0.0, "losses": losses, **own}
    engine, *_ = ds_compress.initialize(
        model=student,
        model_parameters=student.parameters(),
        config=ds_config(2, {"distillation": settings, **block}),
        teacher=teacher,
    )
    values = []
    for step in range(steps):
        engine.backward(engine(input_ids=tokens(seed=step)).loss)
        engine.step()
        values.append(engine.compression.metrics()["distillation/router"])
    engine.destroy()
    return values


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "llama4"])
def test_a_student_whose_experts_go_imitates_with_those_that_it_has(name: str, shrinks: bool) -> None:
    shared = {
        "enabled": True,
        "dense_ratio": 0.5,
        "method": "l2",
        "schedule_offset": 2,
        "shrink_at_end_of_schedule": shrinks,
    }
    values = run(mixture(name).train(), None, {"expert_pruning": {"shared_parameters": shared}}, steps=5)
    # The model is its own teacher: before a step they agree, and experts that are gone change no share of the others.
    assert values[0] < 1e-6 and all(0 < value < 0.05 for value in values[1:])


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("experts", [2, 8])
def test_experts_that_nothing_matches_are_an_error(experts: int) -> None:
    student, teacher = mixture("qwen3_moe", num_experts=experts), mixture("qwen3_moe")
    with pytest.raises(ConfigError, match=f"{experts} experts where the teacher has 4"):
        run(student.train(), teacher, {})


@pytest.mark.usefixtures("single_process")
def test_a_dense_student_has_no_routing() -> None:
    student = tiny_llama(hidden=16, heads=2, intermediate=24, vocab_size=VOCABULARY)
    with pytest.raises(ConfigError, match="mixtures of experts"):
        run(student.train(), mixture("mixtral"), {})
