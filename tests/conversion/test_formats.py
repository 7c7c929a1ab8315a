# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Every LLaVA format becomes a DeCo folder that works at once, with LLaVA's logits and the source's bytes.

What is expected comes from transformers' own LLaVA, from `llava_sources.OriginalLlava` and from PEFT; the sources are
written by `llava_sources`, under folder names that mislead.
"""

import hashlib
import json
import random
import re
import shutil

import llava_sources
import pytest
import tiny
import torch
import xxhash
import yaml
from fresh_process import FreshProcesses
from llava_sources import (
    FORMATS,
    HF_FORMATS,
    IMAGE_MARKER,
    IMAGE_TOKEN_ID,
    LORA_FORMATS,
    ORIGINAL_FORMATS,
    PAD_TOKEN_ID,
    PADDED_VOCAB_SIZE,
    PATCH_GRID,
    SNIPPET_FORMATS,
    STAGE_1_FORMATS,
    VOCAB_SIZE,
    OriginalLlava,
    read_weights,
)
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

from modeling_deco import DecoForConditionalGeneration, DecoProcessor
from modeling_deco.conversion import ConversionError, convert

IMAGE = [IMAGE_MARKER]
PROMPTS = {  # batches of prompts; each image takes its turn
    "one image": [[1, 20, *IMAGE, 270, 285, 299]],
    "text only": [[1, 266, 285, 278, 271, 5, 80]],
    "two images in a prompt": [[1, *IMAGE, 40, *IMAGE, 41, 290]],
    "left-padded": [[1, 20, *IMAGE, 270, 285, 299], [1, 30, 31], [1, *IMAGE, *IMAGE, 7, 281]],
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
MERGED = re.compile(r"language_model\..*(_proj)\.weight$")  # what LoRA adapts
RESIZED = ("model.language_model.embed_tokens.weight", "lm_head.weight")


class Converted:
    """A source and the folder that `convert` made of it; the models are loaded in fp32."""

    def __init__(self, source, destination, **arguments):
        self.source, self.destination = source, destination
        self.report = convert(source.folder, destination, **{**source.arguments, **arguments})

    @property
    def model(self) -> DecoForConditionalGeneration:
        return load_deco(self.destination)

    @property
    def processor(self) -> DecoProcessor:
        return AutoProcessor.from_pretrained(self.destination)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What was written, under its names in memory."""
        return in_memory_names(read_weights(self.destination))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A function from the name of a format to its conversion, at the grid of the patches or the authors' own."""
    made = {}

    def conversion_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("format")
            made[name] = Converted(llava_sources.write(name, folder), folder / "deco")
        return made[name]

    return conversion_of


@pytest.fixture
def vision_tower(tmp_path):
    """A folder for an `OriginalLlava`'s tower."""

    def write(llava, writer=llava_sources.write_clip_vision):
        writer(tmp_path / "tower", llava.tower)
        return tmp_path / "tower"

    return write


def in_memory_names(tensors) -> dict[str, torch.Tensor]:
    return {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in tensors.items()}


def load_deco(folder) -> DecoForConditionalGeneration:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, DecoForConditionalGeneration)
    return model


def same_bits(found, expected) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    return found.dtype == expected.dtype and torch.equal(found.view(bits), expected.contiguous().view(bits))


def model_inputs(prompts, tokens_per_image, image_token_id, pad_token_id=0, image_size=tiny.IMAGE_SIZE):
    rows = []
    for prompt in prompts:
        rows.append([])
        for index in prompt:
            rows[-1] += [image_token_id] * tokens_per_image if index == IMAGE_MARKER else [index]
    length = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    num_images = sum(prompt.count(IMAGE_MARKER) for prompt in prompts)
    if num_images:
        inputs["pixel_values"] = tiny.pixels(num_images, image_size, image_size)
    return inputs


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def assert_equals_llava_hf(model, folder, prompts=PROMPTS["left-padded"], tokens_per_image=None, **kwargs):
    """Bit for bit the logits of transformers' LLaVA, at the grid of the patches."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokens_per_image = tokens_per_image or PATCH_GRID**2
    inputs = model_inputs(prompts, tokens_per_image, llava.config.image_token_id, **kwargs)
    assert torch.equal(logits_of(model, inputs), logits_of(llava, inputs))


def assert_equals_original(model, reference, prompts=PROMPTS["left-padded"], atol=1e-5):
    """The original function's logits on its own vocabulary, prompt by prompt."""
    inputs = model_inputs(prompts, model.config.num_image_tokens, model.config.image_token_id)
    image = 0
    for row, mask, prompt in zip(logits_of(model, inputs), inputs["attention_mask"], prompts, strict=True):
        num_images = prompt.count(IMAGE_MARKER)
        pixel_values = inputs["pixel_values"][image : image + num_images] if num_images else None
        image += num_images
        expected = reference(prompt, pixel_values)
        torch.testing.assert_close(row[mask.bool()][:, :VOCAB_SIZE], expected, rtol=0, atol=atol)


# --- the references themselves -----------------------------------------------------------------------------------


def test_the_written_original_function_is_transformers_llava():
    original = OriginalLlava()
    llava = llava_sources.build_hf_model(text_config=llava_sources.TEXT_CONFIG, image_token_index=299)
    llava.load_state_dict(original.tensors())
    (prompt,) = PROMPTS["two images in a prompt"]
    inputs = model_inputs([prompt], PATCH_GRID**2, 299)
    assert torch.equal(original(prompt, inputs["pixel_values"]), logits_of(llava, inputs)[0])


