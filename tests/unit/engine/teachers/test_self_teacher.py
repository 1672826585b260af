"""A model that is its own teacher, label-free training, and what is saved of a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.distill.lazy_logits import LazyLogits
from ds_compress.engine.teachers.self_teacher import CurrentTeacher
from ds_compress.modelinfo.auxiliary import AUXILIARY
from ds_compress.quant import layers
from tests.multirank.common import full_weights, pruning_block, weight_quantization
from tests.multirank.distilling import llama, token_batches
from tests.quantized import quantized
from tests.unit.engine.teachers.engines import engine_of

pytestmark = pytest.mark.usefixtures("single_process")


def distillation(losses: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {"distillation": {"enabled": True, "losses": losses or {"logits": {}}, **settings}}


def quantization(bits: int = 3, **shared: Any) -> dict[str, Any]:
    return weight_quantization(bits, "layers", **shared)


def kl(theirs: torch.Tensor, own: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    p, q = theirs.double().log_softmax(-1), own.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[mask.bool()].mean()


def imitation_of(engine: Any, batch: dict[str, torch.Tensor]) -> float:
    engine.backward(engine(**batch).loss)
    value: float = engine.compression.metrics()["distillation/logits"]
    return value


# --- current ------------------------------------------------------------------------------------------------


def test_the_current_model_without_quantizers_is_the_teacher() -> None:
    (batch,) = token_batches(1)
    plain = llama()(**batch).logits
    student = llama()
    block = {**quantization(), **distillation(self_teacher={"weights": "current"})}
    with engine_of(student, block) as engine:
        with torch.no_grad():
            own = engine(**batch).logits
        expected = kl(plain.detach(), own, batch["attention_mask"])
        assert float(expected) > 1e-5
        # A sum of rounded fp32 terms whose first order cancels; its noise depends on the CPU.
        assert imitation_of(engine, batch) == pytest.approx(float(expected), abs=1e-7)
        with torch.no_grad():
            assert torch.equal(engine(**batch).logits, own)


def test_quantizers_are_back_after_a_teacher_that_failed() -> None:
    model = quantized(llama(), bits=4, modules=("layers",), inputs={})
    found = [
        (module.weight_quantizer, module.input_quantizer)
        for module in model.modules()
        if isinstance(module, layers.QATModule)
    ]
    assert found and all(w is not None for w, _ in found)
    with pytest.raises(ValueError, match="input_ids"):
        CurrentTeacher(model).forward()
    assert found == [
        (module.weight_quantizer, module.input_quantizer)
        for module in model.modules()
        if isinstance(module, layers.QATModule)
    ]
    assert all(module.training for module in model.modules()) == model.training


def test_a_current_teacher_has_no_dropout_and_leaves_statistics_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    x = torch.randn(4, 3)
    teacher = CurrentTeacher(model)
    assert torch.equal(teacher.forward(x), x / (1 + 1e-5) ** 0.5)
    assert float(model[0].running_mean.abs().max()) == 0.0
    assert [module.training for module in model.modules()] == [True, True, False]


# --- initial ------------------------------------------------------------------------------------------------


def test_the_initial_model_teaches_with_the_layers_that_the_student_lost() -> None:
    (batch,) = token_batches(1)
    whole, student = llama(layers=3), llama(layers=3)
    block = {
        "layer_reduction": {"enabled": True, "teacher_layer": [1]},
        **distillation({"logits": {}, "hidden": {}}, self_teacher={"weights": "initial"}),
    }
    with torch.no_grad():
        theirs = whole(**batch).logits
    with engine_of(student, block) as engine:
        teacher = engine.compression.teacher.model
        assert (len(student.model.layers), len(teacher.model.layers)) == (1, 3)
        with torch.no_grad():
            own = engine(**batch).logits
        expected = kl(theirs, own, batch["attention_mask"])
        for _ in range(2):
            assert imitation_of(engine, batch) == pytest.approx(float(expected), rel=1e-4)
        engine.step()
        for name, value in full_weights(teacher).items():
            assert torch.equal(value, whole.get_parameter(name))
        assert not any(p.requires_grad for p in teacher.parameters())


# --- moving average -----------------------------------------------------------------------------------------

DECAY = 0.75  # not 0.5, which is its own complement


@pytest.mark.parametrize("beside", ["learned scales", "pruning", "learned projections"])
def test_the_average_is_of_the_weights_that_forward_sees(beside: str) -> None:
    student = llama()
    losses: dict[str, Any] = {"logits": {}}
    others: dict[str, Any] = {}
    if beside == "learned scales":
        others = quantization(8, learned_scale=True)
    elif beside == "pruning":
        others = pruning_block(density=0.3)
        others["sparse_pruning"]["different_groups"] = {
            "all": {"params": {"dense_ratio": 0.3}, "modules": ["layers"]}
        }
    else:
        losses["contrastive"] = {"dimension": 4}
    expected = {name: p.detach().clone() for name, p in llama().named_parameters()}
    block = {**others, **distillation(losses, self_teacher={"weights": "ema", "decay": DECAY})}
    with engine_of(student, block) as engine:
        for batch in token_batches(3):
            engine.backward(engine(**batch).loss)
            engine.step()
            for name, value in expected.items():
                value.lerp_(student.get_parameter(name).detach(), 1 - DECAY)
        average = engine.compression.teacher.model
        assert {name for name, _ in average.named_parameters()} == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(average.get_parameter(name), value, rtol=1e-5, atol=1e-7)
        own = dict(student.named_parameters())
        if beside == "learned scales":
            assert any(layers.STEP_SIZE in name for name in own)
        elif beside == "pruning":
            weight = student.model.layers[0].mlp.up_proj.weight
            assert float((weight == 0).float().mean()) == pytest.approx(0.7, abs=0.01)
        else:
            assert any(AUXILIARY in name for name in own)


def test_the_average_teaches_what_it_is_now() -> None:
    student = llama()
    block = distillation(self_teacher={"weights": "ema", "decay": DECAY})
    with engine_of(student, block) as engine:
        values = []
        for batch in token_batches(3):
            with torch.no_grad():
                own = engine(**batch).logits
                theirs = engine.compression.teacher.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits
            values.append(imitation_of(engine, batch))
            expected = float(kl(theirs, own, batch["attention_mask"]))
            assert values[-1] == pytest.approx(expected, rel=1e-3, abs=1e-7)
            engine.step()
    assert values[0] == pytest.approx(0.0, abs=1e-6) and values[2] > 0


# --- without labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_a_model_that_returns_tuples_learns_without_labels(labels: bool, chunk_tokens: int) -> None:
    student, teacher = llama(), llama(seed=3)
    (batch,) = token_batches(1, labels=labels)
    with torch.no_grad():
        theirs = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    reference = llama()
    own = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = kl(theirs, own, batch["attention_mask"])
    expected.backward()
    block = distillation({"logits": {"chunk_tokens": chunk_tokens}}, task_loss_weight=0.0)
    with engine_of(student, block, teacher) as engine:
        output = engine(**batch, return_dict=False)
        assert isinstance(output, tuple)
        assert float(output[0]) == pytest.approx(float(expected), rel=1e-4)
        assert output[1].shape == own.shape
        engine.backward(output[0])
        for name, parameter in reference.named_parameters():
            got = student.get_parameter(name).grad
            torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


class Plain(nn.Module):
    """A model of one's own: (loss, logits) with labels, (logits,) without."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.out = nn.Embedding(61, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Any, labels: Any = None) -> tuple[torch.Tensor, ...]:
        logits = self.out(self.table(input_ids).mean(1))
        return (logits,) if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("task_loss_weight", [0.0, 0.5])
