"""Training on a device that is not the CPU, simulated (see `simulated_device`), for `test_cuda_devices`.

    python -m tests.device_runs results.json [check ...]        writes {check: null, or what went wrong}

In a process of its own, because the simulated device stays in torch.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

COUNTS_WAITS = os.environ.get("DS_COMPRESS_KERNELS") != "reference"
"""Plain torch in the place of kernels is for those who cannot have these, and may ask."""
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def batches(steps: int, device: Any) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids = torch.randint(0, 128, (4, 12), generator=generator).to(device)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 0] > 64).long()}


def train(block: dict[str, Any] | None, device: Any, steps: int = 9) -> dict[str, Any]:
    """A loop without an engine; what every step waits for, beside the reading of the loss."""
    from ds_compress.config import parse_config
    from ds_compress.engine.attach import attach_to_loop
    from ds_compress.engine.build import prepare_model
    from tests.models import tiny_bert
    from tests.simulated_device import waits

    model = tiny_bert().to(device).train()
    session = None
    if block is not None:
        session = prepare_model(model, parse_config(block))
        attach_to_loop(session)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    losses, waited = [], []
    for batch in batches(steps, device):
        waits.clear()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if session is not None:
            session.end_step()
        waited.append(dict(waits))
        losses.append(float(loss.detach()))
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    if session is not None:
        assert_on_cpu(session.state_dict())
        session.detach()
    return {"losses": losses, "waited": waited, "weights": weights}


def assert_on_cpu(state: Any) -> None:
    """What every process keeps in a checkpoint can be read where there is no such device."""
    elsewhere = [
        x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor) and not x.is_cpu
    ]
    assert not elsewhere, elsewhere


@functools.cache
def plain_waits() -> dict[str, int]:
    from tests.simulated_device import DEVICE

    waits: dict[str, int] = train(None, DEVICE, 3)["waited"][-1]
    return waits


def compare(block: dict[str, Any] | None, in_force: int | None = -3) -> None:
    """The same numbers as on the CPU; from step `in_force` on, no wait that plain training has not."""
    from tests.simulated_device import DEVICE, without_it

    with without_it():
        expected = train(block, "cpu")
    got = train(block, DEVICE)
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=0, atol=1e-4)
    for name, weight in expected["weights"].items():
        assert torch.equal(got["weights"][name] != 0, weight != 0), f"zeros of {name}"
        # An Adam makes a whole step of a gradient that is nothing but rounding.
        allowed = 1e-4 if weight.numel() > 1000 else 2e-3
        assert float((got["weights"][name] - weight).abs().mean()) < allowed, name
    if in_force is not None and COUNTS_WAITS:
        for waited in got["waited"][in_force:]:
            assert waited == plain_waits(), f"waits {waited}, plain training {plain_waits()}"


def checks_of_training() -> None:
    from tests.gpu.runs import BLOCKS, structures
    from tests.multirank.training import quantization_block

    ends = {"schedule_offset_end": 5, "schedule_offset_stride": 2}
    weights, inputs = (
        quantization_block()["weight_quantization"],
        quantization_block()["activation_quantization"],
    )

    def weight_block(modules: list[str], bits: int = 8, **shared: Any) -> dict[str, Any]:
        groups = {"all": {"params": {"start_bits": bits, "target_bits": bits}, "modules": modules}}
        kept = {**weights["shared_parameters"], **shared}
        return {"weight_quantization": {"shared_parameters": kept, "different_groups": groups}}

    def input_block(**shared: Any) -> dict[str, Any]:
        return {"activation_quantization": {**inputs, "shared_parameters": {"enabled": True, **shared}}}

    embeddings = ["word_embeddings"]
    runs: dict[str, tuple[dict[str, Any] | None, int | None]] = {
        **{f"train {name}": (block, -3) for name, block in BLOCKS.items()},
        # Masks that follow the training are made at every step, from scores that the host has to look at.
        **{f"train sparse {name}": (BLOCKS[f"sparse {name}"], None) for name in ("movement", "topk")},
        "train structures": (BLOCKS["structures"], None),
        "train structures that end": (structures(method="taylor", **ends), -2),
        "train structures by l1": (structures(method="l1", **ends), -2),
        "train structures by activation": (structures(method="activation", **ends), -2),
        "train embeddings": (weight_block(embeddings), -3),
        "train stochastic embeddings": (weight_block(embeddings, 4, rounding="stochastic"), -3),
        "train learned embeddings": (weight_block(embeddings, 4, learned_scale=True), -3),
        "train asymmetric groups": (
            weight_block(
                ["encoder"], 4, granularity="per_group", quantize_groups=4, quantization_type="asymmetric"
            ),
            -3,
        ),
        "train ternary": (weight_block(["encoder"], 2), -3),
        "train binary": (weight_block(["encoder"], 1), -3),
        "train inputs per tensor": (input_block(granularity="per_tensor"), -3),
        "train asymmetric inputs": (input_block(quantization_type="asymmetric"), -3),
    }
    if not COUNTS_WAITS:
        runs = {name: run for name, run in runs.items() if "structures" not in name}
    for name, (block, in_force) in runs.items():
        CHECKS[name] = lambda block=block, in_force=in_force: compare(block, in_force)  # type: ignore[misc]


@check
def scores_of_units_wait_once() -> None:
    """Between two masks: a reduction for each of the three blocks, whatever the number of layers."""
    from tests.gpu.runs import structures
    from tests.simulated_device import DEVICE

    for method in ("taylor", "activation"):
        block = structures(method=method, schedule_offset_end=9, schedule_offset_stride=7)
        waited = train(block, DEVICE, 6)["waited"][-1]
        extra = sum(waited.values()) - sum(plain_waits().values())
        assert extra <= 3 or not COUNTS_WAITS, f"{method}: {waited}"


@check
def clipping_at_stage_0_waits_once() -> None:
    """The ratio of two norms, of all weights, is one number for the host."""
    from types import SimpleNamespace

    from ds_compress.engine.step.clipping import AppliedNorm
    from ds_compress.ops import bitmask
    from ds_compress.sharding.shards import Shards
    from tests.simulated_device import DEVICE, waits

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))).to(DEVICE)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    half = {f"{i}.weight": bitmask.pack(torch.arange(64, device=DEVICE) % 2 == 0) for i in range(5)}
    stage = SimpleNamespace(clears_gradients=True, gradient_mask=half.get)
    engine = SimpleNamespace(module=model, optimizer=SimpleNamespace(), autotp_size=lambda: 1)
    norm = AppliedNorm(engine, [stage])  # type: ignore[list-item]
    norm.use(Shards.of_model(model))
    waits.clear()
    ratio = norm._ratio()
    assert sum(waits.values()) == 1 or not COUNTS_WAITS, waits
    assert abs(ratio - (5 * 72 / (5 * 40)) ** 0.5) < 1e-6


@check
def finalize_a_model_on_a_device() -> None:
    import ds_compress
    from tests.gpu.runs import structures
    from tests.models import tiny_bert
    from tests.simulated_device import DEVICE

    block = {**structures(method="l1"), **_half_of_all()}
    made = [ds_compress.finalize(tiny_bert(layers=4).to(device), block) for device in ("cpu", DEVICE)]
    on_cpu, on_device = ({n: p.detach().cpu() for n, p in model.named_parameters()} for model in made)
    assert on_cpu.keys() == on_device.keys()
    assert all(torch.equal(on_device[name], weight) for name, weight in on_cpu.items())


def _half_of_all() -> dict[str, Any]:
    from tests.multirank.common import pruning_block

    return pruning_block("l1", 0.5)


@check
def losses_of_distillation() -> None:
    """A student with every loss and a whole teacher, logits in chunks and whole; and in few waits."""
    from tests.multirank.distilling import EVERY_LOSS, LANGUAGE_LOSSES
    from tests.simulated_device import DEVICE, without_it

    crd = {**EVERY_LOSS, **LANGUAGE_LOSSES["crd"]}
    for losses in (
        EVERY_LOSS,
        {**EVERY_LOSS, "logits": {"chunk_tokens": 0}},
        crd,
        LANGUAGE_LOSSES["reverse"],
    ):
        with without_it():
            expected = _distilled(losses, "cpu")
        got = _distilled(losses, DEVICE)
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-4)
        # Two in each model, for its attention mask, and two for the factors of the chunked losses.
        allowed = 4 if losses.get("logits", {}).get("chunk_tokens") == 0 else 6
        assert got[1] <= allowed or not COUNTS_WAITS, got[1]


def _distilled(losses: dict[str, Any], device: Any) -> tuple[list[float], int]:
    from types import SimpleNamespace

    from ds_compress.config import parse_config
    from ds_compress.engine.zero.parameters import all_gather_rows
    from ds_compress.techniques.distillation import Distillation
    from tests.multirank.distilling import block, llama, teacher_of_more
    from tests.simulated_device import waits

    config = parse_config(block(losses))
    # Moving a module here unties what it ties.
    model, theirs = (
        llama(tied=False).to(device).train(),
        teacher_of_more().to(device).eval().requires_grad_(False),
    )
    teacher: Any = SimpleNamespace(
        model=theirs, follow=lambda model: None, forward=torch.no_grad()(theirs.forward)
    )
    teacher.forward = torch.no_grad()(theirs)
    model.config.use_cache = theirs.config.use_cache = False  # its first tensor is made by a call of its own
    torch.manual_seed(7)
    assert config.distillation is not None
    stage = Distillation(config.distillation, model, teacher, None, all_gather_rows)
    stage.prepare(model)
    transforms: list[Any] = []

    def transform_loss(transform: Any) -> Any:
        transforms.append(transform)
        return lambda: None

    engine: Any = SimpleNamespace(transform_loss=transform_loss)
    stage.attach_engine(engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    found = []
    for batch in _tokens(4):
        given = {name: values.to(device) for name, values in batch.items()}
        waits.clear()
        optimizer.zero_grad()
        loss = model(**given).loss
        transforms[0](loss).backward()
        stage.before_step(0)
        optimizer.step()
        stage.after_step(1)
        waited = sum(waits.values())
        found += [float(loss.detach()), *stage.metrics().values()]
    assert_on_cpu(stage.state_dict())
    stage.detach()
    return found, waited


def _tokens(steps: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        ids = torch.randint(0, 61, (4, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[::3, 6:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@check
def messages_of_quantized_reductions() -> None:
    """What two workers send, its sum, what is sent back, and what was lost, as on the CPU; nothing waits."""
    from ds_compress.reduce.codec import BlockCodec
    from ds_compress.reduce.residuals import Residuals
    from ds_compress.reduce.stochastic import Dither, StochasticBlockCodec
    from tests.simulated_device import DEVICE, waits

    gradients = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    for make in (
        lambda: BlockCodec(8, 128),
        lambda: BlockCodec(4, 64),
        lambda: StochasticBlockCodec(8, 128, Dither(0.5)),
    ):
        found = []
        for device in ("cpu", DEVICE):
            codec, rows = make(), gradients.to(device)
            stochastic = isinstance(codec, StochasticBlockCodec)
            waits.clear()
            sent = torch.empty((2, codec.payload_bytes(1000)), dtype=torch.uint8, device=device)
            residuals = None if stochastic else Residuals(8)
            for worker, row in enumerate(rows):
                lost = None if residuals is None else residuals.load("w", 1000 * worker, 1000, row.device)
                codec.encode(row, sent[worker], lost)
                if residuals is not None and lost is not None:
                    residuals.store("w", 1000 * worker, lost)
            answer = torch.empty(codec.payload_bytes(1000), dtype=torch.uint8, device=device)
            codec.sum_and_encode(sent, answer, None, 1000, 0.5)
            out = torch.empty(1000, device=device)
            codec.decode(answer, out)
            assert not waits or not COUNTS_WAITS, waits
            kept = [] if residuals is None else [stored.cpu() for _, stored in residuals.state()]
            found.append([out.cpu(), answer.cpu(), *kept])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@check
def robust_rules() -> None:
    from ds_compress.reduce.rules import COORDINATES, WEIGHTS, mixing
    from tests.simulated_device import DEVICE

    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rows[4] *= 50
    gram = rows.double() @ rows.double().T
    for name, rule in WEIGHTS.items():
        got = rule(gram.to(DEVICE))
        assert got.device == DEVICE, name
        torch.testing.assert_close(got.cpu(), rule(gram), rtol=1e-6, atol=1e-9, msg=name)
    for name, coordinate in COORDINATES.items():
        torch.testing.assert_close(coordinate(rows.to(DEVICE), 1).cpu(), coordinate(rows, 1), msg=name)
    assert torch.equal(mixing(gram.to(DEVICE), 1).cpu(), mixing(gram, 1))


@check
def scales_are_those_of_the_cpu() -> None:
    """A scale is a true quotient: no reciprocal, whatever torch makes of `values / 127` on a device."""
    from ds_compress.ops.reference import IMPLEMENTATIONS
    from ds_compress.quant.grid import Granularity, WeightGrid
    from ds_compress.quant.weights import fake_quantize
    from tests.simulated_device import DEVICE

    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal((x.to(DEVICE) / 127).cpu(), x / 127), (
        "the control: the device multiplies by a reciprocal"
    )
    for symmetric in (True, False):
        grid = WeightGrid(8, symmetric, narrow_range=True, granularity=Granularity.PER_CHANNEL)
        assert torch.equal(fake_quantize(x.to(DEVICE), grid).cpu(), fake_quantize(x, grid))
        how = {
            "quant_min": grid.quant_min,
            "quant_max": grid.quant_max,
            "steps": grid.scale_divisor,
            "symmetric": symmetric,
            "with_mask": True,
        }
        results = (IMPLEMENTATIONS["fake_quantize"](values, **how) for values in (x.to(DEVICE), x))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(*results, strict=True))


@check
def controls() -> None:
    """What the simulated device is for: it refuses what a GPU would, and counts what a GPU would wait for."""
    from tests.simulated_device import DEVICE, waits

    a, b = torch.ones(3, device=DEVICE), torch.ones(3)
    for wrong in (
        lambda: a + b,
        lambda: b.add_(a),
        lambda: torch.cat([a, b]),
        lambda: a.numpy(),
        lambda: b[0].add_(a[0]),
    ):
        try:
            wrong()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("tensors of two devices were taken for tensors of one")
    for read in (
        lambda: a.sum().item(),
        lambda: bool(a[0] > 0),
        lambda: a[a > 0],
        lambda: a.cpu(),
        lambda: b.to(DEVICE),
    ):
        waits.clear()
        read()
        assert sum(waits.values()) == 1, waits
    waits.clear()
    (a * 2.0 + torch.tensor(1.0)).sum()
    assert not waits


def main(path: str, *only: str) -> None:
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    import ds_compress  # noqa: F401
    from tests.simulated_device import simulated_device

    checks_of_training()
    found: dict[str, str | None] = {}
    with simulated_device():
        for name, run in CHECKS.items():
            if only and name not in only:
                continue
            try:
                run()
                found[name] = None
            except Exception:
                found[name] = traceback.format_exc(limit=-12)
    with open(path, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
