"""`randomize` of the blocks that prune: exact sparsity, the same noise at each step, secrets that stay secret."""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.select.gumbel import GumbelNoise, commitment
from ds_compress.techniques.sparse_pruning import SparsePruning
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, pruning_block, structured_block, train

pytestmark = pytest.mark.usefixtures("single_process")

RAMP = {"schedule": "linear", "schedule_offset_end": 6, "schedule_offset_stride": 1}


def randomize(temperature: float = 1.0, seed: Any = 7) -> dict[str, Any]:
    return {"temperature": temperature, "seed": seed}


def masks_of(steps: int = 3, lr: float = 1e-3, **shared: Any) -> list[dict[str, torch.Tensor]]:
    """Of the weights, after each step."""
    found = []
    config = ds_config(2, pruning_block(**shared))
    config["optimizer"]["params"]["lr"] = lr
    with engine_of(tiny_bert(), config) as engine:
        technique = engine.compression.techniques["sparse_pruning"]
        for _ in range(steps):
            train(engine, batches(1))
            found.append({n: fragment.values.clone() != 0 for n, fragment in technique._fragments.items()})
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(mask, other[name]) for name, mask in one.items())


PATTERNS: dict[str, dict[str, Any]] = {
    "unstructured": {},
    "global": {"scope": "global"},
    "4x3": {"pattern": "4x3", "scope": "global"},
    "2:4": {"pattern": "2:4", "density": 0.5},
    "taylor": {"method": "taylor", "schedule_offset": 2},
}


class TestSparse:
    @pytest.mark.parametrize("name", PATTERNS)
    def test_as_many_are_kept_as_without_and_others(self, name: str) -> None:
        plain, random = masks_of(**PATTERNS[name])[-1], masks_of(**PATTERNS[name], randomize=randomize())[-1]
        assert not same(plain, random)
        if "scope" not in PATTERNS[name]:
            assert {n: int(m.sum()) for n, m in plain.items()} == {n: int(m.sum()) for n, m in random.items()}
        elif name == "global":
            assert sum(int(m.sum()) for m in plain.values()) == sum(int(m.sum()) for m in random.values())
        assert same(random, masks_of(**PATTERNS[name], randomize=randomize())[-1])
        assert not same(random, masks_of(**PATTERNS[name], randomize=randomize(seed=8))[-1])

    def test_weights_are_chosen_by_their_scores_and_the_noise_of_their_index(self) -> None:
        got = masks_of(1, schedule_offset=0, randomize=randomize(0.5))[0]
        noise = GumbelNoise("sparse_pruning", 0.5, 7)
        for name, parameter in tiny_bert().named_parameters():
            if name in got:
                weight = parameter.detach().double().abs().flatten()
                keys = weight.log() + 0.5 * noise.gumbel(name, 0, weight.numel()).double()
                kept = keys.topk(math.ceil(0.3 * weight.numel())).indices
                # The step moves weights after the mask is made: what it kept is not zero, and nothing else is kept.
                assert got[name].nonzero().flatten().tolist() == kept.sort().values.tolist()

    def test_temperature_0_is_the_plain_choice(self) -> None:
        assert same(masks_of()[-1], masks_of(randomize=randomize(0))[-1])
        assert same(masks_of()[-1], masks_of(randomize=randomize(0, "secret"))[-1])

    @pytest.mark.parametrize("regrowth", [False, True])
    @pytest.mark.parametrize("pattern", ["unstructured", "4x3", "2:4"])
    def test_masks_of_a_ramp_are_nested_where_weights_stay(self, regrowth: bool, pattern: str) -> None:
        density = 0.5 if pattern == "2:4" else 0.3
        masks = masks_of(
            8, 0.0, pattern=pattern, density=density, regrowth=regrowth, randomize=randomize(), **RAMP
        )
        for before, after in itertools.pairwise(masks):
            assert all(not (after[name] & ~before[name]).any() for name in after)
        kept, numel = (
            sum(int(m.sum()) for m in masks[-1].values()),
            sum(m.numel() for m in masks[-1].values()),
        )
        assert kept == pytest.approx(density * numel, abs=300 if pattern == "4x3" else 10)

    def test_pruned_weights_never_return_without_regrowth(self) -> None:
        masks = masks_of(8, 0.1, randomize=randomize(5.0), **RAMP)
        for before, after in itertools.pairwise(masks):
            assert all(not (after[name] & ~before[name]).any() for name in after)

    def test_a_seed_that_is_absent_is_that_of_the_block(self) -> None:
        block = pruning_block(randomize={"temperature": 1.0})
        found = []
        for seed in (3, 3, 4):
            with engine_of(tiny_bert(), ds_config(0, {**block, "seed": seed})) as engine:
                train(engine, batches(2))
                technique = engine.compression.techniques["sparse_pruning"]
                found.append({n: f.values.clone() != 0 for n, f in technique._fragments.items()})
        assert same(found[0], found[1]) and not same(found[0], found[2])


