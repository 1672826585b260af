"""Formats in `params` of both quantization blocks: what they fix, what they exclude, and when they begin."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress.config.resolve.resolver import resolve
from ds_compress.config.schema.compression_training import parse_config
from ds_compress.config.schema.formats import stretch_at
from ds_compress.errors import ConfigError
from ds_compress.techniques.weight_quantization import WeightQuantization
from tests.models import tiny_bert, tiny_llama


def weights(params: dict[str, Any], modules: str = "layers", **shared: Any) -> dict[str, Any]:
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"all": {"params": params, "modules": [modules]}},
        }
    }


def inputs(params: dict[str, Any], modules: str = "layers", **shared: Any) -> dict[str, Any]:
    return {"activation_quantization": weights(params, modules, **shared)["weight_quantization"]}


NVFP4, FP8 = {"format": "nvfp4"}, {"format": "fp8_e4m3"}
EARLIER = [{"format": "fp8_e4m3", "steps": 3}]
PACKED = {"frozen_weights": "packed"}


@pytest.mark.parametrize(
    ("block", "key", "words"),
    [
        (weights({"format": "nvfp4", "target_bits": 4}), "params.target_bits", "nvfp4 has 4 bits"),
        (weights({"format": "mxfp4", "group_size": 16}), "params.group_size", "32, which mxfp4 fixes"),
        (weights({"format": "mxfp8", "granularity": "per_channel"}), "params.granularity", "each 32 inputs"),
        (weights({"format": "fp8_e5m2"}), "params.format", "fp8_e4m3 for weights"),
        (weights({}), "params.target_bits", "a whole number >= 1 and <= 8"),
        (weights({"target_bits": 4, "group_size": 32}), "params.group_size", "per_column_group"),
        (
            weights({"target_bits": 8, "granularity": "per_block"}),
            "params.granularity",
            "no format stores it",
        ),
        (weights(NVFP4, quantization_type="asymmetric"), "shared_parameters.quantization_type", "for floats"),
        (
            weights({**NVFP4, "earlier_formats": EARLIER}, scales="static"),
            "params.earlier_formats",
            '"dynamic"',
        ),
        (
            weights(NVFP4, scales="static", schedule_offset=3),
            "shared_parameters.schedule_offset",
            "0, because",
        ),
        (weights(NVFP4, train="scales"), "shared_parameters.train", 'scales "learned"'),
        (weights(NVFP4, learned_scale=True, scales="static"), "shared_parameters.scales", '"learned"'),
        (weights(NVFP4, scales="learned", **PACKED), "shared_parameters.scales", '"dynamic"'),
        (weights(NVFP4, schedule_offset=2, **PACKED), "shared_parameters.schedule_offset", "packed"),
        (weights({"format": "mxfp6_e2m3"}, **PACKED), "params", "4 or 8 bits"),
        (inputs({"format": "nf4"}), "params.format", "nf4 is for weights"),
        (inputs({}), "params.bits", "a whole number >= 4 and <= 8"),
        (inputs({"format": "mxfp8", "bits": 8}), "params.bits", "mxfp8 has 8 bits"),
        (inputs({"format": "mxfp4"}, range_calibration="static"), "params.format", "always dynamic"),
        (inputs(FP8, range_momentum=0.5), "shared_parameters.range_momentum", '"static"'),
    ],
)
def test_a_conflict_names_the_key_and_the_way_out(block: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(block)
    (name,) = block
    group = "" if key.startswith("shared") else "different_groups.all."
    found = [p for p in caught.value.problems if p.path == f"compression_training.{name}.{group}{key}"]
    assert len(found) == 1, caught.value
    assert words in found[0].allowed + found[0].hint


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (weights(NVFP4, **PACKED), "every weight that the block claims trains"),
        (weights(FP8, kernel="fp8"), "activation_quantization is enabled"),
        (weights(FP8, kernel="fp8") | inputs({"bits": 8}), "whose input has no codes"),
        (weights(NVFP4, kernel="fp8") | inputs(FP8), "whose weight has no codes"),
        (weights(NVFP4, kernel="int8") | inputs({"bits": 8}), "in nvfp4"),
        (inputs({"format": "fp8_e4m3", "granularity": "per_token_group"}), "multiple of 128"),
    ],
)
def test_what_a_model_cannot_do_is_said_before_it_trains(block: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tiny_llama(hidden=64, intermediate=64), block)
    assert words in str(caught.value)


@pytest.mark.parametrize("given", [{"learned_scale": True}, {"scales": "searched"}])
def test_given_scales_of_columns_that_are_cut_are_refused(given: dict[str, Any]) -> None:
    cut = {
        "row_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1", "dense_ratio": 0.5, "round_to": 16},
        }
    }
    block = weights(NVFP4, "mlp", **given) | cut
    with pytest.raises(ConfigError) as caught:
        resolve(tiny_llama(hidden=64, intermediate=64), block)
    (problem,) = caught.value.problems
    assert "down_proj" in problem.got and "dynamic" in problem.hint and "up_proj" not in problem.got
    resolve(tiny_llama(hidden=64, intermediate=64), weights(NVFP4, "mlp") | cut)
    resolve(tiny_llama(hidden=64, intermediate=64), weights(FP8, "mlp", **given) | cut)


def test_an_embedding_has_no_square_blocks() -> None:
    block = weights({"format": "fp8_e4m3", "granularity": "per_block"}, "word_embeddings")
    with pytest.raises(ConfigError, match="a square cuts across rows"):
        resolve(tiny_bert(hidden=128), block)


def test_a_schedule_of_formats_goes_from_one_to_the_next() -> None:
    earlier = [{"format": "int", "bits": 6, "steps": 2}, {"format": "fp8_e4m3", "steps": 3}]
    block = weights({"format": "nvfp4", "earlier_formats": earlier}, "layers", schedule_offset=1)
    plan = resolve(tiny_llama(hidden=64, intermediate=64), block)
    technique = plan.techniques["weight_quantization"]
    made = WeightQuantization(technique, 0)
    made.prepare(tiny_llama(hidden=64, intermediate=64))
    name = technique.targets[0].module_name
    found = []
    for step in range(8):
        made._use_schedule_at(step)
        fake_quant = made._quantizers[name].fake_quant
        found.append(None if fake_quant is None else (fake_quant.grid.format, fake_quant.grid.bits))
    assert found == [None, *[("int", 6)] * 2, *[("fp8_e4m3", 8)] * 3, *[("nvfp4", 4)] * 2]
    params = technique.targets[0].params
    assert params.last_drop(1) == 6 and stretch_at(params, 5) == (None, 5)
    config = parse_config(block)
    assert config.weight_quantization is not None
    (end,) = config.weight_quantization.schedule_ends()
    assert (end.step, end.keys[-1]) == (6, "earlier_formats")
