# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A LLaVA of transformers is loaded as it is, and equals its conversion bit for bit."""

import json
import logging
import shutil

import llava_sources
import pytest
import tiny
import torch
from fake_hub import FakeHub
from fresh_process import FreshProcesses
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoModel, DecoProcessor
from modeling_deco.conversion import convert
from modeling_deco.hub import AUTO_MAP

LAYOUTS = [name for name in llava_sources.HF_FORMATS if ".bin" not in name]
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a red dog."}]},
    {"role": "user", "content": [{"type": "text", "text": "describe the picture"}]},
]


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, tmp_path_factory):
    """A LLaVA and its conversion at a small grid."""
    return convert_at(2, llava_sources.write(request.param, tmp_path_factory.mktemp("llava")).folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return llava_sources.write("llava-hf on the Hub", tmp_path_factory.mktemp("llava")).folder


@pytest.fixture
def copy(llava, tmp_path):
    """A copy of a LLaVA, to be changed."""
    return shutil.copytree(llava, tmp_path / "copy")


def convert_at(grid, source):
    destination = source.parent / "converted"
    convert(source, destination, grid)
    return source, destination


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load_both(pair, grid=2, **kwargs):
    return (
        DecoForConditionalGeneration.from_pretrained(pair[0], pooled_grid_size=grid, **kwargs),
        DecoForConditionalGeneration.from_pretrained(pair[1], **kwargs),
    )


def fields_of(config):
    """All but the folder that it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def assert_equal_models(model, converted):
    assert fields_of(model.config) == fields_of(converted.config)
    assert model.generation_config.to_dict() == converted.generation_config.to_dict()
    weights, expected = model.state_dict(), converted.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weights[name].dtype == weight.dtype
        assert torch.equal(weights[name], weight), name


def inputs_of(processor, **kwargs):
    return processor.apply_chat_template(
        [{**message, "content": [dict(part) for part in message["content"]]} for message in with_image(MESSAGES)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **kwargs,
    )


def with_image(messages):
    image = {"type": "image", "image": tiny.picture(seed=3)}
    first = {**messages[0], "content": [image, *messages[0]["content"][1:]]}
    return [first, *messages[1:]]


def answer(model, inputs):
    return model.float().generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()


# --- equal to the conversion -----------------------------------------------------------------------------------------


def test_config_and_weights_are_those_of_the_conversion(pair):
    config = DecoConfig.from_pretrained(pair[0], pooled_grid_size=2)
    assert fields_of(config) == fields_of(DecoConfig.from_pretrained(pair[1]))
    assert_equal_models(*load_both(pair))


def test_no_weight_is_reported_missing_or_unexpected(pair):
    for name in (*pair, pair[0]):
        _, info = DecoForConditionalGeneration.from_pretrained(name, output_loading_info=True)
        assert {kind: list(keys) for kind, keys in info.items() if keys} == {}


def test_ids_pixels_and_answers_are_those_of_the_conversion(pair):
    processors = DecoProcessor.from_pretrained(pair[0], pooled_grid_size=2), DecoProcessor.from_pretrained(pair[1])
    inputs, expected = map(inputs_of, processors)
    assert inputs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(inputs[name], tensor), name
    models = load_both(pair)
    for grid in (2, [3, 5], 6):
        inputs = inputs_of(processors[0], pooled_grid_size=grid)
        assert answer(models[0], inputs) == answer(models[1], inputs)


def test_the_processor_is_that_of_the_conversion(pair):
    processor = DecoProcessor.from_pretrained(pair[0], pooled_grid_size=2)
    converted = DecoProcessor.from_pretrained(pair[1])
    assert processor.to_dict() == converted.to_dict()
    assert (processor.pooled_grid_size, processor.patch_size) == (2, tiny.PATCH_SIZE)
    assert processor.chat_template == processor.tokenizer.chat_template == converted.chat_template
    assert processor.tokenizer.get_vocab() == converted.tokenizer.get_vocab()
    assert processor.tokenizer.special_tokens_map == converted.tokenizer.special_tokens_map
    marks = processor.apply_chat_template(
        with_image(MESSAGES), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(marks["assistant_masks"][0]) > 0


def test_the_base_model_is_loaded_too(pair):
    whole = DecoForConditionalGeneration.from_pretrained(pair[1]).state_dict()
    for name, weight in DecoModel.from_pretrained(pair[0]).state_dict().items():
        assert torch.equal(weight, whole[f"model.{name}"]), name


# --- what a user gets ------------------------------------------------------------------------------------------------


def test_without_a_grid_the_logits_are_llavas(llava):
    model = DecoForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    reference = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    processor = DecoProcessor.from_pretrained(llava)
    assert (model.config.pooled_grid_size, processor.pooled_grid_size) == (6, 6)
    inputs = inputs_of(processor)
    assert "pooled_grid_sizes" not in inputs
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)


def test_a_grid_is_chosen_at_loading_or_per_call(llava):
    model = DecoForConditionalGeneration.from_pretrained(llava, pooled_grid_size=[2, 3])
    processor = DecoProcessor.from_pretrained(llava, pooled_grid_size=[2, 3])
    assert (model.config.pooled_grid_size, processor.pooled_grid_size) == ([2, 3], [2, 3])
    assert model.config.image_positions == "patch"
    full = DecoForConditionalGeneration.from_pretrained(llava)
    per_call = DecoProcessor.from_pretrained(llava)
    assert answer(model, inputs_of(processor)) == answer(full, inputs_of(per_call, pooled_grid_size=[2, 3]))
    sequence = DecoForConditionalGeneration.from_pretrained(llava, image_positions="sequence")
    assert sequence.config.image_positions == "sequence"


def test_the_dtype_is_that_of_the_weights_unless_one_is_given(copy):
    edit(copy / "config.json", torch_dtype="float32")
    assert DecoForConditionalGeneration.from_pretrained(copy).dtype == torch.float16
    assert DecoForConditionalGeneration.from_pretrained(copy, dtype="bfloat16").dtype == torch.bfloat16
    config = DecoConfig.from_pretrained(copy, pooled_grid_size=3)
    assert DecoForConditionalGeneration.from_pretrained(copy, config=config).config.pooled_grid_size == 3


def test_arguments_of_transformers_are_passed_on(llava):
    model = DecoForConditionalGeneration.from_pretrained(
        llava, pooled_grid_size=3, attn_implementation="eager", device_map="cpu"
    )
    assert model.config._attn_implementation == "eager"
    assert model.device.type == "cpu"
    processor = DecoProcessor.from_pretrained(llava, chat_template="{{ 'mine' }}", trust_remote_code=False)
    assert processor.chat_template == processor.tokenizer.chat_template == "{{ 'mine' }}"


def test_the_language_model_is_quantized_while_it_is_loaded(tmp_path):
    pytest.importorskip("bitsandbytes")
    text = {**llava_sources.TEXT_CONFIG, "vocab_size": 320, "pad_token_id": 301}
    text |= {"hidden_size": 64, "intermediate_size": 128}
    llava_sources.write_hf_saved(tmp_path / "llava", llava_sources.build_hf_model(text_config=text))
    pair = convert_at(2, tmp_path / "llava")
    models = load_both(pair, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu")
    for model in models:
        names = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
        assert len(names) == 2 * 7
        assert all(name.startswith("model.language_model.layers.") for name in names)
    weights, expected = (model.state_dict() for model in models)
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_what_is_saved_is_a_deco(pair, tmp_path):
    """With its own names of weights, and the code for `trust_remote_code`."""
    model = DecoForConditionalGeneration.from_pretrained(pair[0], pooled_grid_size=2)
    model.save_pretrained(tmp_path / "saved")
    DecoProcessor.from_pretrained(pair[0], pooled_grid_size=2).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "deco"
    assert llava_sources.read_weights(tmp_path / "saved").keys() == llava_sources.read_weights(pair[1]).keys()
    assert AutoConfig.from_pretrained(tmp_path / "saved").auto_map == AUTO_MAP
    assert_equal_models(DecoForConditionalGeneration.from_pretrained(tmp_path / "saved"), load_both(pair)[1])


def answer_by_remote_code(folder, llava):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        again = type(model).from_pretrained(llava, pooled_grid_size=2)  # a LLaVA, by the same remote code
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    return type(model).__module__.split(".")[0]


@pytest.fixture(scope="module")
def fresh():
    processes = FreshProcesses(["torch", "transformers"], blocked=["modeling_deco"])
    yield processes
    processes.close()


def test_the_code_beside_a_saved_model_works_without_this_package(fresh, llava, tmp_path):
    DecoForConditionalGeneration.from_pretrained(llava, pooled_grid_size=2).save_pretrained(tmp_path / "saved")
    DecoProcessor.from_pretrained(llava, pooled_grid_size=2).save_pretrained(tmp_path / "saved")
    assert fresh.run(answer_by_remote_code, str(tmp_path / "saved"), str(llava)) == "transformers_modules"


def test_a_llava_on_the_hub_is_loaded_at_its_revision(llava, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    hub.commit("me/llava", {"README.md": b"Nothing yet."})
    hub.commit("me/llava", llava, branch="v2")
    model = DecoForConditionalGeneration.from_pretrained("me/llava", revision="v2", pooled_grid_size=2)
    assert_equal_models(model.float(), DecoForConditionalGeneration.from_pretrained(llava, pooled_grid_size=2).float())
    processor = DecoProcessor.from_pretrained("me/llava", revision="v2")
    assert processor.chat_template == DecoProcessor.from_pretrained(llava).chat_template
    assert DecoConfig.from_pretrained("me/llava", revision="v2").pooled_grid_size == 6


def test_a_subfolder_is_loaded(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "outer" / "inner")
    place = {"pretrained_model_name_or_path": tmp_path / "outer", "subfolder": "inner"}
    expected = DecoForConditionalGeneration.from_pretrained(llava)
    assert_equal_models(DecoForConditionalGeneration.from_pretrained(**place), expected)
    assert DecoProcessor.from_pretrained(**place).patch_size == tiny.PATCH_SIZE


# --- other LLaVAs ----------------------------------------------------------------------------------------------------

TEXT = {**llava_sources.TEXT_CONFIG, "vocab_size": 320, "pad_token_id": 301}
OTHERS = {
    "SigLIP, full": {
        "vision_config": tiny.VISION_CONFIGS["siglip"],
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    "Qwen2, tied": {"text_config": {**TEXT, "model_type": "qwen2", "tie_word_embeddings": True}},
    "tied by LLaVA's config": {"tie_word_embeddings": True},
    "Mistral, no bias": {"text_config": {**TEXT, "model_type": "mistral"}, "multimodal_projector_bias": False},
    "another activation, an early layer": {"projector_hidden_act": "relu", "vision_feature_layer": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_llava_is_its_conversion_too(name, tmp_path):
    choices = dict(OTHERS[name])
    strategy = choices.get("vision_feature_select_strategy", "default")
    model = llava_sources.build_hf_model(**choices)
    processor = llava_sources.build_hf_processor(strategy=strategy)
    llava_sources.write_hf_saved(tmp_path / "llava", model, processor)
    pair = convert_at(2, tmp_path / "llava")
    assert_equal_models(*load_both(pair))
    _, info = DecoForConditionalGeneration.from_pretrained(pair[0], output_loading_info=True)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(tmp_path):
    llava_sources.write_hf_saved(tmp_path / "llava")
    edit(tmp_path / "llava" / "config.json", tie_word_embeddings=True)
    model, converted = load_both(convert_at(2, tmp_path / "llava"))
    assert_equal_models(model, converted)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "saved")
    assert_equal_models(DecoForConditionalGeneration.from_pretrained(tmp_path / "saved"), converted)


def test_images_are_padded_to_squares_where_llavas_are(tmp_path):
    llava_sources.write_hf_saved(tmp_path / "llava")
    (tmp_path / "llava" / "preprocessor_config.json").unlink(missing_ok=True)
    edit(
        tmp_path / "llava" / "processor_config.json",
        image_processor={**llava_sources.clip_preprocessor_config(), "image_processor_type": "LlavaImageProcessor"}
        | {"do_pad": True, "do_center_crop": False},
    )
    pair = convert_at(2, tmp_path / "llava")
    processors = DecoProcessor.from_pretrained(pair[0], pooled_grid_size=2), DecoProcessor.from_pretrained(pair[1])
    assert processors[0].image_processor.do_pad
    inputs, expected = map(inputs_of, processors)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_buffers_of_older_versions_are_no_weights(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    _, info = DecoForConditionalGeneration.from_pretrained(copy, output_loading_info=True)
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}


def test_weights_alone_are_a_model_without_a_processor(copy, caplog):
    for path in copy.iterdir():
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()
    caplog.set_level(logging.ERROR)
    assert_equal_models(*load_both(convert_at(2, copy)))
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        DecoProcessor.from_pretrained(copy)


# --- what is refused -------------------------------------------------------------------------------------------------


def config(**fields):
    return lambda folder: edit(folder / "config.json", **fields)


def of_the_original_code(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"mm_vision_tower": "x", **fields["text_config"], "model_type": "llava"})
    )


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sentencepiece_alone(folder):
    (folder / "tokenizer.json").unlink()


def without_padding_token(folder):
    """And without a row for a new one."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<pad>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    tensors = load_file(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = tensors[name][:301].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config={**text_config, "vocab_size": 301})


FOR_ALL = [
    (
        config(model_type="qwen2_vl"),
        r"is a 'qwen2_vl' model, not a DeCo: its vision tower takes pictures of any shape",
    ),
    (config(model_type="internvl"), r"is a 'internvl' model, not a DeCo: its projector learned patches that are shuf"),
    (config(model_type="vipllava"), r"is a 'vipllava' model, not a DeCo: it reads several layers .* makes one of a"),
    (config(model_type="blip-2"), r"is a 'blip-2' model, not a DeCo"),
    (config(model_type="llama"), r"is a 'llama' model, not a DeCo"),
    (of_the_original_code, r"is a 'llava' model, not a DeCo\. deco convert makes one of a LLaVA"),
    (config(quantization_config={"quant_method": "awq"}), r"has a quantization_config"),
    (config(vision_feature_layer=[-2, -5]), r"vision_feature_layer \[-2, -5\] in .* is not one layer"),
    (config(vision_feature_select_strategy="full"), r"vision_feature_select_strategy='full' keeps prefix tokens"),
    (config(image_token_index=12), r"image_token_index is 12 in .* tokenizer is 300; they must be equal"),
    (config(vision_config={"model_type": "dinov2"}), r"is a dinov2; use a CLIP or a SigLIP"),
    (config(vision_config={"model_type": "efficientnet"}), r"is a efficientnet; use a CLIP or a SigLIP"),
    (config(vision_config={"model_type": "nothing"}), r"config\.json of .* cannot be used"),
    (config(image_aspect_ratio="anyres"), r"image_aspect_ratio 'anyres'"),
    (sentencepiece_alone, r"has no tokenizer\.json\. deco convert also reads"),
    (without_padding_token, r"has 301 embeddings for 302 tokens.* deco convert makes a DeCo with rows for new tokens"),
]


@pytest.mark.parametrize(("spoil", "message"), FOR_ALL)
def test_what_is_no_llava_for_deco_is_refused_in_one_line(spoil, message, copy):
    spoil(copy)
    for loader in (DecoConfig, DecoForConditionalGeneration, DecoProcessor):
        with pytest.raises(ValueError, match=message) as raised:
            loader.from_pretrained(copy)
        assert len(str(raised.value).splitlines()) == 1


def test_pickled_weights_are_left_to_the_converter(copy):
    as_bin(copy)
    with pytest.raises(ValueError, match=r"no safetensors files.*deco convert makes a DeCo of a LLaVA with \.bin"):
        DecoForConditionalGeneration.from_pretrained(copy)


def test_a_chat_format_that_is_not_recognized_can_be_given(tmp_path):
    text = {**TEXT, "model_type": "mistral"}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        llava_sources.build_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
    )
    llava_sources.write_hf_saved(tmp_path, llava_sources.build_hf_model(text_config=text), processor)
    with pytest.raises(ValueError, match=r"chat format of a 'mistral' language model is not recognized.*deco convert"):
        DecoProcessor.from_pretrained(tmp_path)
    assert DecoProcessor.from_pretrained(tmp_path, chat_template="<image>").chat_template == "<image>"