@pytest.mark.parametrize("name", HF_FORMATS)
def test_transformers_reads_the_written_llava_hf_layouts_whole(name, tmp_path):
    source = llava_sources.write(name, tmp_path)
    llava, loading = LlavaForConditionalGeneration.from_pretrained(source.folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert all(same_bits(value, source.tensors[name]) for name, value in llava.state_dict().items())


# --- logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", HF_FORMATS)
def test_llava_hf_logits_are_transformers_bit_for_bit(name, prompts, converted):
    conversion = converted(name)
    assert_equals_llava_hf(conversion.model, conversion.source.folder, PROMPTS[prompts], pad_token_id=PAD_TOKEN_ID)


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", ORIGINAL_FORMATS)
def test_original_logits_are_the_original_functions(name, prompts, converted):
    conversion = converted(name)
    assert_equals_original(conversion.model, conversion.source.reference, PROMPTS[prompts])


@pytest.mark.parametrize("name", ["llava-hf saved now", "llava-hf on the Hub"])
def test_a_model_converted_at_a_smaller_grid_is_llava_when_asked_for_the_patch_grid(name, tmp_path):
    source = llava_sources.write(name, tmp_path)
    model = Converted(source, tmp_path / "deco", pooled_grid_size=2).model
    llava = LlavaForConditionalGeneration.from_pretrained(source.folder, dtype=torch.float32)
    inputs = model_inputs(PROMPTS["left-padded"], PATCH_GRID**2, IMAGE_TOKEN_ID)
    grids = torch.tensor([[PATCH_GRID, PATCH_GRID]] * len(inputs["pixel_values"]))
    assert torch.equal(logits_of(model, {**inputs, "pooled_grid_sizes": grids}), logits_of(llava, inputs))


@pytest.mark.newest
@pytest.mark.parametrize(("grid", "rows_and_cols"), [([2, 3], (2, 3)), (4, (4, 4)), (1, (1, 1))])
def test_a_pooled_grid_pools_as_the_authors_do(grid, rows_and_cols, tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_original(tmp_path / "source", llava)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=grid, vision_tower=vision_tower(llava))
    llava.pooled_grid = rows_and_cols
    assert_equals_original(load_deco(tmp_path / "deco"), llava)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_projector_of_another_depth(num_layers, tmp_path, vision_tower):
    llava = OriginalLlava(num_layers=num_layers)
    llava_sources.write_original(tmp_path / "source", llava)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=vision_tower(llava))
    model = load_deco(tmp_path / "deco")
    assert model.config.projector_num_layers == num_layers
    assert_equals_original(model, llava)


def test_the_authors_projector_with_three_layers(tmp_path, vision_tower):
    llava = OriginalLlava(pooled_grid=(2, 2), num_layers=3)
    llava_sources.write_original(tmp_path / "source", llava, config={"query_num": 4, "layer_num": 3})
    convert(tmp_path / "source", tmp_path / "deco", vision_tower=vision_tower(llava))
    assert_equals_original(load_deco(tmp_path / "deco"), llava)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_another_vision_layer(layer, tmp_path):
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model(vision_feature_layer=layer))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


def test_a_vision_layer_that_the_config_leaves_out_is_transformers_default(tmp_path):
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model())
    content = json.loads((tmp_path / "source" / "config.json").read_text())
    del content["vision_feature_layer"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(content))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


def test_a_siglip_tower_with_all_of_its_tokens(tmp_path):
    model = llava_sources.build_hf_model(tiny.VISION_CONFIGS["siglip"], vision_feature_select_strategy="full")
    processor = llava_sources.build_hf_processor(strategy="full")
    llava_sources.write_hf_saved(tmp_path / "source", model, processor)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


@pytest.mark.newest
def test_qwen2_with_tied_embeddings(tmp_path):
    text_config = {**tiny.TEXT_CONFIGS["qwen2"], "vocab_size": PADDED_VOCAB_SIZE, "tie_word_embeddings": True}
    model = llava_sources.build_hf_model(text_config=text_config, tie_word_embeddings=True)
    llava_sources.write_hf_saved(tmp_path / "source", model)
    assert not [name for name in read_weights(tmp_path / "source") if "lm_head" in name]
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    deco = load_deco(tmp_path / "deco")
    assert deco.lm_head.weight is deco.get_input_embeddings().weight
    assert_equals_llava_hf(deco, tmp_path / "source")


def test_a_projector_without_biases(tmp_path):
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model(multimodal_projector_bias=False))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


def test_a_projector_with_another_activation(tmp_path):
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model(projector_hidden_act="relu"))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


def test_a_tower_inside_wins_over_the_named_one(converted):
    conversion = converted("original, tower inside")
    named = read_weights(conversion.source.arguments["vision_tower"]) or torch.load(
        conversion.source.arguments["vision_tower"] / "pytorch_model.bin", weights_only=True
    )
    name = "embeddings.patch_embedding.weight"
    written = conversion.tensors["model.vision_tower." + name]
    assert not torch.equal(written, named["vision_model." + name])
    assert same_bits(written, conversion.source.tensors["model.vision_tower." + name])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("writer", [llava_sources.write_clip_vision, llava_sources.write_clip])
def test_the_named_tower_may_be_alone_or_in_a_whole_clip(writer, kind, tmp_path):
    llava = OriginalLlava()
    writer(tmp_path / "tower", llava.tower, kind=kind)
    llava_sources.write_original(tmp_path / "source", llava)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=tmp_path / "tower")
    assert_equals_original(load_deco(tmp_path / "deco"), llava)


def test_a_tower_that_transformers_5_saved(tmp_path):
    llava = OriginalLlava()
    llava_sources.write_clip_vision(tmp_path / "tower", llava.tower)
    (tmp_path / "tower" / "model.safetensors").unlink()
    llava.tower.save_pretrained(tmp_path / "tower")
    llava_sources.write_original(tmp_path / "source", llava)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=tmp_path / "tower")
    assert_equals_original(load_deco(tmp_path / "deco"), llava)


