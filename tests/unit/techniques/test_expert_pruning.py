"""How experts are scored, excluded from routing and merged, and what is refused; ZeRO stages are in `multirank`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ds_compress
from ds_compress.errors import ConfigError
from ds_compress.modelinfo.experts import moe_blocks
from ds_compress.select.unit_scores import Reap
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from ds_compress.techniques.expert_routing import ExpertRouting
from ds_compress.techniques.routing_check import check_exclusion
from tests.multirank.common import ds_config, engine_of
from tests.multirank.experts import block, built, evaluated, logits_of, train
from tests.zoo.mixtures import ARCHITECTURES, mixture, tokens

pytestmark = pytest.mark.usefixtures("single_process")


def routings(model: nn.Module, norms: bool = True) -> list[ExpertRouting]:
    found = [ExpertRouting(model, moe) for moe in moe_blocks(model)]
    for routing in found:
        routing.measures_norms = norms
        routing.hooks()
    return found


class TestScores:
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
    def test_reap_is_gate_weight_times_norm_of_the_output(self, name: str, implementation: str) -> None:
        """Against the definition: each expert is run on its own, on the tokens that were routed to it."""
        model: Any = mixture(name)
        model.config._experts_implementation = implementation
        calls: list[Any] = []
        experts: Any = [model.get_submodule(moe.experts_name) for moe in moe_blocks(model)][-1]
        handle = experts.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(args), with_kwargs=True
        )
        before = model(input_ids=tokens()).logits
        handle.remove()
        hidden, index, weights = (tensor.detach() for tensor in calls[0])
        norms = torch.zeros(experts.num_experts)
        for token in range(index.shape[0]):
            for place in range(index.shape[1]):
                one = torch.full((1, 1), int(index[token, place]))
                alone = experts(hidden[token : token + 1], one, weights[token : token + 1, place : place + 1])
                norms[one] += alone.norm().item()

        routing = routings(model)[-1]
        experts.train()
        after = model(input_ids=tokens()).logits
        seen = routing.take()
        assert seen is not None
        torch.testing.assert_close(seen[0].float(), norms, rtol=1e-4, atol=1e-4)
        assert torch.equal(seen[1].long(), index.flatten().bincount(minlength=experts.num_experts))
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)

    def test_llama4_scales_what_goes_in(self) -> None:
        model: Any = mixture("llama4")
        mixture_of_experts: Any = model.model.layers[1].feed_forward
        routing = routings(model)[-1]
        x = torch.randn(1, 20, 16)
        model.train()
        mixture_of_experts(x)
        seen = routing.take()
        assert seen is not None
        scores, _ = mixture_of_experts.router(x[0])
        assert torch.equal(seen[1].long(), (scores > 0).sum(0))
        for expert in range(4):
            rows = x[0] * scores[:, expert : expert + 1]
            fused = mixture_of_experts.experts
            gate, up = (rows @ fused.gate_up_proj[expert]).chunk(2, -1)
            output = (up * F.silu(gate)) @ fused.down_proj[expert]
            assert seen[0][expert].item() == pytest.approx(output.norm(dim=-1).sum().item(), rel=1e-4)

    def test_an_expert_without_tokens_is_worth_nothing(self) -> None:
        """Its router row is far below all others: no token, no score, and no NaN that would stop the selection."""
        model: Any = mixture("mixtral")
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[1] = 0
            layer.mlp.gate.weight.data[[0, 2, 3]] = 5 * layer.mlp.gate.weight.data[[0, 2, 3]].abs()
            layer.post_attention_layernorm.weight.data.zero_()
            layer.post_attention_layernorm.weight.data += 1
        keys: dict[str, Any] = {"method": "reap", "dense_ratio": 0.75, "schedule_offset": 1}
        with engine_of(model, ds_config(0, block(**keys))) as engine:
            technique = engine.compression.techniques["expert_pruning"]
            for routing in technique._routings.values():
                # Whatever the tokens: nothing was seen of expert 1.
                take = routing.take
                routing.take = lambda take=take: _without(take(), 1)
            train(engine, 1)
            assert [units.tolist() for units in technique.kept.values()] == [[0, 2, 3], [0, 2, 3]]

    def test_nothing_is_counted_in_evaluation(self) -> None:
        model: Any = mixture("mixtral")
        (first, *_) = routings(model)
        model(input_ids=tokens())
        assert first.take() is None


def _without(seen: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    if seen is not None:
        seen[:, expert] = 0
    return seen


def test_reap_is_a_mean_over_tokens() -> None:
    group = PrunableGroup("mixture", GroupKind.EXPERT, (), 3, ())
    score = Reap([group], 0)
    score.add("mixture", torch.tensor([[6.0, 4.0, 0.0], [3.0, 1.0, 0.0]], dtype=torch.float64))
    score.add("mixture", torch.tensor([[0.0, 4.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64))
    assert score.scores_of("mixture", torch.zeros(3, dtype=torch.float64)).tolist() == [2.0, 4.0, 0.0]
    score.after_selection()
    assert not score.scores_of("mixture", torch.zeros(3, dtype=torch.float64)).any()


class TestExclusion:
    @pytest.mark.parametrize("name", [*ARCHITECTURES, "stranger", "selective"])
    def test_gradients_are_those_of_the_smaller_model(self, name: str) -> None:
        """In training mode, too; no excluded expert gets a gradient, and each kept one that of the removed model."""
        method = "l2"
        masked = built(name)
        with engine_of(masked, ds_config(0, block(method, schedule_offset=1))) as engine:
            train(engine, 1)
            kept = dict(engine.compression.kept_units)
            groups = engine.compression.prunable_groups
            smaller = ds_compress_finalized(engine)
            masked.zero_grad()
            torch.manual_seed(0)
            loss = logits_of(masked.train(), tokens()).square().mean()
            loss.backward()
            torch.manual_seed(0)
            other = logits_of(smaller.train(), tokens()).square().mean()
            other.backward()
        assert loss.item() == pytest.approx(other.item(), rel=1e-5)
        theirs = dict(smaller.named_parameters())
        for group in groups.values():
            for part in group.slices:
                parameter = dict(masked.named_parameters()).get(part.tensor)
                if parameter is None or parameter.grad is None:
                    continue
                units = torch.ones(group.units, dtype=torch.bool)
                units[kept[group.name]] = False
                assert not parameter.grad.index_select(part.dim, units.nonzero().flatten()).any()
                own = parameter.grad.index_select(part.dim, kept[group.name])
                torch.testing.assert_close(own, theirs[part.tensor].grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "granite_moe", "jamba"])
    def test_the_loss_that_balances_the_load_is_that_of_the_smaller_model(self, name: str) -> None:
        with engine_of(mixture(name), ds_config(0, block("l2", schedule_offset=1))) as engine:
            train(engine, 1)
            engine.eval()
            masked = engine.module(input_ids=tokens(), labels=tokens(), output_router_logits=True)
            final = ds_compress.finalize(engine)
        removed = final(input_ids=tokens(), labels=tokens(), output_router_logits=True)
        assert masked.aux_loss.item() == pytest.approx(removed.aux_loss.item(), rel=1e-5)
        assert masked.loss.item() == pytest.approx(removed.loss.item(), rel=1e-5)

    def test_weights_of_excluded_experts_are_zero(self) -> None:
        for name in ("mixtral", "stranger"):
            model: Any = built(name)
            with engine_of(model, ds_config(0, block("l2", schedule_offset=1))) as engine:
                train(engine, 3)
                for group, kept in engine.compression.kept_units.items():
                    structure = engine.compression.prunable_groups[group]
                    gone = sorted({*range(4)} - {*kept.tolist()})
                    for index in gone:
                        for part in structure.slices:
                            assert not model.get_parameter(part.tensor).select(part.dim, index).any()
                        for layer in structure.layers[index : index + 1]:
                            assert not any(p.any() for p in model.get_submodule(layer).parameters())

    def test_gradient_checkpointing_runs_the_same(self) -> None:
        results = []
        for checkpointing in (False, True):
            model: Any = mixture("mixtral")
            if checkpointing:
                model.gradient_checkpointing_enable()
            with engine_of(model, ds_config(0, block("l2", schedule_offset=1))) as engine:
                results.append(train(engine, 3))
        assert results[0] == pytest.approx(results[1], rel=1e-6)

    def test_hooks_leave_nothing_behind(self) -> None:
        model: Any = mixture("deepseek_v3")
        gate = model.model.layers[1].mlp.gate
        before = dict(vars(gate))
        with engine_of(model, ds_config(0, block("l2", schedule_offset=1))) as engine:
            train(engine, 2)
            assert gate.num_experts == 8 and gate.weight.shape == (8, 16)
            assert "weight" not in vars(gate) and isinstance(gate.weight, nn.Parameter)
            engine.compression.detach()
        assert not gate._forward_pre_hooks and vars(gate).keys() == before.keys()

    def test_a_router_that_goes_past_its_weights_is_refused(self) -> None:
        model: Any = mixture("mixtral")
        gate = model.model.layers[1].mlp.gate

        def all_the_same(hidden: torch.Tensor) -> Any:
            index = torch.zeros(hidden.shape[0], 2, dtype=torch.int64) + torch.tensor([2, 3])
            return None, torch.ones(hidden.shape[0], 2), index

        gate.forward = all_the_same
        with pytest.raises(ValueError, match=r"layers\.1\.mlp does not run with 2 of its 4"):
            for moe in moe_blocks(model):
                check_exclusion(ExpertRouting(model, moe), 2, 1)


def ds_compress_finalized(engine: Any) -> nn.Module:
    """A smaller copy of what is trained; the engine stays as it is."""
    from ds_compress.structure.apply_pruning import apply_pruning

    plan = engine.compression.pruning_plan()
    engine_hooks = {}
    for module in engine.module.modules():  # a copy would run the hooks of the original
        engine_hooks[module] = module._forward_pre_hooks, module._forward_hooks
        module._forward_pre_hooks, module._forward_hooks = type(module._forward_hooks)(), {}
    smaller = copy.deepcopy(engine.module)
    for module, (pre, post) in engine_hooks.items():
        module._forward_pre_hooks, module._forward_hooks = pre, post
    apply_pruning(smaller, plan)
    return smaller


class TestSchedule:
    def test_a_skipped_step_leaves_nothing(self) -> None:
        keys = block("frequency", schedule_offset=2, merge=True)
        with engine_of(mixture("mixtral"), ds_config(0, keys)) as engine:
            train(engine, 1)
            technique = engine.compression.techniques["expert_pruning"]
            before = copy.deepcopy(technique.state_dict())
            engine.train()
            logits_of(engine, tokens(4, 8, seed=7)).sum()
            technique.before_step(1)
            assert technique.kept and technique._changes
            technique.on_skipped_step()
            after = technique.state_dict()
            assert not technique.kept and not technique._changes
            for key in ("load", "load_before", "lost"):
                assert str(after[key]) == str(before[key])
            assert technique._routings["model.layers.0.mlp:experts"].kept is None

    @pytest.mark.parametrize("method", ["reap", "frequency"])
    def test_they_may_be_chosen_at_random_by_their_scores(self, method: str) -> None:
        kept = []
        for temperature, seed in ((0, 1), (5, 1), (5, 1), (5, 2), (5, 3)):
            randomize = {"temperature": temperature, "seed": seed}
            keys = block(method, schedule_offset=1, randomize=randomize)
            with engine_of(mixture("mixtral"), ds_config(0, keys)) as engine:
                train(engine, 2)
                kept.append({n: u.tolist() for n, u in engine.compression.kept_units.items()})
        assert kept[1] == kept[2] and any(other != kept[1] for other in kept[3:])
        assert {str([len(u) for u in units.values()]) for units in kept} == {
            str([len(u) for u in kept[0].values()])
        }

    def test_experts_go_one_after_the_other(self) -> None:
        keys = block("reap", schedule_offset=1, schedule_offset_end=4, schedule="linear", dense_ratio=0.25)
        seen = []
        with engine_of(mixture("llama4"), ds_config(0, keys)) as engine:
            technique = engine.compression.techniques["expert_pruning"]
            before = {*range(4)}
            for step in range(4):
                train(engine, 1, seed=step)
                now = set(next(iter(technique.kept.values()), torch.arange(4)).tolist())
                assert now <= before
                seen.append(len(now))
                before = now
        assert seen[-1] == 1 and sorted(seen, reverse=True) == seen and len(set(seen)) > 2

    @pytest.mark.parametrize("shrinks", [False, True])
    def test_metrics_tell_load_and_what_was_lost(self, shrinks: bool) -> None:
        keys = block("frequency", schedule_offset=1, shrink_at_end_of_schedule=shrinks)
        with engine_of(mixture("mixtral"), ds_config(0, keys)) as engine:
            train(engine, 16)
            found = engine.compression.metrics()
            metrics = {name.removeprefix("expert_pruning/"): value for name, value in found.items()}
        assert metrics["density"] == 0.5
        assert 0 < metrics["tokens_of_removed"] < 0.5  # half of the experts, those with the fewest tokens
        assert metrics["load_min_before"] < 1 < metrics["load_max_before"]
        assert 0 < metrics["load_entropy_before"] < 1
        assert (
            metrics["load_min"] == metrics["load_max"] == 1
        )  # two experts are left of which a token sees two
        assert metrics["load_entropy"] == pytest.approx(1)


class TestMerging:
    def test_weights_are_averaged_by_tokens(self) -> None:
        """A twin of expert 0 in all but its weights is merged into it, by the tokens of each."""
        model: Any = mixture("qwen3_moe")
        for layer in model.model.layers:
            rows = torch.eye(4, 16)
            rows[3] = rows[0] * 2
            layer.mlp.gate.weight.data.copy_(rows)
        config = ds_config(0, block("random", dense_ratio=0.75, schedule_offset=2, merge=True, seed=3))
        config["optimizer"]["params"]["lr"] = 0.0
        config["optimizer"]["params"]["weight_decay"] = 0.0
        with engine_of(model, config) as engine:
            technique = engine.compression.techniques["expert_pruning"]
            technique._scores = lambda: {
                name: torch.tensor([4.0, 3.0, 2.0, 1.0]) for name in technique.structures
            }
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            train(engine, 1)
            load = {name: values[1].clone() for name, values in technique.load.items()}
            train(engine, 1)
            for index in range(2):
                name = f"model.layers.{index}.mlp"
                tokens_of = load[f"{name}:experts"]
                share = (tokens_of[3] / (tokens_of[0] + tokens_of[3])).float()
                for key in ("gate_up_proj", "down_proj"):
                    old = before[f"{name}.experts.{key}"]
                    now = model.get_parameter(f"{name}.experts.{key}")
                    torch.testing.assert_close(now[0], (1 - share) * old[0] + share * old[3])
                    assert torch.equal(now[1:3], old[1:3]) and not now[3].any()

    @pytest.mark.parametrize("name", ["mixtral", "stranger"])
    def test_from_the_first_step_on(self, name: str) -> None:
        """Whatever the score: tokens of the first step count, and where none are known all experts count alike."""
        finals = []
        for merge in (False, True):
            with engine_of(built(name), ds_config(0, block("l2", schedule_offset=1, merge=merge))) as engine:
                train(engine, 1)
                finals.append(evaluated(ds_compress.finalize(engine)))
        assert (finals[0] - finals[1]).abs().max() > 1e-2

    @pytest.mark.parametrize("name", ["mixtral", "stranger"])
    def test_what_was_merged_is_not_merged_again(self, name: str) -> None:
        """Plain weights of a masked model, finalized by the config alone."""
        keys = block("l2", schedule_offset=1, merge=True)
        with engine_of(built(name), ds_config(0, keys)) as engine:
            train(engine, 2)
            plain = {key: value.clone() for key, value in engine.module.state_dict().items()}
            final = evaluated(ds_compress.finalize(engine))
        model = built(name)
        model.load_state_dict(plain)
        torch.testing.assert_close(evaluated(ds_compress.finalize(model, keys)), final, rtol=1e-5, atol=1e-5)

    def test_without_training_all_count_alike(self) -> None:
        keys: dict[str, Any] = {"method": "l2", "merge": True, "schedule_offset": 0}
        for name in ("mixtral", "stranger"):
            model: Any = built(name)
            plain, merged = copy.deepcopy(model), copy.deepcopy(model)
            ds_compress.finalize(plain, block(**{**keys, "merge": False}))
            ds_compress.finalize(merged, block(**keys))
            assert evaluated(plain).shape == evaluated(merged).shape
            assert not torch.equal(evaluated(plain), evaluated(merged))


def quantized(**shared: Any) -> dict[str, Any]:
    keys = {"enabled": True, "quantize_weight_in_forward": True, "schedule_offset": 0, **shared}
    groups = {"a": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["experts"]}}
    return {"weight_quantization": {"shared_parameters": keys, "different_groups": groups}}


BESIDE: dict[str, dict[str, Any]] = {
    "learned scales": quantized(granularity="per_channel", learned_scale=True),
    "learned scale": quantized(granularity="per_tensor", learned_scale=True),
    "static ranges": {"scheme": {"FP8": ["experts"]}},
    "global scales": {"scheme": {"NVFP4": ["experts"]}},
    "integers": {"scheme": {"W8A8": ["experts"]}},
    "zeros": {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "schedule_offset": 1, "method": "l1"},
            "different_groups": {"a": {"params": {"dense_ratio": 0.5}, "modules": ["experts"]}},
        }
    },
    "fewer layers": {
        "depth_pruning": {"shared_parameters": {"enabled": True, "dense_ratio": 0.5, "schedule_offset": 2}}
    },
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
class TestBesideOthers:
    def test_removed_equals_masked_and_training_goes_on(self, name: str, beside: str) -> None:
        losses = {}
        for shrinks in (False, True):
            blocks = {
                **block("reap", shrink_at_end_of_schedule=shrinks, merge=beside == "zeros"),
                **copy.deepcopy(BESIDE[beside]),
            }
            if "depth_pruning" in blocks:
                blocks["depth_pruning"]["shared_parameters"]["shrink_at_end_of_schedule"] = shrinks
            model = mixture(name, intermediate_size=32)
            with engine_of(model, ds_config(3 if shrinks else 0, blocks)) as engine:
                losses[shrinks] = train(engine, 5)
                masked = evaluated(engine)
                final: Any = ds_compress.finalize(engine)
            assert final.config.num_local_experts == 2
            torch.testing.assert_close(evaluated(final), masked, rtol=1e-5, atol=1e-5)
        assert losses[True] == pytest.approx(losses[False], rel=1e-5)


class TestRefusals:
    def refused(self, name: str, **keys: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            ds_compress.plan(built(name), block(**keys))
        return str(caught.value)

    def test_fewer_than_the_router_chooses(self) -> None:
        text = self.refused("mixtral", dense_ratio=0.25)
        assert "leaves 1 of 4 in model.layers.0.mlp" in text and "leaves 2 or more" in text

    def test_fewer_than_a_group_of_the_router_needs(self) -> None:
        text = self.refused("deepseek_v3", dense_ratio=0.25)
        assert "leaves 2 of 8" in text and "leaves 4 or more" in text and "in 2 groups" in text

    def test_scores_that_a_list_of_experts_does_not_show(self) -> None:
        assert "ModuleList" in self.refused("stranger", method="reap")

    def test_a_model_without_experts(self) -> None:
        from tests.models import tiny_bert

        with pytest.raises(ConfigError, match="mixture of experts"):
            ds_compress.plan(tiny_bert(), block())

    def test_methods_that_do_not_fit(self) -> None:
        for method in ("topk", "activation"):
            assert "method" in self.refused("mixtral", method=method)
        assert "scope" in self.refused("mixtral", scope="global")