@pytest.mark.parametrize("by_name", [True, False])
def test_labels_are_labels_however_they_are_passed(task_loss_weight: float, by_name: bool) -> None:
    ids, labels = torch.randint(0, 61, (8, 5)), torch.randint(0, 4, (8,))
    with torch.no_grad():
        (theirs,), (task, own) = Plain(1)(ids), Plain(0)(ids, labels)
    expected = float(kl(theirs, own, torch.ones(8)))
    block = distillation(task_loss_weight=task_loss_weight, teacher_zero_stage=0)
    with engine_of(Plain(0), block, Plain(1)) as engine:
        loss, logits = engine(ids, labels=labels) if by_name else engine(ids, labels)
        torch.testing.assert_close(logits.detach(), own)
        assert float(loss) == pytest.approx(expected if task_loss_weight == 0 else float(task), rel=1e-4)
        engine.backward(loss)
        assert engine.compression.metrics()["distillation/logits"] == pytest.approx(expected, rel=1e-4)


# --- evaluation ---------------------------------------------------------------------------------------------


def test_evaluating_between_steps_changes_nothing_and_gives_real_logits() -> None:
    runs = []
    block = distillation(
        {
            "logits": {"chunk_tokens": 7},
            "contrastive": {"dimension": 4, "queue": 20},
            "attention": {"kind": "maps"},
        }
    )
    for evaluates in (False, True):
        student = llama()
        torch.manual_seed(7)
        with engine_of(student, block, llama(seed=3)) as engine:
            losses = []
            for batch in token_batches(4):
                if evaluates:
                    engine.eval()
                    with torch.no_grad():
                        assert isinstance(engine(**batch).logits, torch.Tensor)
                    engine(**batch)
                    engine.train()
                    with torch.no_grad():
                        assert isinstance(engine(**batch).logits, torch.Tensor)
                        student.generate(batch["input_ids"][:, :3], max_new_tokens=2, do_sample=False)
                output = engine(**batch)
                assert isinstance(output.logits, LazyLogits)
                engine.backward(output.loss)
                engine.step()
                losses.append(float(output.loss))
            runs.append(
                (losses, engine.compression.metrics(), {n: p.detach() for n, p in student.named_parameters()})
            )
    (a, metrics_a, weights_a), (b, metrics_b, weights_b) = runs
    assert a == b and metrics_a == metrics_b
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_a)