def test_the_tower_that_the_config_names_needs_no_argument(tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_original(tmp_path / "source", llava, vision_tower=vision_tower(llava))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_original(load_deco(tmp_path / "deco"), llava)


@pytest.mark.newest
def test_mistral_inside_llava_hf(tmp_path):
    text_config = {**tiny.TEXT_CONFIGS["mistral"], "vocab_size": PADDED_VOCAB_SIZE}
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model(text_config=text_config))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


# --- the grid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "grid"), [(24, 6), (56, 12)])
def test_the_default_grid_is_twelve_or_what_the_patches_allow(image_size, grid, tmp_path):
    model = llava_sources.build_hf_model({**llava_sources.VISION_CONFIG, "image_size": image_size})
    processor = llava_sources.build_hf_processor(image_size=image_size)
    llava_sources.write_hf_saved(tmp_path / "source", model, processor)
    convert(tmp_path / "source", tmp_path / "deco")
    assert load_deco(tmp_path / "deco").config.pooled_grid_size == grid
    assert AutoProcessor.from_pretrained(tmp_path / "deco").pooled_grid_size == grid


def test_a_patch_grid_of_fourteen_gives_llavas_logits(tmp_path):
    model = llava_sources.build_hf_model({**llava_sources.VISION_CONFIG, "image_size": 56})
    llava_sources.write_hf_saved(tmp_path / "source", model, llava_sources.build_hf_processor(image_size=56))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=[14, 14])
    prompts = PROMPTS["one image"]
    assert_equals_llava_hf(
        load_deco(tmp_path / "deco"), tmp_path / "source", prompts, tokens_per_image=196, image_size=56
    )


@pytest.mark.parametrize("name", ["snippet, full, no query_num", "snippet, stage 1, no query_num"])
def test_the_authors_projector_is_refused_where_nobody_says_its_grid(name, tmp_path):
    source = llava_sources.write(name, tmp_path)
    del source.arguments["pooled_grid_size"]
    with pytest.raises(ConversionError, match=r"pooled.grid.size"):
        convert(source.folder, tmp_path / "deco", **source.arguments)
    assert not (tmp_path / "deco").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_config_and_processor_have_the_grid(name, converted):
    conversion = converted(name)
    rows, cols = conversion.source.grid
    assert conversion.model.config.num_image_tokens == rows * cols
    assert conversion.processor.pooled_grid_size in (rows, [rows, cols])


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_each_tensor_is_the_sources(name, converted):
    conversion = converted(name)
    written, expected = conversion.tensors, conversion.source.tensors
    unused = {key for key in expected if "vision_tower.encoder.layers.2." in key}
    assert unused
    assert written.keys() == expected.keys() - unused
    for key, value in written.items():
        if name in LORA_FORMATS and MERGED.search(key):
            assert not torch.equal(value, expected[key])
            continue
        rows = VOCAB_SIZE if name in ORIGINAL_FORMATS and key in RESIZED else len(value)
        assert same_bits(value[:rows].contiguous(), expected[key]), key


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llava-hf on the Hub", "llava-hf in memory", "original, tower inside", "original, one .bin"]
)
def test_a_given_dtype_is_every_tensors(name, dtype, tmp_path):
    source = llava_sources.write(name, tmp_path)
    conversion = Converted(source, tmp_path / "deco", dtype=dtype)
    for key, value in conversion.tensors.items():
        expected = source.tensors[key].to(getattr(torch, dtype))
        assert same_bits(value[: len(expected)].contiguous(), expected), key
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "deco").dtype == getattr(torch, dtype)


@pytest.mark.newest
@pytest.mark.parametrize("name", ["llava-hf on the Hub", "llava-hf of 4.52", "original, one .bin", "LoRA, .bin"])
def test_the_folder_loads_in_its_own_dtype(name, converted):
    conversion = converted(name)
    stored = conversion.source.tensors["model.language_model.norm.weight"].dtype
    model = AutoModelForImageTextToText.from_pretrained(conversion.destination)
    assert model.model.language_model.norm.weight.dtype == stored


@pytest.mark.parametrize("seed", range(10))
def test_shards_dtypes_and_containers_do_not_matter(seed, tmp_path):
    chance = random.Random(seed)
    llava = OriginalLlava(seed=seed)
    hf = seed % 2 == 0
    tensors = dict(llava_sources.build_hf_model(seed=seed).state_dict()) if hf else llava.tensors()
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    tensors = {name: value.to(chance.choice(dtypes)) for name, value in tensors.items()}
    stored = llava_sources.rename(tensors, llava_sources.HF_NAMES[chance.choice(list(llava_sources.HF_NAMES))])
    stored = stored if hf else llava_sources.original_names(tensors)
    num_shards = chance.randint(1, 6)
    shards = llava_sources.split(stored, num_shards, seed)
    if num_shards > 1 and chance.random() < 0.5:  # one with a single tensor
        shards = [shards[0][:1], shards[0][1:] + shards[1], *shards[2:]]
    kind = chance.choice(["safetensors", "safetensors", "bin", "legacy bin"])

    source, arguments = tmp_path / "source", {"pooled_grid_size": chance.randint(1, PATCH_GRID)}
    if hf:
        llava_sources.write_hf_hub(source)
        (source / "model.safetensors").unlink()
    else:
        llava_sources.write_original(source, llava, tower_inside=True)
        (source / "model.safetensors").unlink()
        llava_sources.write_clip_vision(tmp_path / "tower", llava.tower)
        arguments["vision_tower"] = tmp_path / "tower"
    llava_sources.write_weights(source, stored, kind, shards, metadata=chance.random() < 0.7)
    convert(source, tmp_path / "deco", **arguments)

    written = in_memory_names(read_weights(tmp_path / "deco"))
    assert written.keys() == {name for name in tensors if "vision_tower.encoder.layers.2." not in name}
    for name, value in written.items():
        expected = tensors[name]
        assert same_bits(value[: len(expected)].contiguous(), expected), name


