"""Models of two towers of equal depth: what shortens one leaves the other, and every config says the truth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers as hf
from torch import nn

import ds_compress
from ds_compress import ConfigError, plan
from ds_compress.modelinfo.layers import find_layers
from ds_compress.structure.model_config import configs_of_stack
from tests.multirank.common import ds_config

pytestmark = pytest.mark.usefixtures("single_process")

DEPTH = 4


def clip() -> Any:
    text = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4,
                max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4, image_size=16,
                  patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    # DeepSpeed cannot broadcast a parameter without dimensions.
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    return model


def siglip() -> Any:
    text = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4,
                max_position_embeddings=16)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4, image_size=16,
                  patch_size=8)  # fmt: skip
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision))


def gemma3() -> Any:
    text = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, sliding_window=8)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=DEPTH, num_attention_heads=4, image_size=16,
                  patch_size=8)  # fmt: skip
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


def t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=61,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=DEPTH,
            num_decoder_layers=DEPTH,
            num_heads=4,
        )
    )


def twins() -> Any:
    """Two encoders of the same class, with equal configs."""
    config = hf.BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4,
                           intermediate_size=64)  # fmt: skip
    return nn.ModuleDict({"query": hf.BertModel(config), "passage": hf.BertModel(copy.deepcopy(config))})


def depths(model: Any) -> dict[str, int]:
    """What each tower's config says, by the stack that it is of; from the composite config where there is one."""
    if isinstance(model, nn.ModuleDict):
        return {name: tower.config.num_hidden_layers for name, tower in model.items()}
    config = model.config
    if hasattr(config, "num_decoder_layers"):
        return {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    return {"text": config.text_config.num_hidden_layers, "vision": config.vision_config.num_hidden_layers}


TOWERS = [
    (clip, "vision_model.encoder.layers", "vision"),
    (clip, "text_model.encoder.layers", "text"),
    (siglip, "vision_model.encoder.layers", "vision"),
    (gemma3, "vision_tower.encoder.layers", "vision"),
    (gemma3, "language_model.layers", "text"),
    (t5, "encoder.block", "encoder"),
    (t5, "decoder.block", "decoder"),
    (twins, "passage.encoder.layer", "passage"),
]


def reduced(model: Any, block: dict[str, Any]) -> Any:
    from ds_compress import compat

    return compat.init_compression(model, {"compression_training": block})


@pytest.mark.parametrize(("make", "prefix", "tower"), TOWERS)
def test_layer_reduction_of_one_tower(make: Any, prefix: str, tower: str) -> None:
    model = make()
    before = depths(model)
    block = {"layer_reduction": {"enabled": True, "teacher_layer": [0, 2], "module_name_prefix": prefix}}
    reduced(model, block)
    assert len(find_layers(model, prefix)[1]) == 2
    assert depths(model) == {**before, tower: 2}
    held = {
        m.config.num_hidden_layers for m in find_layers(model, prefix)[1].modules() if hasattr(m, "config")
    }
    assert held <= {2, DEPTH} if make is t5 else held <= {2}


@pytest.mark.parametrize(("make", "prefix", "tower"), TOWERS[:7])
def test_depth_pruning_of_one_tower(make: Any, prefix: str, tower: str) -> None:
    model = make()
    before = depths(model)
    shared = {"enabled": True, "dense_ratio": 0.5, "method": "l1", "module_name_prefix": prefix}
    block = {"depth_pruning": {"shared_parameters": shared}}
    made = plan(model, block)
    (target,) = made.structures["depth_pruning"].targets
    units = target.structure.units
    ds_compress.finalize(model, block)
    left = depths(model)
    assert left == {**before, tower: left[tower]}
    assert left[tower] == len(find_layers(model, prefix)[1]) == DEPTH - units + round(units / 2)


def test_what_is_saved_loads_with_the_same_features(tmp_path: Path) -> None:
    model = clip().eval()
    block = {
        "layer_reduction": {
            "enabled": True,
            "keep_number_layer": 2,
            "module_name_prefix": "vision_model.encoder.layers",
        }
    }
    reduced(model, block)
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))
    model.save_pretrained(tmp_path)
    loaded, info = hf.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(3, 61, (2, 8))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.rand(2, 3, 16, 16))
    with torch.no_grad():
        ours, theirs = model(**inputs), loaded.eval()(**inputs)
    assert torch.equal(ours.text_embeds, theirs.text_embeds)
    assert torch.equal(ours.image_embeds, theirs.image_embeds)


def test_depth_pruning_in_training_and_the_export_of_it(tmp_path: Path) -> None:
    model = clip()
    shared = {
        "enabled": True,
        "dense_ratio": 0.5,
        "method": "l1",
        "module_name_prefix": "vision_model.encoder.layers",
    }
    config = ds_config(2, {"depth_pruning": {"shared_parameters": shared}})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    ids = torch.randint(3, 61, (4, 8))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.rand(4, 3, 16, 16))
    for _ in range(2):
        engine.backward(engine(**batch, return_loss=True).loss)
        engine.step()
    ds_compress.finalize(engine)
    assert depths(model) == {"text": DEPTH, "vision": 2}
    engine.destroy()


def test_two_towers_without_a_prefix_are_told_the_key() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(clip(), {"depth_pruning": {"dense_ratio": 0.5}})
    (problem,) = caught.value.problems
    assert "module_name_prefix" in problem.hint and "vision_model.encoder.layers" in problem.hint


def test_a_prefix_that_is_no_stack() -> None:
    block = {
        "depth_pruning": {"dense_ratio": 0.5, "shared_parameters": {"module_name_prefix": "vision.layers"}}
    }
    with pytest.raises(ConfigError) as caught:
        plan(clip(), block)
    (problem,) = caught.value.problems
    assert problem.path == "compression_training.depth_pruning.shared_parameters.module_name_prefix"
    assert "vision_model.encoder.layers" in problem.hint


def test_the_configs_of_a_stack_are_those_of_its_tower() -> None:
    model = clip()
    (config,) = configs_of_stack(model, "vision_model.encoder.layers", DEPTH)
    assert config is model.config.vision_config
    assert configs_of_stack(model, "vision_model.encoder.layers", DEPTH + 1) == []


def test_a_copied_config_is_written_too() -> None:
    model = clip()
    model.vision_model.config = copy.deepcopy(model.vision_model.config)
    configs = configs_of_stack(model, "vision_model.encoder.layers", DEPTH)
    assert any(config is model.config.vision_config for config in configs)
    assert any(config is model.vision_model.config for config in configs)
    assert not any(config is model.config.text_config for config in configs)