# --- what is saved ------------------------------------------------------------------------------------------

WIDER = {
    "hidden": {},
    "embedding": {},
    "contrastive": {"dimension": 4},
}


def trained_beside_projections(engine: Any) -> None:
    for batch in token_batches(1):
        engine.backward(engine(**batch).loss)
        engine.step()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_saved_student_has_its_own_weights_only(tmp_path: Path, stage: int) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    student = llama()
    with engine_of(student, distillation(WIDER), llama(hidden=32, seed=3, tied=False), stage) as engine:
        trained_beside_projections(engine)
        assert {n.split(".")[1] for n, _ in student.named_parameters() if AUXILIARY in n} == set(WIDER)
        student.save_pretrained(tmp_path)
        assert not [key for key in load_file(tmp_path / "model.safetensors") if AUXILIARY in key]
        loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["unexpected_keys"] and not report["missing_keys"]
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, student.get_parameter(name))
        engine.compression.detach()
        assert not [name for name in student.state_dict() if AUXILIARY in name]


@pytest.mark.parametrize("source", ["engine", "model", "detached"])
def test_an_exported_student_has_its_own_weights_only(tmp_path: Path, source: str) -> None:
    from safetensors.torch import load_file

    student = llama()
    out = tmp_path / "out"
    with engine_of(student, distillation(WIDER), llama(hidden=32, seed=3, tied=False)) as engine:
        trained_beside_projections(engine)
        expected = {name for name, _ in llama().named_parameters()}
        if source == "detached":
            engine.compression.detach()
        chosen = engine if source == "engine" else student
        report = ds_compress.export(chosen, out, format="hf", check=False)
        assert report.dense_bytes == 4 * sum(p.numel() for p in llama().parameters())
        ds_compress.export(chosen, tmp_path / "ours", format="torch")
    stored = load_file(out / "model.safetensors")
    assert not [key for key in stored if AUXILIARY in key]
    assert set(stored) <= expected | {"lm_head.weight"} and expected <= set(stored) | {"lm_head.weight"}
    torch.testing.assert_close(
        stored["model.layers.0.mlp.up_proj.weight"], student.model.layers[0].mlp.up_proj.weight.detach()
    )
