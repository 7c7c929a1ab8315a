# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Two pretrained backbones joined under a fresh projector: what is taken over, what is new, what is left behind."""

import pytest
import tiny
import torch
from safetensors import safe_open
from tiny import batch, pixels, prompt
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from modeling_deco import DecoForConditionalGeneration, DecoProcessor

TEXT_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}
VISION_SOURCES = [*tiny.VISION_CONFIGS, "whole clip", "whole siglip"]
NUM_WORDS = tiny.IMAGE_TOKEN_ID  # of the text models here, whose vocabulary has no "<image>"


def build_vision_source(name):
    if name == "whole clip":
        return CLIPModel(
            CLIPConfig(text_config=TEXT_TOWER, vision_config=tiny.VISION_CONFIGS["clip"], projection_dim=16)
        )
    if name == "whole siglip":
        return SiglipModel(SiglipConfig(text_config=TEXT_TOWER, vision_config=tiny.VISION_CONFIGS["siglip"]))
    return AutoModel.from_config(AutoConfig.for_model(**tiny.VISION_CONFIGS[name]))


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    """A function from the name of a vision source to a folder with it."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
            tiny.randomize(build_vision_source(name)).save_pretrained(folders[name])
            tiny.build_image_processor().save_pretrained(folders[name])
        return folders[name]

    return folder_of


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A function from the name of a text model to a folder with it, its tokenizer and its generation config."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            config = AutoConfig.for_model(**{**tiny.TEXT_CONFIGS[name], "vocab_size": NUM_WORDS})
            text_model = tiny.randomize(AutoModelForCausalLM.from_config(config), seed=1)
            text_model.generation_config.max_new_tokens = 7
            text_model.to(torch.bfloat16).save_pretrained(folders[name])
            tiny.build_tokenizer(with_image_token=False).save_pretrained(folders[name])
        return folders[name]

    return folder_of


@pytest.fixture
def join(vision_folder, text_folder):
    def joined(vision="clip", text="llama", **kwargs):
        choices = {"pooled_grid_size": 3, "dtype": torch.float32, **kwargs}
        return DecoForConditionalGeneration.from_vision_text_pretrained(
            vision_folder(vision), text_folder(text), **choices
        )

    return joined


@pytest.mark.parametrize("vision", VISION_SOURCES)
def test_the_vision_tower_has_the_weights_of_its_source(vision, join, vision_folder):
    source = AutoModel.from_pretrained(vision_folder(vision))
    expected = getattr(source, "vision_model", source).state_dict()
    tower = join(vision).model.vision_tower.state_dict()
    assert tower
    for name, weight in tower.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("text", tiny.TEXT_CONFIGS)
def test_the_language_model_has_the_weights_of_its_source(text, join, text_folder):
    source = AutoModelForCausalLM.from_pretrained(text_folder(text), dtype=torch.float32)
    model = join(text=text)
    weights = {**model.model.language_model.state_dict(), "lm_head.weight": model.lm_head.weight}
    for name, expected in source.state_dict().items():
        found = weights[name.removeprefix("model.")]
        assert torch.equal(found[: len(expected)], expected), name


@pytest.mark.parametrize("vision", VISION_SOURCES)
def test_layers_that_are_not_read_are_neither_built_nor_stored(vision, join, tmp_path):
    model = join(vision)
    assert model.config.vision_config.num_hidden_layers == 2
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.vision_tower.")]
    assert any(".1." in name for name in names)
    assert not [name for name in names if ".2." in name or ".head." in name]


def test_the_features_are_those_of_the_layer_below_the_last_of_the_source(join, vision_folder):
    source = AutoModel.from_pretrained(vision_folder("whole clip")).vision_model
    expected = source(pixels(2), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(join("whole clip").get_image_features(pixels(2)).hidden_states[-1], expected)


@pytest.mark.parametrize("text", ["llama", "gemma"])
def test_embeddings_grow_to_a_multiple_of_64_for_the_image_token(text, join):
    model = join(text=text)
    assert model.config.image_token_id == NUM_WORDS
    assert model.config.text_config.vocab_size == 64
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (64, 32)


def test_embeddings_do_not_grow_where_the_image_token_has_a_row(join):
    model = join(image_token_id=5)
    assert model.config.image_token_id == 5
    assert model.config.text_config.vocab_size == len(model.get_input_embeddings().weight) == NUM_WORDS


@pytest.mark.parametrize(("text", "tied"), [("llama", False), ("gemma", True)])
def test_embeddings_are_tied_as_in_the_language_model(text, tied, join, tmp_path):
    model = join(text=text)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied
    loaded = DecoForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_the_projector_is_fresh(join):
    projector = join().model.multi_modal_projector
    for name, parameter in projector.named_parameters():
        expected = 0 if name.endswith("bias") else 0.02  # the language model's initializer_range
        assert parameter.std().item() == pytest.approx(expected, rel=0.2), name
        assert parameter.requires_grad


@pytest.mark.parametrize("vision", VISION_SOURCES)
@pytest.mark.parametrize("text", ["llama", "gemma"])
def test_no_tensor_is_left_empty(vision, text, join):
    model = join(vision, text)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "cpu", name
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize(("dtype", "found"), [("auto", torch.bfloat16), (torch.float32, torch.float32)])
def test_all_parts_have_one_dtype(dtype, found, join):
    """The tower's file is in float32 and the language model's in bfloat16, which "auto" takes for both."""
    assert {parameter.dtype for parameter in join(dtype=dtype).parameters()} == {found}


@pytest.mark.newest
@pytest.mark.parametrize("vision", VISION_SOURCES)
def test_the_joined_model_answers_the_same_after_saving_and_loading(vision, join, tmp_path):
    model = join(vision)
    model.save_pretrained(tmp_path)
    loaded = DecoForConditionalGeneration.from_pretrained(tmp_path)
    inputs = {**batch(prompt(9, "what is this ?")), "pixel_values": pixels(1)}
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    assert torch.equal(model.generate(**inputs, do_sample=False), loaded.generate(**inputs, do_sample=False))


def test_the_generation_config_is_that_of_the_language_model(join, tmp_path):
    join().save_pretrained(tmp_path)
    assert DecoForConditionalGeneration.from_pretrained(tmp_path).generation_config.max_new_tokens == 7


def test_the_model_is_in_evaluation_mode(join):
    assert not any(module.training for module in join().modules())


def test_fields_of_the_config_are_passed_on(join):
    config = join(pooled_grid_size=[2, 3], projector_num_layers=3, vision_feature_layer=-1).config
    assert (config.pooled_grid_size, config.projector_num_layers) == ([2, 3], 3)
    assert config.vision_config.num_hidden_layers == 3


def test_the_processor_that_goes_with_it_has_the_same_image_token_and_patch_size(join, vision_folder, text_folder):
    processor = DecoProcessor.from_vision_text_pretrained(
        vision_folder("clip"), text_folder("llama"), pooled_grid_size=3, chat_template=tiny.CHAT_TEMPLATE
    )
    model = join()
    assert processor.image_token_id == model.config.image_token_id
    assert processor.patch_size == tiny.PATCH_SIZE
    inputs = processor(images=tiny.picture(0), text="<image> what is this ?", return_tensors="pt")
    assert model.generate(**inputs, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