@pytest.mark.parametrize("kind", ["bin", "legacy bin"])
@pytest.mark.parametrize(
    "storage", ["one for all", "views with offsets", "views of 16 bits", "transposed", "larger than its tensor"]
)
def test_tensors_of_a_pickle_may_lie_anywhere_in_a_storage(storage, kind, tmp_path):
    tensors = OriginalLlava(seed=3).tensors()
    if storage == "views of 16 bits":
        tensors = {name: value.half() for name, value in tensors.items()}
    names = list(tensors)
    if storage == "one for all":
        flat = torch.cat([value.flatten() for value in tensors.values()])
        pieces = flat.split([value.numel() for value in tensors.values()])
        laid = {name: piece.view(tensors[name].shape) for name, piece in zip(names, pieces, strict=True)}
    elif storage.startswith("views"):
        laid = {name: torch.stack([torch.zeros_like(value), value])[1] for name, value in tensors.items()}
    elif storage == "transposed":
        laid = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in tensors.items()}
    else:
        laid = {name: torch.stack([value, torch.zeros_like(value)], dim=-1)[..., 0] for name, value in tensors.items()}
    assert all(torch.equal(laid[name], value) for name, value in tensors.items())

    llava = OriginalLlava(seed=3)
    llava_sources.write_clip_vision(tmp_path / "tower", llava.tower)
    llava_sources.write_original(tmp_path / "source", (llava, laid), tower_inside=True, kind=kind, shards=2)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=tmp_path / "tower")
    written = in_memory_names(read_weights(tmp_path / "deco"))
    assert all(same_bits(value[: len(tensors[name])].contiguous(), tensors[name]) for name, value in written.items())


def test_two_names_of_one_tensor_in_a_pickle_are_two_tensors(tmp_path, vision_tower):
    llava = OriginalLlava()
    llava.language_model.lm_head.weight = llava.language_model.get_input_embeddings().weight
    tensors = llava.tensors()
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    llava_sources.write_original(tmp_path / "source", (llava, tensors), kind="bin")
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=vision_tower(llava))
    assert_equals_original(load_deco(tmp_path / "deco"), llava)


