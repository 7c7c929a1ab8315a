# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Two pretrained backbones joined under a fresh projector: what is taken over, what is new, what is left behind."""

import shutil

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import batch, pixels, prompt
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from modeling_deco import DecoForConditionalGeneration, DecoProcessor
from modeling_deco.modeling_deco import _finish_logits

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
            text_model.generation_config.max_new_tokens, text_model.generation_config.suppress_tokens = 7, [5]
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


def test_the_generation_config_is_that_of_the_language_model_without_the_image_token(join, tmp_path):
    join().save_pretrained(tmp_path)
    generation_config = DecoForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (generation_config.max_new_tokens, generation_config.suppress_tokens) == (7, [5, NUM_WORDS])


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


# --- language models of every kind -----------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
TEXT_MODELS = {
    "phi": {**SIZES, "intermediate_size": 48},  # phi, gptj: lm_head has a bias
    "gptj": {**GPT, "rotary_dim": 8},
    "gemma2": {**GATED, "final_logit_softcapping": 2.0},
    "cohere": {**GATED, "logit_scale": 0.25},
    "granite": {**GATED, "logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "gpt2": GPT,  # and those below: tied embeddings of other names
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": SIZES,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128, "logit_scale": 0.5},
    "gpt_neox": {**SIZES, "intermediate_size": 48},
}


def save_text_model(folder, model_type, **sizes):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{"vocab_size": NUM_WORDS, **special, **sizes})
    text_model = tiny.randomize(AutoModelForCausalLM.from_config(config), seed=1)
    for name, bias in text_model.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(bias)
    text_model.save_pretrained(folder)
    return text_model


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_text_has_the_logits_the_loss_and_the_continuation_of_the_language_model(model_type, vision_folder, tmp_path):
    text_model = save_text_model(tmp_path / "text", model_type, **TEXT_MODELS[model_type])
    joined = DecoForConditionalGeneration.from_vision_text_pretrained(
        vision_folder("clip"), tmp_path / "text", image_token_id=NUM_WORDS, pooled_grid_size=3
    )
    joined.save_pretrained(tmp_path / "joined")
    loaded, loading = DecoForConditionalGeneration.from_pretrained(tmp_path / "joined", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    inputs = {**batch(prompt("what is this ?"), prompt("a red cat"))}
    words = inputs["input_ids"][:1, 1:]
    expected = text_model(**inputs, labels=inputs["input_ids"])
    continued = text_model.generate(words, max_new_tokens=6, do_sample=False, eos_token_id=None)
    new = list(range(NUM_WORDS, 64))  # rows that the language model did not have
    for model in (joined, loaded):
        found = model(**inputs, labels=inputs["input_ids"])
        torch.testing.assert_close(found.logits[..., :NUM_WORDS], expected.logits, rtol=1e-4, atol=1e-4)
        answer = model.generate(words, max_new_tokens=6, do_sample=False, eos_token_id=None, suppress_tokens=new)
        assert torch.equal(answer, continued)
        tied = text_model.get_output_embeddings().weight is text_model.get_input_embeddings().weight
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    image = {**batch(prompt(9, "what ?")), "pixel_values": pixels(1)}
    assert torch.equal(joined(**image).logits, loaded(**image).logits)


def test_the_loss_is_of_the_logits_that_the_language_model_gives(vision_folder, tmp_path):
    text_model = save_text_model(tmp_path, "gemma2", **TEXT_MODELS["gemma2"])
    model = DecoForConditionalGeneration.from_vision_text_pretrained(
        vision_folder("clip"), tmp_path, image_token_id=3, pooled_grid_size=3
    )
    ids = torch.tensor([prompt("what is this ?")])
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, text_model(ids, labels=ids).loss)
    assert model(ids).logits.abs().max() <= 2.0  # the cap


LOGITS = {  # what these do after their head, in families that are not joined above
    "hyperclovax": {**GATED, "intermediate_size": 48, "logits_scaling": 8.0},
    "minicpm3": {**GATED, "q_lora_rank": 8, "kv_lora_rank": 8, "dim_model_base": 8},
    "recurrent_gemma": {**GATED, "logits_soft_cap": 2.0, "lru_width": 32},
    "falcon_h1": {**GATED, "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
    "xlstm": {"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "output_logit_soft_cap": 2.0},
}


@pytest.mark.parametrize("model_type", LOGITS)
def test_logits_are_finished_as_the_language_models_own_class_does(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=NUM_WORDS, pad_token_id=0, **LOGITS[model_type])
    text_model, of_head = AutoModelForCausalLM.from_config(config).eval(), []
    torch.nn.init.normal_(text_model.get_output_embeddings().weight, generator=torch.Generator().manual_seed(0))
    text_model.get_output_embeddings().register_forward_hook(lambda *call: of_head.append(call[-1]))
    with torch.no_grad():
        expected = text_model(torch.arange(1, 9)[None], use_cache=False).logits
    if model_type == "minicpm3":  # which divides what goes into its head
        of_head[0] = of_head[0] * (32 / 8)
    torch.testing.assert_close(_finish_logits(of_head[0], config), expected)
    assert not torch.allclose(of_head[0], expected)


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("bert", {**SIZES, "intermediate_size": 48, "is_decoder": True}, "differ by|AutoModel builds"),
        ("openai-gpt", GPT, "does not continue from the kind of cache"),
    ],
)
def test_a_language_model_that_cannot_be_reproduced_is_refused(model_type, sizes, reason, vision_folder, tmp_path):
    save_text_model(tmp_path, model_type, **sizes)
    with pytest.raises(ValueError, match=rf"cannot be joined: .*({reason})") as refusal:
        DecoForConditionalGeneration.from_vision_text_pretrained(
            vision_folder("clip"), tmp_path, image_token_id=3, pooled_grid_size=3
        )
    assert "\n" not in str(refusal.value)


