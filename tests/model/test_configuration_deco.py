# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What a configuration refuses, what it derives, and that the cut vision tower computes what the whole one does."""

import copy
import json
import re

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel

from modeling_deco import DecoConfig, DecoModel, num_image_tokens

NUM_PREFIX_TOKENS = {"clip": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2_with_registers": 5}


def vision_config(vision, **kwargs):
    return AutoConfig.for_model(**{**tiny.VISION_CONFIGS[vision], **kwargs})


def config_of_tower(given, **kwargs):
    choices = {"image_token_id": 3, "pooled_grid_size": 3, **kwargs}
    return DecoConfig(vision_config=given, text_config=tiny.TEXT_CONFIGS["llama"], **choices)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "asked_for"), [(7, "7 x 7"), ([7, 6], "7 x 6"), ([6, 7], "6 x 7"), ([1, 36], "1 x 36")]
)
@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
def test_a_grid_larger_than_the_patches_is_refused(vision, grid, asked_for):
    message = f"pooled_grid_size={grid}: {asked_for} is larger than the 6 x 6 patches of the vision tower"
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.build_config(vision, pooled_grid_size=grid)


@pytest.mark.parametrize("grid", [0, -2, [3], [3, 3, 3], [3, 0], []])
def test_a_grid_without_two_positive_sides_is_refused(grid):
    message = f"must be a positive int (a square grid) or two positive ints [rows, cols], got {grid}."
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.build_config(pooled_grid_size=grid)


@pytest.mark.parametrize("grid", ["3", True, 3.0, None, [3, 2.5], [True, 3]])
def test_a_grid_of_another_type_is_refused(grid):
    with pytest.raises(StrictDataclassError, match="'pooled_grid_size'"):
        tiny.build_config(pooled_grid_size=grid)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_feature_layer_that_the_tower_lacks_is_refused(layer):
    message = f"vision_feature_layer={layer} selects no layer of a vision tower with 3; it must be -3 to -1 or 1 to 3"
    with pytest.raises(ValueError, match=message):
        tiny.build_config(vision_feature_layer=layer)


def test_several_feature_layers_are_refused():
    with pytest.raises(StrictDataclassError, match=r"'vision_feature_layer' expected int, got list .*\[-2, -1\]"):
        tiny.build_config(vision_feature_layer=[-2, -1])


@pytest.mark.parametrize("token", [-1, 64, 32000])
def test_an_image_token_outside_the_vocabulary_is_refused(token):
    message = rf"image_token_id={token} is not in the vocabulary of text_config \(vocab_size=64\); it must be 0 to 63"
    with pytest.raises(ValueError, match=message):
        tiny.build_config(image_token_id=token)


@pytest.mark.parametrize(("vision", "num_tokens"), [("clip", 1), ("dinov2", 1), ("dinov2_with_registers", 5)])
def test_prefix_tokens_in_the_grid_are_refused(vision, num_tokens):
    with pytest.raises(
        ValueError, match=rf"'full' keeps prefix tokens of {vision}.* \({num_tokens}\), .* use 'default'"
    ):
        tiny.build_config(vision, vision_feature_select_strategy="full")


@pytest.mark.parametrize("vision", ["siglip", "siglip2"])
def test_full_features_are_taken_from_towers_without_prefix_tokens(vision):
    config = tiny.build_config(vision, vision_feature_select_strategy="full")
    assert config.num_prefix_tokens == 0
    assert "vision_feature_select_strategy" not in config.to_dict()


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("projector_type", "perceiver", "one of mlp, avg_pool, qformer, resampler, c_abstractor, d_abstractor"),
        ("projector_num_layers", 0, "at least 1"),
        ("vision_feature_select_strategy", "cls", "'default' or 'full'"),
    ],
)
def test_an_unknown_choice_is_refused_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} must be {allowed}, got {value!r}"):
        tiny.build_config(**{field: value})


@pytest.mark.parametrize("model_type", ["vit", "clip", "llama"])
def test_an_unknown_vision_tower_is_refused_with_those_that_are_known(model_type):
    known = (
        "['clip_vision_model', 'convnext', 'convnextv2', 'dinov2', 'dinov2_with_registers', 'efficientnet', "
        "'mobilenet_v1', 'mobilenet_v2', 'regnet', 'resnet', 'siglip2_vision_model', 'siglip_vision_model', "
        "'timm_wrapper']"
    )
    with pytest.raises(ValueError, match=re.escape(f"must be one of {known}, got '{model_type}'")):
        DecoConfig(vision_config={"model_type": model_type})


