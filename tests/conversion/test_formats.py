# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Every LLaVA format becomes a DeCo folder that works at once, with LLaVA's logits and the source's bytes.

What is expected comes from transformers' own LLaVA, from `llava_sources.OriginalLlava` and from PEFT; the sources are
written by `llava_sources`, under folder names that mislead.
"""

import json
import random
import re
import shutil

import hostile
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

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.conversion import convert
from modeling_deco.conversion.sources import open_source
from modeling_deco.conversion.weights import read_weights as stored_weights
from modeling_deco.hub import _REMOTE_CODE_FILES

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
    """The model in fp32; each of its weights is in the folder, and nothing else is."""
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, DecoForConditionalGeneration)
    assert not any(loading.values()), loading
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


def assert_equals_llava_hf(model, folder, batches=(PROMPTS["left-padded"],), tokens_per_image=None, **kwargs):
    """Bit for bit the logits of transformers' LLaVA, at the grid of the patches."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokens_per_image = tokens_per_image or PATCH_GRID**2
    for prompts in batches:
        inputs = model_inputs(prompts, tokens_per_image, llava.config.image_token_id, **kwargs)
        assert torch.equal(logits_of(model, inputs), logits_of(llava, inputs)), prompts


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


@pytest.mark.parametrize("name", ["llava-hf on the Hub, sharded", "llava-hf of 4.52", "llava-hf in memory"])
def test_transformers_reads_the_written_llava_hf_layouts_whole(name, tmp_path):
    source = llava_sources.write(name, tmp_path)
    llava, loading = LlavaForConditionalGeneration.from_pretrained(source.folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert all(same_bits(value, source.tensors[name]) for name, value in llava.state_dict().items())


# --- every format ------------------------------------------------------------------------------------------------


class Conversion:
    """A source, the folder that `convert` made of it, and what is in the folder; the model is loaded in fp32."""

    def __init__(self, source, destination):
        self.source, self.destination = source, destination
        self.report = convert(source.folder, destination, **source.arguments)
        self.model = load_deco(destination)
        self.processor = AutoProcessor.from_pretrained(destination)
        self.tensors = in_memory_names(read_weights(destination))

    def json(self, name):
        return json.loads((self.destination / name).read_text())


NEWEST = ("llava-hf on the Hub", "original, one .bin", "LoRA, .bin")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.newest] if name in NEWEST else []) for name in FORMATS]
)
def test_original_logits_are_the_original_functions_and_all_files_are_right(name, tmp_path):
    source = llava_sources.write(name, tmp_path)
    before = hostile.snapshot(tmp_path)
    conversion = Conversion(source, tmp_path / "deco")
    after = hostile.snapshot(tmp_path)
    assert {path: entry for path, entry in after.items() if path.split("/")[0] != "deco"} == before
    batches = PROMPTS.values()
    if name in HF_FORMATS:
        assert_equals_llava_hf(conversion.model, conversion.source.folder, batches, pad_token_id=PAD_TOKEN_ID)
    else:
        for prompts in batches:
            assert_equals_original(conversion.model, conversion.source.reference, prompts)
    check_weights(conversion, is_lora=name in LORA_FORMATS, is_original=name in ORIGINAL_FORMATS)
    check_config(conversion)
    check_report(conversion)
    check_other_files(conversion)
    check_tokenizer(conversion)
    if name in HF_FORMATS:
        check_inputs_of_llava_hf(conversion)
    else:
        check_new_rows(conversion)
        check_text_of_the_original(conversion)
        check_pixels_of_the_original(conversion)
    if name in ("llava-hf saved now", "stage 1"):
        check_that_it_saves_again(conversion, tmp_path / "again")


def check_weights(conversion, is_lora, is_original):
    """Each tensor has the bits of the source; LoRA's are merged, and embeddings may have more rows."""
    written, expected = conversion.tensors, conversion.source.tensors
    unused = {key for key in expected if "vision_tower.encoder.layers.2." in key}
    assert unused
    assert written.keys() == expected.keys() - unused
    for key, value in written.items():
        if is_lora and MERGED.search(key):
            assert not torch.equal(value, expected[key]), key
            continue
        rows = VOCAB_SIZE if is_original and key in RESIZED else len(value)
        assert same_bits(value[:rows].contiguous(), expected[key]), key