BLOCKS: dict[str, dict[str, Any]] = {
    "rows": {"row_pruning": structured_block()},
    "rows-global": {"row_pruning": structured_block(scope="global", round_to=1)},
    "heads": {"head_pruning": structured_block(method="taylor", schedule_offset=2)},
    "depth": {"depth_pruning": structured_block()},
}


def kept_units(block: dict[str, Any], steps: int = 3) -> dict[str, list[int]]:
    with engine_of(tiny_bert(layers=4), ds_config(2, block)) as engine:
        train(engine, batches(steps))
        return {name: units.tolist() for name, units in engine.compression.kept_units.items()}


def with_randomize(block: dict[str, Any], **keys: Any) -> dict[str, Any]:
    ((name, value),) = block.items()
    return {name: {"shared_parameters": {**value["shared_parameters"], "randomize": randomize(**keys)}}}


class TestStructured:
    @pytest.mark.parametrize("name", BLOCKS)
    def test_as_many_units_are_kept_as_without(self, name: str) -> None:
        plain, random = kept_units(BLOCKS[name]), kept_units(with_randomize(BLOCKS[name], temperature=3.0))
        if name != "rows-global":
            assert {n: len(u) for n, u in plain.items()} == {n: len(u) for n, u in random.items()}
        assert sum(map(len, plain.values())) == sum(map(len, random.values()))
        assert random == kept_units(with_randomize(BLOCKS[name], temperature=3.0))
        others = [kept_units(with_randomize(BLOCKS[name], temperature=3.0, seed=seed)) for seed in (8, 9, 10)]
        assert any(other != random for other in others)
        assert kept_units(with_randomize(BLOCKS[name], temperature=0.0)) == plain

    def test_units_of_a_ramp_are_nested(self) -> None:
        block = with_randomize({"row_pruning": structured_block(round_to=1, **RAMP)})
        with engine_of(tiny_bert(), ds_config(0, block)) as engine:
            before: dict[str, set[int]] = {}
            for batch in batches(8):
                train(engine, iter([batch]))
                now = {n: set(u.tolist()) for n, u in engine.compression.kept_units.items()}
                assert all(units <= before.get(name, units) for name, units in now.items())
                before = now
        assert {len(units) for units in before.values()} == {48}