def test_a_grid_that_was_set_too_large_is_not_saved(tmp_path):
    config = tiny.build_config()
    config.pooled_grid_size = 8
    with pytest.raises(ValueError, match="pooled_grid_size=8: 8 x 8 is larger than the 6 x 6 patches"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_num_layers": 10_000_000}, "projector_num_layers must be at most 64, got 10000000"),
        (
            {"projector_type": "qformer", "projector_config": {"num_hidden_layers": 10**7}},
            "projector_config['num_hidden_layers'] must be at most 1024, got 10000000",
        ),
        (
            {"vision_config": {"image_size": 10**6}},
            "image_size must be an int of 1 to 16384, got 1000000",
        ),
        (
            {"vision_config": {"image_size": [24, 10**6]}},
            "image_size must be an int of 1 to 16384, got [24, 1000000]",
        ),
        (
            {"vision_config": {"num_hidden_layers": 10**12}},
            "vision_config.num_hidden_layers must be an int of 1",
        ),
        ({"vision_config": {"patch_size": 0}}, "vision_config.patch_size must be an int of 1 to 1024, got 0"),
        ({"text_config": {"num_hidden_layers": 10**12}}, "text_config.num_hidden_layers must be an int of 1 to 1024"),
        ({"text_config": {"model_type": "qwen2", "num_hidden_layers": 10**12}}, "must be an int of 1 to 1024"),
        ({"text_config": {"model_type": "gpt2", "n_layer": 10**12}}, "must be an int of 1 to 1024, got 1000000000000"),
        ({"text_config": {"hidden_size": -4}}, "text_config.hidden_size must be an int of 1 to 262144, got -4"),
        ({"text_config": {"vocab_size": 10**12}}, "text_config.vocab_size must be an int of 1 to 4194304"),
        (
            {"text_config": {"model_type": "t5"}},
            "text_config.model_type must be that of a decoder-only",
        ),
        ({"text_config": {"model_type": "clip"}}, "must be that of a decoder-only language model, got 'clip'"),
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_anything_is_built(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DecoConfig(**fields)


# --- the cut of the vision tower -------------------------------------------------------------------------------------


def used_layers(vision_config, **kwargs) -> int:
    return DecoConfig(vision_config=vision_config, **kwargs).vision_config.num_hidden_layers


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
@pytest.mark.parametrize(
    "passed_on",
    [
        lambda config: config.vision_config,
        lambda config: config.vision_config.to_dict(),
        lambda config: copy.deepcopy(config.vision_config),
        lambda config: DecoConfig.from_dict(config.to_dict()).vision_config,
        lambda config: DecoConfig(**config.to_dict()).vision_config,
        lambda config: DecoConfig(vision_config=config.vision_config, pooled_grid_size=1).vision_config,
        lambda config: json.loads(config.to_json_string())["vision_config"],
    ],
    ids=["object", "dict", "copy", "from_dict", "fields", "a third", "json"],
)
def test_a_tower_that_was_cut_is_not_cut_again(vision, passed_on):
    choices = {"vision_config": {**tiny.VISION_CONFIGS[vision], "num_hidden_layers": 8}, "pooled_grid_size": 1}
    for layer, expected in ((None, 7), (-1, 8), (-3, 6), (5, 5)):  # of 8 layers; the default is -2
        other = DecoConfig(**choices, vision_feature_layer=layer)
        assert used_layers(passed_on(other), pooled_grid_size=1) == expected
        assert used_layers(passed_on(other), pooled_grid_size=1, vision_feature_layer=-1) == expected


def test_a_layer_that_is_asked_of_a_tower_that_was_cut_counts_as_in_the_uncut_one():
    other = tiny.build_config()
    assert other.vision_config.num_hidden_layers == 2  # of 3
    assert used_layers(other.vision_config, pooled_grid_size=3, vision_feature_layer=-2) == 2
    assert used_layers(other.vision_config, pooled_grid_size=3, vision_feature_layer=-3) == 1
    assert used_layers(other.vision_config, pooled_grid_size=3, vision_feature_layer=1) == 1
    with pytest.raises(ValueError, match="vision_feature_layer=3 selects no layer of a vision tower with 2"):
        DecoConfig(vision_config=other.vision_config, pooled_grid_size=3, vision_feature_layer=3)
    third = DecoConfig(vision_config=other.vision_config, pooled_grid_size=3, vision_feature_layer=-3)
    assert third.vision_config.num_cut_layers == 2  # of 3 in all, one of them before
    with pytest.raises(ValueError, match="vision_feature_layer=-4 .* with 1; it must be -3 to -1 or 1 to 1"):
        DecoConfig(vision_config=third.vision_config, pooled_grid_size=3, vision_feature_layer=-4)


def test_a_whole_tower_serves_two_configs():
    whole = AutoConfig.for_model(**tiny.VISION_CONFIGS["clip"])
    assert [used_layers(whole, pooled_grid_size=3, vision_feature_layer=layer) for layer in (None, -1, -2)] == [
        2,
        3,
        2,
    ]
    assert whole.num_hidden_layers == 3


def test_a_config_that_was_saved_before_towers_said_how_they_were_cut_is_not_cut():
    saved = tiny.build_config().to_dict()
    del saved["vision_config"]["num_cut_layers"]
    loaded = DecoConfig(**saved)
    assert loaded.vision_config.num_hidden_layers == 2
    assert used_layers(loaded.vision_config, pooled_grid_size=3) == 2


# --- choices and consequences ----------------------------------------------------------------------------------------


def test_the_default_is_deco_on_llava():
    config = DecoConfig()
    assert config.vision_config.model_type == "clip_vision_model"
    assert config.patch_grid == (24, 24)
    assert config.num_image_tokens == 144
    assert config.text_config.model_type == "llama"
    assert config.text_config.vocab_size == 32064
    assert config.image_token_id == 32000


@pytest.mark.parametrize(("grid", "num_tokens"), [(1, 1), (3, 9), ([2, 5], 10), ((5, 2), 10)])
def test_the_number_of_image_tokens_is_rows_times_cols(grid, num_tokens):
    assert tiny.build_config(pooled_grid_size=grid).num_image_tokens == num_image_tokens(grid) == num_tokens


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
def test_prefix_tokens_are_counted(vision):
    assert tiny.build_config(vision).num_prefix_tokens == NUM_PREFIX_TOKENS[vision]


def test_the_patch_grid_of_a_tower_may_be_wide():
    config = config_of_tower(vision_config("dinov2", image_size=[24, 40]), pooled_grid_size=[6, 10])
    assert config.patch_grid == (6, 10)


def test_a_part_of_a_patch_at_the_edge_is_no_patch():
    assert config_of_tower(vision_config("clip", image_size=27)).patch_grid == (6, 6)


@pytest.mark.parametrize(("tied", "text"), [(False, "llama"), (True, "gemma")])
def test_embeddings_are_tied_where_the_text_config_ties_them(tied, text):
    assert tiny.build_config(text=text).tie_word_embeddings is tied


def test_the_image_token_answers_to_its_name_in_llava():
    assert tiny.build_config().image_token_index == tiny.IMAGE_TOKEN_ID


# --- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
@pytest.mark.parametrize("text", tiny.TEXT_CONFIGS)
def test_a_saved_config_is_loaded_as_it_was(vision, text, tmp_path):
    config = tiny.build_config(vision, text)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DecoConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


@pytest.mark.parametrize(("grid", "stored"), [(3, 3), ([2, 3], [2, 3]), ((2, 3), [2, 3]), ([3, 3], [3, 3])])
def test_the_grid_is_stored_as_it_was_given(grid, stored, tmp_path):
    tiny.build_config(pooled_grid_size=grid).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pooled_grid_size"] == stored
    loaded = DecoConfig.from_pretrained(tmp_path).pooled_grid_size
    assert (type(loaded), loaded) == (type(stored), stored)


def test_choices_of_other_values_than_the_defaults_are_kept(tmp_path):
    choices = {
        "projector_num_layers": 3,
        "projector_hidden_act": "relu",
        "multimodal_projector_bias": False,
        "tie_word_embeddings": True,
    }
    tiny.build_config(**choices).save_pretrained(tmp_path)
    loaded = DecoConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in choices} == choices


# --- unused vision layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
@pytest.mark.parametrize(("layer", "num_used"), [(-1, 3), (-2, 2), (-3, 1), (3, 3), (2, 2), (1, 1)])
def test_only_the_layers_that_are_used_are_kept(vision, layer, num_used):
    config = tiny.build_config(vision, vision_feature_layer=layer)
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (num_used, -1)


def test_layers_are_not_cut_twice(tmp_path):
    for _ in range(2):
        tiny.build_config(vision_feature_layer=-2).save_pretrained(tmp_path)
        config = DecoConfig.from_pretrained(tmp_path)
    again = DecoConfig(**copy.deepcopy(config).to_dict())
    assert config.vision_config.num_hidden_layers == again.vision_config.num_hidden_layers == 2


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_the_given_vision_config_is_not_changed(vision, layer):
    given = vision_config(vision)
    before = given.to_dict()
    config_of_tower(given, vision_feature_layer=layer)
    assert given.to_dict() == before


@pytest.mark.parametrize("vision", ["siglip", "siglip2"])
def test_the_pooling_head_of_siglip_is_left_out(vision):
    tower = DecoModel(tiny.build_config(vision, vision_feature_layer=-1)).vision_tower
    assert not [name for name, _ in tower.named_parameters() if "head" in name]


@pytest.mark.parametrize("vision", ["dinov2", "dinov2_with_registers"])
def test_the_layers_of_dinov2_have_as_many_names(vision):
    assert tiny.build_config(vision).vision_config.stage_names == ["stem", "stage1", "stage2"]


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2, 3])
def test_the_cut_tower_gives_the_features_of_the_whole_tower_bit_for_bit(vision, layer):
    whole = tiny.randomize(AutoModel.from_config(vision_config(vision)))
    model = DecoModel(tiny.build_config(vision, vision_feature_layer=layer)).eval()
    missing, _ = model.vision_tower.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    pixel_values = tiny.pixels(2)
    with torch.no_grad():
        inputs = model._tower_inputs(pixel_values, None, None)
        expected = whole(**inputs, output_hidden_states=True).hidden_states[layer]
        features = model.get_image_features(pixel_values, return_dict=True).hidden_states[-1]
    assert expected.shape == (2, NUM_PREFIX_TOKENS[vision] + 36, 32)
    assert torch.equal(features, expected)