def check_config(conversion):
    norm = conversion.source.tensors["model.language_model.norm.weight"]
    assert conversion.json("config.json")["dtype"] == str(norm.dtype).removeprefix("torch.")
    config, (rows, cols) = conversion.model.config, conversion.source.grid
    assert config.num_image_tokens == rows * cols
    assert config.image_token_id == IMAGE_TOKEN_ID
    assert config.vision_feature_layer == -1
    assert config.vision_config.num_hidden_layers == llava_sources.VISION_CONFIG["num_hidden_layers"] - 1
    assert config.text_config.vocab_size == PADDED_VOCAB_SIZE
    saved = conversion.json("config.json")
    assert saved["model_type"] == "deco"
    assert saved["architectures"] == ["DecoForConditionalGeneration"]
    assert (
        saved["auto_map"].items()
        >= {
            "AutoConfig": "configuration_deco.DecoConfig",
            "AutoModel": "modeling_deco.DecoModel",
            "AutoModelForImageTextToText": "modeling_deco.DecoForConditionalGeneration",
            "AutoProcessor": "processing_deco.DecoProcessor",
        }.items()
    )


def digest_of(file) -> str:
    return xxhash.xxh3_128_hexdigest(file.read_bytes())


def check_report(conversion):
    """Source, grid, versions, what was dropped, and the digest of each weight file that was read or written."""
    report, source, (rows, cols) = conversion.report, conversion.source, conversion.source.grid
    assert conversion.json("conversion_report.json") == report
    assert str(report["source"]) == str(source.folder)
    assert report["revision"] is None
    assert report["versions"].keys() >= {"transformers", "torch", "safetensors"}
    assert report["pooled_grid_size"] in (rows, [rows, cols])
    assert source.dropped
    assert all(report["dropped"].get(key) for key in source.dropped), report["dropped"]
    for key in report["dropped"]:
        assert re.search(r"encoder\.layers\.2\.|position_ids$|inv_freq$|^(text_|visual_proj|logit_)", key), key
    folders = {"source": source.folder}
    folders |= {part: source.arguments[part] for part in ("vision_tower", "base_model") if part in source.arguments}
    for part, folder in folders.items():
        weights = [file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")]
        weights = [file for file in weights if file.name != "training_args.bin"]
        assert weights, part
        found = {file: entry["xxh3_128"] for file, entry in report["sources"][part]["files"].items()}
        if part == "vision_tower" and any("vision_tower.vision_tower" in key for key in source.dropped):
            continue  # the checkpoint has its own, and this one is not read
        assert {file.name: found.get(file.name) for file in weights} == {
            file.name: digest_of(file) for file in weights
        }
    written = conversion.destination.glob("*.safetensors")
    assert report["written"] == {file.name: digest_of(file) for file in written}


def check_other_files(conversion):
    """The code, the card, and the settings of processor and generation."""
    folder = conversion.destination
    assert {file.name for file in folder.glob("*.py")} == set(_REMOTE_CODE_FILES)
    processor = conversion.json("processor_config.json")
    assert processor["auto_map"]["AutoProcessor"] == "processing_deco.DecoProcessor"
    assert processor["patch_size"] == conversion.model.config.vision_config.patch_size
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == llava_sources.LICENSE
    assert conversion.source.folder.name in card
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id in (2, [2])
    assert generation.bos_token_id == 1


def check_tokenizer(conversion):
    """`<image>` is the image token of all files, and padding has a token of its own, on the left."""
    processor, (rows, cols) = conversion.processor, conversion.source.grid
    assert processor.pooled_grid_size in (rows, [rows, cols])
    assert processor.image_token_id == IMAGE_TOKEN_ID
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [IMAGE_TOKEN_ID, PAD_TOKEN_ID]
    assert processor.tokenizer.pad_token_id == PAD_TOKEN_ID
    inputs = processor(text=["what is this?", "a"], padding=True, return_tensors="pt")
    assert inputs["input_ids"][1, 0] == PAD_TOKEN_ID


def check_new_rows(conversion):
    """Embeddings grow to a multiple of 64; the new rows are finite, and those of the new tokens are not zero."""
    for key in RESIZED:
        rows = conversion.tensors[key].float()
        new, old = rows[VOCAB_SIZE:], rows[:VOCAB_SIZE]
        assert len(rows) == PADDED_VOCAB_SIZE
        assert torch.isfinite(new).all()
        assert new[:2].abs().sum(-1).min() > 0  # those of <image> and <pad>
        assert new.abs().max() < 2 * old.abs().max()


def check_inputs_of_llava_hf(conversion):
    """Inputs are those of the source's processor. So are prompts, but that an answer has its end."""
    source = AutoProcessor.from_pretrained(conversion.source.folder)
    arguments = {
        "images": [tiny.picture(0), tiny.picture(1, 40, 30)],
        "text": ["USER: <image>\nwhat is this? ASSISTANT:", "it is <image> a"],
        "padding": True,
        "return_tensors": "pt",
    }
    expected, found = source(**arguments, padding_side="left"), conversion.processor(**arguments)
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(found[key], expected[key]), key
    messages = chat("What?", "A dog.", "Red?")
    expected = source.apply_chat_template(messages, add_generation_prompt=True)
    found = conversion.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert found == expected.replace("A dog. ", "A dog.</s>")


def check_text_of_the_original(conversion):
    """Ids are sentencepiece's. A prompt is cut at its image, so that the newline after it begins with a space."""
    processor = conversion.processor
    for text in ("what is this?", "USER: Hi", "  two  spaces\nand ü 你 123", "it's"):
        ids = processor.tokenizer(text).input_ids
        assert ids == [1, *llava_sources.sentencepiece_processor().encode(text)], text
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert processor.tokenizer("it's</s>").input_ids[-1] == 2
    prompt = "USER: <image>\nwhat is this? ASSISTANT:"
    found = processor(images=tiny.picture(0), text=prompt, pooled_grid_size=1, return_tensors="pt")["input_ids"][0]
    expected = [IMAGE_TOKEN_ID if index == IMAGE_MARKER else index for index in llava_sources.original_ids(prompt)]
    assert found.tolist() == expected
    found = processor.apply_chat_template(chat("What?", "A dog.", "Red?"), add_generation_prompt=True)
    expected = f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Red? ASSISTANT:"
    assert found.removeprefix("<s>") == expected
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    found = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert found.removeprefix("<s>") == "Be brief. USER: Hi ASSISTANT:"
    inputs = processor.apply_chat_template(
        chat("What?", "A dog.", "Red?", "No.", image=False),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = (torch.as_tensor(inputs[key]).flatten() for key in ("input_ids", "assistant_masks"))
    assert re.sub(r"\s", "", processor.tokenizer.decode(ids[mask.bool()])) == "Adog.</s>No.</s>"


def check_pixels_of_the_original(conversion):
    """Images are padded to a square, as in training."""
    assert conversion.processor.image_processor.do_pad is True
    for height, width in ((30, 40), (55, 30), (35, 35)):
        image = tiny.picture(3, height, width)
        found = conversion.processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
        expected = expected_pixels(image, pad=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # half a step of 8 bits, normalized


def check_that_it_saves_again(conversion, folder):
    """Vicuna's generation config has a temperature without sampling, which transformers 5 reads and does not write."""
    conversion.model.save_pretrained(folder)
    conversion.processor.save_pretrained(folder)
    inputs = model_inputs(PROMPTS["one image"], conversion.model.config.num_image_tokens, IMAGE_TOKEN_ID)
    assert torch.equal(logits_of(load_deco(folder), inputs), logits_of(conversion.model, inputs))


# --- logits ------------------------------------------------------------------------------------------------------


def test_a_model_converted_at_a_smaller_grid_is_llava_when_asked_for_the_patch_grid(tmp_path):
    source = llava_sources.write("llava-hf on the Hub", tmp_path)
    convert(source.folder, tmp_path / "deco", pooled_grid_size=2)
    model = load_deco(tmp_path / "deco")
    llava = LlavaForConditionalGeneration.from_pretrained(source.folder, dtype=torch.float32)
    inputs = model_inputs(PROMPTS["left-padded"], PATCH_GRID**2, IMAGE_TOKEN_ID)
    grids = torch.tensor([[PATCH_GRID, PATCH_GRID]] * len(inputs["pixel_values"]))
    assert torch.equal(logits_of(model, {**inputs, "pooled_grid_sizes": grids}), logits_of(llava, inputs))


@pytest.mark.newest
@pytest.mark.parametrize(("grid", "rows_and_cols"), [([2, 3], (2, 3)), (4, (4, 4))])
def test_a_pooled_grid_pools_as_the_authors_do(grid, rows_and_cols, tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_original(tmp_path / "source", llava)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=grid, vision_tower=vision_tower(llava))
    llava.pooled_grid = rows_and_cols
    model = load_deco(tmp_path / "deco")
    assert model.config.image_positions == "patch"
    model.config.image_positions = "sequence"  # the authors' numbering
    assert_equals_original(model, llava)


@pytest.mark.parametrize(("num_layers", "pooled_grid"), [(1, None), (3, (2, 2))])
def test_a_projector_of_another_depth(num_layers, pooled_grid, tmp_path, vision_tower):
    llava = OriginalLlava(pooled_grid=pooled_grid, num_layers=num_layers)
    config = {"query_num": 4, "layer_num": num_layers} if pooled_grid else {}
    llava_sources.write_original(tmp_path / "source", llava, config=config)
    grid = None if pooled_grid else PATCH_GRID
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=grid, vision_tower=vision_tower(llava))
    model = load_deco(tmp_path / "deco")
    assert model.config.projector_num_layers == num_layers
    assert model.config.image_positions == ("sequence" if pooled_grid else "patch")  # as it was trained
    assert_equals_original(model, llava)


@pytest.mark.parametrize("layer", [-1, -3, None])
def test_another_vision_layer(layer, tmp_path):
    """Without the field it is transformers' default."""
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model(vision_feature_layer=layer or -2))
    hostile.edit_json(tmp_path / "source" / "config.json", removed=[] if layer else ["vision_feature_layer"])
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


@pytest.mark.parametrize("choices", [{"multimodal_projector_bias": False, "projector_hidden_act": "relu"}], ids=str)
def test_another_projector_of_llava_hf(choices, tmp_path):
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model(**choices))
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