class TestSecret:
    BLOCK = with_randomize({"row_pruning": structured_block()}, seed="secret") | pruning_block(
        randomize=randomize(seed="secret")
    )

    def test_it_is_in_checkpoints_alone_and_its_commitment_in_the_report(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        caplog.set_level(logging.DEBUG)
        with engine_of(tiny_bert(), ds_config(2, self.BLOCK)) as engine:
            train(engine, batches(3))
            run = engine.compression
            assert (
                f"row_pruning.randomize.seed is secret, commitment {run.commitments['row_pruning.randomize.seed']}"
                in (caplog.text)
            )
            seeds, promised = run.secret_seeds, run.commitments
            assert set(seeds) == {"row_pruning", "sparse_pruning"} and len(set(seeds.values())) == 2
            assert promised == {
                f"{name}.randomize.seed": commitment(name, seed) for name, seed in seeds.items()
            }
            masks = {n: f.values.clone() != 0 for n, f in run.techniques["sparse_pruning"]._fragments.items()}
            engine.save_checkpoint(tmp_path / "checkpoint")
            ds_compress.export(engine, tmp_path / "export", format="hf", check=False)
            said = f"{run.plan}{run.metrics()}{run.block}"
        report = json.loads((tmp_path / "export" / "ds_compress.json").read_text())
        assert report["commitments"] == promised
        output = capfd.readouterr()
        said += caplog.text + output.out + output.err
        for seed in seeds.values():
            assert seed not in said and str(int(seed, 16)) not in said
            for file in (path for path in (tmp_path / "export").rglob("*") if path.is_file()):
                assert seed.encode() not in file.read_bytes()
        with engine_of(tiny_bert(seed=5), ds_config(2, self.BLOCK)) as engine:
            engine.load_checkpoint(tmp_path / "checkpoint")
            run = engine.compression
            assert run.secret_seeds == seeds and run.commitments == promised
            run.techniques["sparse_pruning"].update_masks(3)
            train(engine, batches(1))
            assert same(
                masks, {n: f.values != 0 for n, f in run.techniques["sparse_pruning"]._fragments.items()}
            )
        ds_compress.export(tmp_path / "checkpoint", tmp_path / "again", format="hf", check=False)
        report = json.loads((tmp_path / "again" / "ds_compress.json").read_text())
        assert report["commitments"] == promised

    def test_that_of_a_block_which_a_shrink_has_ended_is_not_forgotten(self, tmp_path: Path) -> None:
        block = with_randomize(
            {"row_pruning": structured_block(shrink_at_end_of_schedule=True)}, seed="secret"
        )
        with engine_of(tiny_bert(), ds_config(2, block)) as engine:
            seeds = engine.compression.secret_seeds
            train(engine, batches(4))
            assert not engine.compression.techniques
            assert engine.compression.secret_seeds == seeds and set(seeds) == {"row_pruning"}
            engine.save_checkpoint(tmp_path)
        with engine_of(tiny_bert(seed=5), ds_config(2, block)) as engine:
            engine.load_checkpoint(tmp_path)
            assert engine.compression.secret_seeds == seeds

    def test_finalize_keeps_the_masks_that_are_there(self) -> None:
        with engine_of(tiny_bert(), ds_config(0, self.BLOCK)) as engine:
            train(engine, batches(3))
            weights = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
            promised = engine.compression.commitments
            final = ds_compress.finalize(engine)
        assert final.config.intermediate_size == 48
        from ds_compress.engine.checkpoint import origin

        assert origin.last_commitments(final) == promised
        model = tiny_bert(seed=5)
        model.load_state_dict(weights, strict=False)
        block = with_randomize({"row_pruning": structured_block()}, temperature=50.0)
        elsewhere = ds_compress.finalize(model, {"compression_training": block})
        for name, parameter in elsewhere.named_parameters():
            assert torch.equal(parameter, final.get_parameter(name)), name

    def test_finalize_of_a_model_that_was_not_trained_chooses_at_random(self) -> None:
        def rows(block: dict[str, Any]) -> torch.Tensor:
            final = ds_compress.finalize(tiny_bert(), {"compression_training": block})
            return final.bert.encoder.layer[0].intermediate.dense.weight

        plain, one, two = (
            rows({"row_pruning": structured_block()}),
            rows(with_randomize({"row_pruning": structured_block()}, temperature=3.0)),
            rows(with_randomize({"row_pruning": structured_block()}, temperature=3.0, seed="secret")),
        )
        assert plain.shape == one.shape == two.shape
        assert not torch.equal(plain, one) and not torch.equal(one, two)


@pytest.mark.parametrize("method", ["topk", "movement", "random"])
def test_methods_without_a_logarithm_are_refused(method: str) -> None:
    with pytest.raises(ds_compress.ConfigError) as raised:
        ds_compress.parse_config(pruning_block(method, randomize=randomize()))
    (problem,) = raised.value.problems
    assert problem.path == "compression_training.sparse_pruning.shared_parameters.randomize"
    assert problem.allowed == 'nothing, unless method is "l1", "taylor" or "snip_momentum"'


@pytest.mark.parametrize(
    ("value", "where", "allowed"),
    [
        ({"temperature": -1}, ".temperature", "a number >= 0 and <= 100"),
        ({"temperature": 101}, ".temperature", "a number >= 0 and <= 100"),
        ({}, ".temperature", "a number >= 0 and <= 100"),
        ({"temperature": 1, "seed": "sekret"}, ".seed", '"secret", or a whole number >= 0 (and < 2^256)'),
        ({"temperature": 1, "seed": -1}, ".seed", '"secret", or a whole number >= 0 (and < 2^256)'),
        ({"temperature": 1, "seed": True}, ".seed", '"secret", or a whole number >= 0 (and < 2^256)'),
        ({"temperature": 1, "seed": 2**256}, ".seed", '"secret", or a whole number >= 0 (and < 2^256)'),
        (0.5, "", 'an object with the keys "temperature" and "seed"'),
    ],
)
@pytest.mark.parametrize("block", ["sparse_pruning", "row_pruning"])
def test_what_may_stand_there(block: str, value: Any, where: str, allowed: str) -> None:
    shared = {"enabled": True, "dense_ratio": 0.5, "randomize": value}
    with pytest.raises(ds_compress.ConfigError) as raised:
        ds_compress.parse_config({block: {"shared_parameters": shared}})
    (problem,) = raised.value.problems
    assert problem.path == f"compression_training.{block}.shared_parameters.randomize{where}"
    assert problem.allowed == allowed


def test_the_plan_says_it() -> None:
    plan = str(ds_compress.plan(tiny_bert(), pruning_block(randomize=randomize(0.5, "secret"))))
    assert "chosen at random at temperature 0.5, by a secret seed" in plan


def test_layers_that_processes_share_have_no_noise() -> None:
    plan = ds_compress.plan(tiny_bert(), pruning_block(randomize=randomize()))
    keys = [key for key, *_ in SparsePruning(plan.techniques["sparse_pruning"]).with_tensor_parallelism()]
    assert keys == ["shared_parameters.randomize"]