def test_weights_in_both_containers_are_taken_once(tmp_path):
    tensors = llava_sources.write_hf_hub(tmp_path / "source", shards=2)
    names = llava_sources.rename(tensors, llava_sources.HF_NAMES["hub"])
    llava_sources.write_weights(tmp_path / "source", names, kind="bin", shards=3)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_of_the_model_is_in_the_folder(name, converted):
    conversion = converted(name)
    _, loading = AutoModelForImageTextToText.from_pretrained(conversion.destination, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_vision_layer_that_is_not_used_is_not_stored(name, converted):
    config = converted(name).model.config
    assert config.vision_feature_layer == -1
    assert config.vision_config.num_hidden_layers == llava_sources.VISION_CONFIG["num_hidden_layers"] - 1


def test_parts_of_different_dtypes_stay_different(tmp_path, vision_tower):
    """As after stage 1 with DeepSpeed: bf16 in `mm_projector.bin`, fp16 in the language model, fp32 in the tower."""
    llava = OriginalLlava().round_to(torch.bfloat16)
    llava_sources.write_base_model(tmp_path / "base", llava, dtype=torch.float16)
    llava_sources.write_stage_1(tmp_path / "source", llava)
    projector = torch.load(tmp_path / "source" / "mm_projector.bin", weights_only=True)
    projector = {name: value.bfloat16() for name, value in projector.items()}
    torch.save(projector, tmp_path / "source" / "mm_projector.bin")
    arguments = {"base_model": tmp_path / "base", "vision_tower": vision_tower(llava)}
    convert(tmp_path / "source", tmp_path / "deco", **arguments)
    dtypes = {"vision_tower": torch.float32, "multi_modal_projector": torch.bfloat16}
    for name, value in read_weights(tmp_path / "deco").items():
        part = name.removeprefix("model.").split(".")[0]
        assert value.dtype == dtypes.get(part, torch.float16), name


# --- LoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16])
def test_lora_is_merged_in_more_than_the_bases_precision(base_dtype, tmp_path, vision_tower):
    llava = OriginalLlava().round_to(base_dtype)
    llava_sources.write_base_model(tmp_path / "base", llava, dtype=base_dtype)
    tower = vision_tower(llava)
    base = {name: value.double() for name, value in llava.tensors().items()}
    llava_sources.write_lora(tmp_path / "source", llava_sources.add_lora(llava))
    adapter = read_weights(tmp_path / "source")
    convert(
        tmp_path / "source",
        tmp_path / "deco",
        pooled_grid_size=PATCH_GRID,
        vision_tower=tower,
        base_model=tmp_path / "base",
    )
    written = in_memory_names(read_weights(tmp_path / "deco"))
    merged = [name for name in written if MERGED.search(name)]
    assert len(merged) == 2 * len(llava_sources.LINEAR_NAMES)
    for name in merged:
        module = "base_model.model.model." + name.removeprefix("model.language_model.").removesuffix(".weight")
        lora_a, lora_b = (adapter[f"{module}.lora_{side}.weight"].double() for side in "AB")
        exact = base[name] + lora_b @ lora_a * (8 / 4)
        assert written[name].dtype == base_dtype
        half_a_step = torch.finfo(base_dtype).eps / 2
        torch.testing.assert_close(written[name].double(), exact, rtol=half_a_step * 1.01, atol=1e-7)


@pytest.mark.parametrize(
    "choices",
    [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, {"use_dora": True}],
    ids=["rslora", "patterns", "dora"],
)
def test_other_kinds_of_lora_are_merged_right_or_refused(choices, tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_base_model(tmp_path / "base", llava)
    arguments = {"vision_tower": vision_tower(llava), "base_model": tmp_path / "base", "pooled_grid_size": PATCH_GRID}
    llava_sources.write_lora(tmp_path / "source", llava_sources.add_lora(llava, **choices))
    try:
        convert(tmp_path / "source", tmp_path / "deco", **arguments)
    except ConversionError as error:
        assert re.search("lora|pattern", str(error), re.IGNORECASE)  # noqa: PT017
        return
    assert_equals_original(load_deco(tmp_path / "deco"), llava, atol=1e-4)


@pytest.mark.newest
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*layers\.1\.mlp\..*_proj"])
def test_lora_on_some_layers_leaves_the_others(targets, tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_base_model(tmp_path / "base", llava)
    base = llava.tensors()
    arguments = {"vision_tower": vision_tower(llava), "base_model": tmp_path / "base", "pooled_grid_size": PATCH_GRID}
    llava_sources.write_lora(tmp_path / "source", llava_sources.add_lora(llava, target_modules=targets))
    convert(tmp_path / "source", tmp_path / "deco", **arguments)
    assert_equals_original(load_deco(tmp_path / "deco"), llava)
    written = in_memory_names(read_weights(tmp_path / "deco"))
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    assert same_bits(written[name], base[name])


# --- ids and embeddings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_image_token_of_config_and_tokenizer_are_one(name, converted):
    conversion = converted(name)
    ids = conversion.processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    assert ids == [IMAGE_TOKEN_ID, PAD_TOKEN_ID]
    assert conversion.model.config.image_token_id == IMAGE_TOKEN_ID
    assert conversion.processor.image_token_id == IMAGE_TOKEN_ID


@pytest.mark.parametrize("name", ORIGINAL_FORMATS)
def test_padding_has_a_token_of_its_own(name, converted):
    conversion = converted(name)
    assert conversion.processor.tokenizer.pad_token_id == VOCAB_SIZE + 1
    inputs = conversion.processor(text=["what is this?", "a"], padding=True, return_tensors="pt")
    assert inputs["input_ids"][1, 0] == VOCAB_SIZE + 1


@pytest.mark.parametrize("name", ORIGINAL_FORMATS)
def test_embeddings_grow_to_a_multiple_of_64(name, converted):
    conversion = converted(name)
    for key in RESIZED:
        assert len(conversion.tensors[key]) == PADDED_VOCAB_SIZE
    assert conversion.model.config.text_config.vocab_size == PADDED_VOCAB_SIZE


@pytest.mark.parametrize("key", RESIZED)
@pytest.mark.parametrize("name", ["original, sharded .bin", "original, safetensors", "stage 1", "LoRA, .bin"])
def test_new_rows_are_finite_and_in_use(name, key, converted):
    rows = converted(name).tensors[key].float()
    new, old = rows[VOCAB_SIZE:], rows[:VOCAB_SIZE]
    assert torch.isfinite(new).all()
    assert new[:2].abs().sum(-1).min() > 0  # those of <image> and <pad>
    assert new.abs().max() < 2 * old.abs().max()


@pytest.mark.parametrize("name", ["original, one .bin", "snippet, stage 1, query_num", "LoRA, safetensors"])
def test_new_rows_are_the_same_in_every_conversion(name, converted, tmp_path):
    conversion = converted(name)
    torch.manual_seed(12345)
    again = Converted(conversion.source, tmp_path / "again").tensors
    assert all(same_bits(again[key], value) for key, value in conversion.tensors.items())


def test_tokens_that_the_original_added_come_before_the_image_token(tmp_path, vision_tower):
    """`mm_use_im_start_end` adds two, and the embeddings have their rows."""
    llava = OriginalLlava(text_config={**llava_sources.TEXT_CONFIG, "vocab_size": VOCAB_SIZE + 2})
    llava_sources.write_original(tmp_path / "source", llava, config={"mm_use_im_start_end": True})
    added = {"<im_start>": VOCAB_SIZE, "<im_end>": VOCAB_SIZE + 1}
    llava_sources.write_json(tmp_path / "source", "added_tokens.json", added)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=vision_tower(llava))
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "deco").tokenizer
    ids = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2, VOCAB_SIZE + 3]
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<image>", "<pad>"]) == ids
    model = load_deco(tmp_path / "deco")
    assert model.config.image_token_id == VOCAB_SIZE + 2
    prompt = [1, 20, VOCAB_SIZE, *IMAGE, VOCAB_SIZE + 1, 30]
    inputs = model_inputs([prompt], PATCH_GRID**2, VOCAB_SIZE + 2)
    found = logits_of(model, inputs)[0, :, : VOCAB_SIZE + 2]
    torch.testing.assert_close(found, llava(prompt, inputs["pixel_values"]), rtol=0, atol=1e-5)