def test_a_vision_tower_is_read_in_each_of_its_layouts(tmp_path):
    """Alone, in a whole CLIP, in either container, and as transformers 5 saves it; by option or by the config."""
    llava = OriginalLlava()
    source, towers = tmp_path / "source", [tmp_path / name for name in ("alone", "whole", "saved")]
    llava_sources.write_clip_vision(towers[0], llava.tower, kind="bin")
    llava_sources.write_clip(towers[1], llava.tower, kind="safetensors")
    llava_sources.write_clip_vision(towers[2], llava.tower)
    (towers[2] / "model.safetensors").unlink()
    llava.tower.save_pretrained(towers[2])
    llava_sources.write_original(source, llava, vision_tower=towers[2])
    for tower in (*towers[:2], None):
        convert(source, tmp_path / "deco", pooled_grid_size=PATCH_GRID, vision_tower=tower, overwrite=True)
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
    assert AutoProcessor.from_pretrained(tmp_path / "deco").pooled_grid_size == grid
    model, patches = load_deco(tmp_path / "deco"), image_size // tiny.PATCH_SIZE
    assert model.config.pooled_grid_size == grid
    model.config.pooled_grid_size = patches
    size = {"tokens_per_image": patches**2, "image_size": image_size}
    assert_equals_llava_hf(model, tmp_path / "source", [PROMPTS["one image"]], **size)


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llava-hf in memory", "float16"), ("llava-hf in memory", "bfloat16"), ("original, one .bin", "float32")],
)
def test_a_given_dtype_is_every_tensors(name, dtype, tmp_path):
    source = llava_sources.write(name, tmp_path)
    convert(source.folder, tmp_path / "deco", **source.arguments, dtype=dtype)
    for key, value in in_memory_names(read_weights(tmp_path / "deco")).items():
        expected = source.tensors[key].to(getattr(torch, dtype))
        assert same_bits(value[: len(expected)].contiguous(), expected), key
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "deco").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("seed", range(4))
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
def test_tensors_of_a_pickle_may_lie_anywhere_in_a_storage(kind, tmp_path):
    numbers = torch.arange(24.0).view(2, 3, 4)
    laid = {
        "first in a storage": numbers[0],
        "second in a storage": numbers[1],
        "of 16 bits": numbers.half()[1],
        "transposed": numbers[0].T,
        "every second": numbers.view(12, 2)[:, 1],
        "of one name": numbers,
        "of another name": numbers,
    }
    llava_sources.write_weights(tmp_path, laid, kind=kind)
    stored = stored_weights(tmp_path)
    assert stored.keys() == laid.keys()
    for name, expected in laid.items():
        assert same_bits(stored[name].read(), expected.contiguous()), name
        data = b"".join(bytes(piece) for piece in stored[name].read_bytes())
        assert data == expected.contiguous().numpy().tobytes(), name