def test_an_encoder_decoder_is_refused(vision_folder, tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type, 't5', is not that of a causal language model") as refusal:
        DecoForConditionalGeneration.from_vision_text_pretrained(vision_folder("clip"), tmp_path)
    assert "\n" not in str(refusal.value)


def test_logits_that_differ_are_refused(vision_folder, text_folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled(LlamaForCausalLM.forward))
    with pytest.raises(ValueError, match=r"its own logits and those of its decoder and head alone differ by \d"):
        DecoForConditionalGeneration.from_vision_text_pretrained(
            vision_folder("clip"), text_folder("llama"), pooled_grid_size=3
        )


def scaled(forward):
    def scaled_forward(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits * 1.1
        return outputs

    return scaled_forward


@pytest.mark.parametrize("part", ["vision", "text"])
def test_backbones_that_lack_weights_are_refused(part, vision_folder, text_folder, tmp_path):
    folders = {"vision": vision_folder("clip"), "text": text_folder("llama")}
    shutil.copytree(folders[part], tmp_path / part)
    weights = load_file(tmp_path / part / "model.safetensors")
    name = next(name for name in weights if "layers.0.self_attn.q_proj.weight" in name)
    del weights[name]
    save_file(weights, tmp_path / part / "model.safetensors", metadata={"format": "pt"})
    folders[part] = tmp_path / part
    with pytest.raises(
        ValueError, match=r"1 weights are missing or have another shape .*layers.0.self_attn.q_proj.weight"
    ):
        DecoForConditionalGeneration.from_vision_text_pretrained(*folders.values(), pooled_grid_size=3)


@pytest.mark.parametrize(("name", "rows"), [("model.norm.weight", slice(None)), ("lm_head.weight", 5)])
def test_weights_that_are_no_numbers_are_refused(name, rows, vision_folder, text_folder, tmp_path):
    shutil.copytree(text_folder("llama"), tmp_path / "text")
    weights = load_file(tmp_path / "text" / "model.safetensors")
    weights[name][rows] = torch.nan
    save_file(weights, tmp_path / "text" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its logits in .* are NaN"):
        DecoForConditionalGeneration.from_vision_text_pretrained(
            vision_folder("clip"), tmp_path / "text", pooled_grid_size=3
        )


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "mpt"])
def test_embeddings_of_other_names_are_resized_with_their_head(model_type, vision_folder, tmp_path):
    save_text_model(tmp_path, model_type, **TEXT_MODELS[model_type])
    model = DecoForConditionalGeneration.from_vision_text_pretrained(
        vision_folder("clip"), tmp_path, image_token_id=3, pooled_grid_size=3
    )
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.lm_head.weight) == model.config.text_config.vocab_size == 70
    assert model(torch.tensor([[1, 69]])).logits.shape == (1, 2, 70)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("cap", ["anyres", "anyres_max_4"])
def test_views_and_videos_are_new_with_the_projector(vision, cap, join, vision_folder, text_folder, tmp_path):
    views = {"image_grid_pinpoints": tiny.PINPOINTS, "image_newline": True, "vision_aspect_ratio": cap}
    model = join(vision, takes_videos=True, **views)
    newline = model.model.image_newline
    assert not newline.is_meta
    assert 0 < newline.std() < 1
    folders = vision_folder(vision), text_folder("llama")
    processor = DecoProcessor.from_vision_text_pretrained(*folders, 3, chat_template="vicuna", config=model.config)
    assert processor.video_token_id == model.config.video_token_id == tiny.IMAGE_TOKEN_ID + 1
    image = tiny.picture(0, 30, 90)
    inputs = processor(images=image, videos=[[image]], text="<image> ? <video>", return_tensors="pt")
    view = tiny.build_image_processor()(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"][0, :1], view)  # the overview is the picture in one view
    torch.testing.assert_close(inputs["pixel_values_videos"][0], view)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reloaded = DecoForConditionalGeneration.from_pretrained(tmp_path), DecoProcessor.from_pretrained(tmp_path)
    again = reloaded(images=image, videos=[[image]], text="<image> ? <video>", return_tensors="pt")
    assert torch.equal(loaded(**again).logits, expected)