def test_conversion_leaves_the_global_random_state_alone(tmp_path):
    source = llava_sources.write("original, safetensors", tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    convert(source.folder, tmp_path / "deco", **source.arguments)
    assert torch.equal(torch.rand(3), expected)


# --- tokenizer, images, chat -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["what is this?", "USER: Hi", "  two  spaces\nand ü 你 123", "it's</s>"])
@pytest.mark.parametrize("name", ["original, sharded .bin", "stage 1", "LoRA, safetensors"])
def test_text_has_the_ids_that_sentencepiece_gives(name, text, converted):
    tokenizer = converted(name).processor.tokenizer
    text, end = text.removesuffix("</s>"), [2] * text.endswith("</s>")
    expected = [1, *llava_sources.sentencepiece_processor().encode(text), *end]
    assert tokenizer(text + "</s>" * len(end)).input_ids == expected


@pytest.mark.parametrize("text", ["what is this?", "  two  spaces\nand ü 你 123"])
def test_ids_decode_to_the_text(text, converted):
    tokenizer = converted("original, sharded .bin").processor.tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_prompt_with_an_image_has_the_ids_of_the_original_code(converted):
    """It tokenizes the text before and after an image apart, so that a newline after the image begins with a space."""
    processor = converted("original, sharded .bin").processor
    prompt = "USER: <image>\nwhat is this? ASSISTANT:"
    found = processor(images=tiny.picture(0), text=prompt, pooled_grid_size=1)["input_ids"][0]
    found = found.tolist() if isinstance(found, torch.Tensor) else found
    expected = llava_sources.original_ids(prompt)
    assert found == [IMAGE_TOKEN_ID if index == IMAGE_MARKER else index for index in expected]


@pytest.mark.parametrize("name", HF_FORMATS)
def test_llava_hf_inputs_are_its_processors(name, converted):
    conversion = converted(name)
    arguments = {
        "images": [tiny.picture(0), tiny.picture(1, 40, 30)],
        "text": ["USER: <image>\nwhat is this? ASSISTANT:", "it is <image> a"],
        "padding": True,
        "return_tensors": "pt",
    }
    expected = AutoProcessor.from_pretrained(conversion.source.folder)(**arguments, padding_side="left")
    found = conversion.processor(**arguments)
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(found[key], expected[key]), key


def expected_pixels(image, pad):
    """The original code's preprocessing: to a square of the mean colour, then CLIP's."""
    if pad:
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in llava_sources.CLIP_MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": tiny.IMAGE_SIZE}, crop_size={"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    )
    return processor(image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(("height", "width"), [(30, 40), (55, 30), (35, 35)])
@pytest.mark.parametrize("name", ["original, sharded .bin", "original, safetensors", "LoRA, .bin"])
def test_images_are_padded_to_a_square_as_in_training(name, height, width, converted):
    processor = converted(name).processor
    assert processor.image_processor.do_pad is True
    image = tiny.picture(3, height, width)
    found = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    expected = expected_pixels(image, pad=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # half a step of 8 bits, normalized


@pytest.mark.parametrize("aspect", ["square", None])
def test_images_are_not_padded_where_they_were_not(aspect, tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_original(tmp_path / "source", llava, config={"image_aspect_ratio": aspect})
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=vision_tower(llava))
    processor = AutoProcessor.from_pretrained(tmp_path / "deco")
    image = tiny.picture(3)
    found = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected_pixels(image, pad=False), rtol=0, atol=0.02)


def chat(*texts, image=True):
    roles = ["user", "assistant"]
    messages = []
    for index, text in enumerate(texts):
        content = [{"type": "text", "text": text}]
        if image and index == 0:
            content.insert(0, {"type": "image", "image": tiny.picture(0)})
        messages.append({"role": roles[index % 2], "content": content})
    return messages


@pytest.mark.parametrize(
    "name", ["original, sharded .bin", "stage 1", "LoRA, safetensors", "snippet, full, query_num"]
)
def test_originals_get_vicunas_chat_template(name, converted):
    processor = converted(name).processor
    found = processor.apply_chat_template(chat("What?", "A dog.", "Red?"), add_generation_prompt=True)
    expected = f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Red? ASSISTANT:"
    assert found.removeprefix("<s>") == expected


def test_vicunas_chat_template_takes_plain_strings_and_a_system_message(converted):
    processor = converted("original, sharded .bin").processor
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    found = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert found.removeprefix("<s>") == "Be brief. USER: Hi ASSISTANT:"


def test_the_assistants_words_and_end_are_marked_for_training(converted):
    processor = converted("original, sharded .bin").processor
    inputs = processor.apply_chat_template(
        chat("What?", "A dog.", "Red?", "No.", image=False),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = (torch.as_tensor(inputs[key]).flatten() for key in ("input_ids", "assistant_masks"))
    answers = processor.tokenizer.decode(ids[mask.bool()])
    assert re.sub(r"\s", "", answers) == "Adog.</s>No.</s>"


@pytest.mark.parametrize("name", ["llava-hf saved now", "llava-hf on the Hub"])
def test_llava_hf_keeps_its_prompt_and_answers_end(name, converted):
    conversion = converted(name)
    messages = chat("What?", "A dog.", "Red?")
    source = AutoProcessor.from_pretrained(conversion.source.folder)
    found = conversion.processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = source.apply_chat_template(messages, add_generation_prompt=True)
    assert found == expected.replace("A dog. ", "A dog.</s>")


def test_a_chat_template_of_another_language_model_is_kept(tmp_path):
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    processor = llava_sources.build_hf_processor()
    processor.chat_template = template
    llava_sources.write_hf_saved(tmp_path / "source", processor=processor)
    convert(tmp_path / "source", tmp_path / "deco")
    found = AutoProcessor.from_pretrained(tmp_path / "deco").apply_chat_template(chat("What?"))
    assert found == "<|user|><image>What?"


def test_a_llava_on_llama_3_is_asked_as_llama_3(tmp_path):
    processor = llava_sources.build_hf_processor()
    processor.tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    processor.chat_template = processor.tokenizer.chat_template = None
    llava_sources.write_hf_saved(tmp_path / "source", processor=processor)
    expected = "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    assert convert(tmp_path / "source", tmp_path / "deco")["chat_template"] == "adapted"
    found = AutoProcessor.from_pretrained(tmp_path / "deco").apply_chat_template(chat("What?"))
    assert found.removeprefix("<s>") == expected
    report = convert(tmp_path / "source", tmp_path / "chatml", chat_template="chatml")
    assert report["chat_template"] == "chatml"
    found = AutoProcessor.from_pretrained(tmp_path / "chatml").apply_chat_template(chat("What?"))
    assert found == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"


@pytest.mark.parametrize("name", FORMATS)
def test_the_pipeline_answers_about_a_picture(name, converted):
    pipe = pipeline("image-text-to-text", model=str(converted(name).destination))
    (answer,) = pipe(text=chat("what is this?"), return_full_text=False, max_new_tokens=3, min_new_tokens=3)
    assert isinstance(answer["generated_text"], str)


@pytest.fixture(scope="module")
def without_the_package(tmp_path_factory):
    """Fresh processes where the package cannot be imported, with an empty cache of remote code."""
    processes = FreshProcesses(
        modules=["torch", "transformers.models.auto.modeling_auto"],
        blocked=["modeling_deco"],
        environment={"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))},
    )
    yield processes
    processes.close()


def answer_by_remote_code(folder, file):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    saved = torch.load(file, weights_only=False)
    inputs = processor(images=saved["image"], text=saved["text"], return_tensors="pt")
    with torch.no_grad():
        return torch.equal(model(**inputs).logits, saved["logits"])


@pytest.mark.parametrize("name", ["llava-hf on the Hub", "snippet, full, query_num"])
def test_the_folder_answers_where_the_package_is_not_installed(name, converted, without_the_package, tmp_path):
    conversion = converted(name)
    image, text = tiny.picture(0), "USER: <image>\nwhat is this? ASSISTANT:"
    inputs = conversion.processor(images=image, text=text, return_tensors="pt")
    torch.save({"image": image, "text": text, "logits": logits_of(conversion.model, inputs)}, tmp_path / "saved.pt")
    assert without_the_package.run(answer_by_remote_code, conversion.destination, tmp_path / "saved.pt")


# --- the other files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_code_travels_along(name, converted):
    folder = converted(name).destination
    for module in (
        "chat_templates",
        "configuration_deco",
        "hub",
        "modeling_deco",
        "pixels",
        "processing_deco",
        "projectors",
    ):
        assert (folder / f"{module}.py").exists()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == "modeling_deco.DecoForConditionalGeneration"
    assert auto_map["AutoModel"] == "modeling_deco.DecoModel"
    assert auto_map["AutoConfig"] == "configuration_deco.DecoConfig"
    assert auto_map["AutoProcessor"] == "processing_deco.DecoProcessor"
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_deco.DecoProcessor"


@pytest.mark.parametrize("name", FORMATS)
def test_the_processor_knows_the_patch_size_of_the_vision_tower(name, converted):
    folder = converted(name).destination
    patch_size = json.loads((folder / "config.json").read_text())["vision_config"]["patch_size"]
    assert json.loads((folder / "processor_config.json").read_text())["patch_size"] == patch_size


@pytest.mark.parametrize("name", FORMATS)
def test_the_folder_is_named_deco_in_its_config(name, converted):
    config = json.loads((converted(name).destination / "config.json").read_text())
    assert config["model_type"] == "deco"
    assert config["architectures"] == ["DecoForConditionalGeneration"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_card_names_source_and_licence(name, converted):
    conversion = converted(name)
    text = (conversion.destination / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == llava_sources.LICENSE
    assert conversion.source.folder.name in text


@pytest.mark.parametrize(
    "header", ["license: [mit", "- mit", "license: {mit: 1}", "license: !!python/object/apply:os.getcwd []"]
)
def test_a_malformed_card_names_no_licence(header, tmp_path):
    llava_sources.write_hf_hub(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(f"---\n{header}\n---\nWords.\n")
    (tmp_path / "source" / "LICENSES").mkdir()
    convert(tmp_path / "source", tmp_path / "deco")
    assert "licence: not stated there" in (tmp_path / "deco" / "README.md").read_text()


def test_no_licence_is_made_up(tmp_path):
    source = llava_sources.write("original, safetensors", tmp_path)
    (source.folder / "README.md").unlink()
    convert(source.folder, tmp_path / "deco", **source.arguments)
    text = (tmp_path / "deco" / "README.md").read_text()
    assert source.folder.name in text
    assert yaml.safe_load(text.split("---")[1]).get("license") in (None, "unknown", "other")


@pytest.mark.parametrize("name", FORMATS)
def test_generation_stops_where_the_source_does(name, converted):
    generation = GenerationConfig.from_pretrained(converted(name).destination)
    assert generation.eos_token_id in (2, [2])
    assert generation.bos_token_id == 1


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_saves_again(name, converted, tmp_path):
    """Vicuna's generation config has a temperature without sampling, which transformers 5 reads and does not write."""
    conversion = converted(name)
    conversion.model.save_pretrained(tmp_path / "again")
    conversion.processor.save_pretrained(tmp_path / "again")
    inputs = model_inputs(PROMPTS["one image"], conversion.model.config.num_image_tokens, IMAGE_TOKEN_ID)
    assert torch.equal(logits_of(load_deco(tmp_path / "again"), inputs), logits_of(conversion.model, inputs))


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_is_what_convert_returns(name, converted):
    conversion = converted(name)
    assert json.loads((conversion.destination / "conversion_report.json").read_text()) == conversion.report


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_names_source_versions_and_grid(name, converted):
    conversion = converted(name)
    report, (rows, cols) = conversion.report, conversion.source.grid
    assert str(report["source"]) == str(conversion.source.folder)
    assert "revision" in report
    assert report["versions"].keys() >= {"transformers", "torch", "safetensors"}
    assert report["pooled_grid_size"] in (rows, [rows, cols])


def digest_of(file) -> str:
    return xxhash.xxh3_128_hexdigest(file.read_bytes())


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_has_the_digest_of_each_weight_file(name, converted):
    conversion = converted(name)
    weights = [file for file in conversion.source.folder.iterdir() if file.suffix in (".bin", ".safetensors")]
    weights = [file for file in weights if file.name != "training_args.bin"]
    found = {file: entry["xxh3_128"] for file, entry in conversion.report["sources"]["source"]["files"].items()}
    assert {file.name: found.get(file.name) for file in weights} == {file.name: digest_of(file) for file in weights}
    written = conversion.destination.glob("*.safetensors")
    assert conversion.report["written"] == {file.name: digest_of(file) for file in written}


@pytest.mark.parametrize("name", [*STAGE_1_FORMATS, *SNIPPET_FORMATS, *LORA_FORMATS, "original, safetensors"])
def test_the_report_has_the_digests_of_the_other_folders_too(name, converted):
    conversion = converted(name)
    for part in ("vision_tower", "base_model"):
        if part in conversion.source.arguments:
            folder = conversion.source.arguments[part]
            files = conversion.report["sources"][part]["files"]
            weights = [file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")]
            assert weights
            assert all(files[file.name]["xxh3_128"] == digest_of(file) for file in weights)


@pytest.mark.parametrize("name", FORMATS)
def test_the_report_lists_what_was_dropped_and_why(name, converted):
    conversion = converted(name)
    assert conversion.source.dropped
    for key in conversion.source.dropped:
        assert conversion.report["dropped"][key]


@pytest.mark.parametrize("name", ["original, tower inside, .bin, buffers", "llava-hf saved now"])
def test_only_the_unused_vision_layer_and_buffers_are_dropped(name, converted):
    for key in converted(name).report["dropped"]:
        assert re.search(r"encoder\.layers\.2\.|position_ids$|inv_freq$", key), key


@pytest.mark.parametrize("name", ["original, sharded .bin", "LoRA, .bin", "llava-hf saved now"])
def test_the_source_is_not_touched(name, tmp_path):
    source = llava_sources.write(name, tmp_path)

    def digests():
        files = [file for file in tmp_path.rglob("*") if file.is_file() and tmp_path / "deco" not in file.parents]
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = digests()
    convert(source.folder, tmp_path / "deco", **source.arguments)
    assert digests() == before


def test_only_the_destination_is_left_behind(tmp_path):
    source = llava_sources.write("llava-hf on the Hub", tmp_path / "sources")
    convert(source.folder, tmp_path / "deco", **source.arguments)
    assert {entry.name for entry in tmp_path.iterdir()} == {"sources", "deco"}


# --- from the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is only the client's cache: `add(repository, folder, commit, *refs)` puts a folder into it.

    The client is offline in the tests, so that whatever asks it (huggingface_hub or transformers) looks there.
    """
    # Nothing else is assumed of how the converter asks the Hub; adapt this fixture where that is too little.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(repository, folder, commit, *refs):
        storage = tmp_path / "cache" / ("models--" + repository.replace("/", "--"))
        shutil.copytree(folder, storage / "snapshots" / commit)
        (storage / "refs").mkdir(exist_ok=True)
        for ref in refs:
            (storage / "refs" / ref).write_text(commit)

    return add


def test_a_hub_id_is_a_source(hub, tmp_path):
    llava_sources.write_hf_hub(tmp_path / "source", shards=2)
    hub("someone/some-llava", tmp_path / "source", "a" * 40, "main")
    report = convert("someone/some-llava", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert report["source"] == "someone/some-llava"
    assert report["revision"] == "a" * 40
    assert "someone/some-llava" in (tmp_path / "deco" / "README.md").read_text()
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


def test_a_revision_reaches_every_file(hub, tmp_path):
    old = llava_sources.build_hf_model(seed=1, vision_feature_layer=-3)
    old.generation_config.max_new_tokens = 17
    llava_sources.write_hf_saved(tmp_path / "old", old)
    llava_sources.write_readme(tmp_path / "old", license="mit")
    llava_sources.write_hf_saved(tmp_path / "new")
    hub("someone/some-llava", tmp_path / "old", "a" * 40, "v1")
    hub("someone/some-llava", tmp_path / "new", "b" * 40, "main")
    report = convert("someone/some-llava", tmp_path / "deco", pooled_grid_size=PATCH_GRID, revision="v1")
    assert report["revision"] == "a" * 40
    assert "license: mit" in (tmp_path / "deco" / "README.md").read_text()
    generation_config = GenerationConfig.from_pretrained(tmp_path / "deco")
    assert generation_config.max_new_tokens == 17
    assert generation_config.suppress_tokens == [load_deco(tmp_path / "deco").config.image_token_id]
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "old")


def test_the_tower_that_the_config_names_comes_from_the_hub(hub, tmp_path):
    llava = OriginalLlava()
    llava_sources.write_original(tmp_path / "source", llava)
    llava_sources.write_clip(tmp_path / "clip", llava.tower)
    hub("openai/clip-vit-large-patch14-336", tmp_path / "clip", "c" * 40, "main")
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_original(load_deco(tmp_path / "deco"), llava)


def test_lora_with_base_and_tower_from_the_hub(hub, tmp_path):
    llava = OriginalLlava()
    llava_sources.write_clip(tmp_path / "clip", llava.tower)
    llava_sources.write_base_model(tmp_path / "base", llava)
    llava_sources.write_lora(tmp_path / "source", llava_sources.add_lora(llava), kind="bin")
    hub("openai/clip-vit-large-patch14-336", tmp_path / "clip", "c" * 40, "main")
    hub("lmsys/vicuna-7b-v1.5", tmp_path / "base", "d" * 40, "main")
    hub("someone/lora", tmp_path / "source", "e" * 40, "v2")
    convert(
        "someone/lora",
        tmp_path / "deco",
        pooled_grid_size=PATCH_GRID,
        base_model="lmsys/vicuna-7b-v1.5",
        revision="v2",
    )
    assert_equals_original(load_deco(tmp_path / "deco"), llava)