def test_weights_in_both_containers_are_taken_once(tmp_path):
    tensors = llava_sources.write_hf_hub(tmp_path / "source", shards=2)
    names = llava_sources.rename(tensors, llava_sources.HF_NAMES["hub"])
    llava_sources.write_weights(tmp_path / "source", names, kind="bin", shards=3)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=PATCH_GRID)
    assert_equals_llava_hf(load_deco(tmp_path / "deco"), tmp_path / "source")


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


@pytest.mark.newest
def test_lora_on_some_layers_leaves_the_others(tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_base_model(tmp_path / "base", llava)
    base = llava.tensors()
    arguments = {"vision_tower": vision_tower(llava), "base_model": tmp_path / "base", "pooled_grid_size": PATCH_GRID}
    llava_sources.write_lora(tmp_path / "source", llava_sources.add_lora(llava, target_modules=["q_proj", "v_proj"]))
    convert(tmp_path / "source", tmp_path / "deco", **arguments)
    assert_equals_original(load_deco(tmp_path / "deco"), llava)
    written = in_memory_names(read_weights(tmp_path / "deco"))
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    assert same_bits(written[name], base[name])


# --- ids and embeddings ------------------------------------------------------------------------------------------


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


def test_new_rows_are_the_same_in_every_conversion_and_the_global_random_state_stays(tmp_path):
    source = llava_sources.write("original, one .bin", tmp_path)
    first = convert(source.folder, tmp_path / "first", **source.arguments)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    second = convert(source.folder, tmp_path / "second", **source.arguments)
    assert torch.equal(torch.rand(3), expected)
    assert first["tensors"] == second["tensors"]


# --- tokenizer, images, chat -------------------------------------------------------------------------------------


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


def test_images_are_not_padded_where_they_were_not(tmp_path, vision_tower):
    llava = OriginalLlava()
    llava_sources.write_original(tmp_path / "source", llava, config={"image_aspect_ratio": "square"})
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


def test_the_pipeline_answers_about_an_image(tmp_path):
    source = llava_sources.write("llava-hf on the Hub", tmp_path)
    convert(source.folder, tmp_path / "deco")
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "deco"))
    (answer,) = pipe(text=chat("what is this?"), return_full_text=False, max_new_tokens=3, min_new_tokens=3)
    assert isinstance(answer["generated_text"], str)


@pytest.mark.slow
def test_the_folder_answers_where_the_package_is_not_installed(tmp_path, without_the_package):
    conversion = Conversion(llava_sources.write("snippet, full, query_num", tmp_path), tmp_path / "deco")
    image, text = tiny.picture(0), "USER: <image>\nwhat is this? ASSISTANT:"
    inputs = conversion.processor(images=image, text=text, return_tensors="pt")
    torch.save({"image": image, "text": text, "logits": logits_of(conversion.model, inputs)}, tmp_path / "saved.pt")
    assert without_the_package.run(answer_by_remote_code, conversion.destination, tmp_path / "saved.pt")


def test_a_card_that_names_no_licence_is_no_licence(tmp_path):
    headers = ["", "license: [mit", "- mit", "license: {mit: 1}", "license: !!python/object/apply:os.getcwd []"]
    for header in headers:
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\nWords.\n")
        assert open_source(tmp_path).licence == {}, header
    llava_sources.write_hf_hub(tmp_path / "source")
    (tmp_path / "source" / "README.md").unlink()
    (tmp_path / "source" / "LICENSES").mkdir()
    convert(tmp_path / "source", tmp_path / "deco")
    card = (tmp_path / "deco" / "README.md").read_text()
    assert "licence: not stated there" in card
    assert "license" not in yaml.safe_load(card.split("---")[1])


# --- the other files ---------------------------------------------------------------------------------------------


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
    config = load_deco(tmp_path / "deco").config
    assert generation_config.suppress_tokens == [config.image_token_id, config.video_token_id]
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
