# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The way back: a DeCo folder becomes a llava-hf folder, which transformers loads as LLaVA with the same logits."""

import json

import llava_sources
import pytest
import tiny
import torch
from llava_sources import IMAGE_MARKER, IMAGE_TOKEN_ID, PATCH_GRID, VOCAB_SIZE, OriginalLlava, read_weights
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from modeling_deco import DecoForConditionalGeneration
from modeling_deco.conversion import InputError, convert, export

NUM_PATCHES = PATCH_GRID**2
PROMPT = [1, 20, *[IMAGE_TOKEN_ID] * NUM_PATCHES, 270, 285, 299]


class RoundTrip:
    """A llava-hf folder, the DeCo folder made of it, and the llava-hf folder made of that."""

    def __init__(self, folder, pooled_grid_size=PATCH_GRID, name="llava-hf saved now"):
        self.source = llava_sources.write(name, folder).folder
        self.deco, self.exported = folder / "deco", folder / "exported"
        convert(self.source, self.deco, pooled_grid_size=pooled_grid_size)
        export(self.deco, self.exported)

    def go(self, direction, destination, **kwargs):
        """One of the two steps once more."""
        if direction == "convert":
            return convert(self.source, destination, **kwargs)
        return export(self.deco, destination, **kwargs)


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    return RoundTrip(tmp_path_factory.mktemp("round_trip"))


def load_llava(folder) -> LlavaForConditionalGeneration:
    """The model in fp32; each of its weights is in the folder, and nothing else is."""
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert not any(loading.values()), loading
    return model


@torch.no_grad()
def logits_of(model, prompts, **kwargs):
    num_images = sum(prompt.count(IMAGE_TOKEN_ID) for prompt in prompts) // NUM_PATCHES
    inputs = tiny.batch(*prompts)
    if num_images:
        inputs["pixel_values"] = tiny.pixels(num_images)
    return model(**inputs, **kwargs).logits


@pytest.mark.parametrize(
    ("name", "pooled_grid_size"),
    [("llava-hf saved now", PATCH_GRID), ("llava-hf on the Hub, sharded", [2, 3]), ("llava-hf of 4.52", 2)],
)
def test_a_round_trip_gives_the_source_back(name, pooled_grid_size, tmp_path):
    trip = RoundTrip(tmp_path, pooled_grid_size, name)
    source, exported = load_llava(trip.source), load_llava(trip.exported)
    for prompts in ([PROMPT], [[1, 4, 5, 6]], [PROMPT, [1, 7], PROMPT[1:] + PROMPT]):
        assert torch.equal(logits_of(exported, prompts), logits_of(source, prompts))
    deco = AutoModelForImageTextToText.from_pretrained(trip.deco, dtype=torch.float32)
    at_the_patches = logits_of(deco, [PROMPT], pooled_grid_sizes=torch.tensor([[PATCH_GRID, PATCH_GRID]]))
    assert torch.equal(logits_of(exported, [PROMPT]), at_the_patches)
    dtypes = [{value.dtype for value in read_weights(folder).values()} for folder in (trip.source, trip.exported)]
    assert dtypes[0] == dtypes[1]

    config = json.loads((trip.exported / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert not {"auto_map", "pooled_grid_size"} & config.keys()
    assert not list(trip.exported.glob("*.py"))

    source, exported = (AutoProcessor.from_pretrained(folder) for folder in (trip.source, trip.exported))
    assert isinstance(exported, LlavaProcessor)
    arguments = {
        "images": [tiny.picture(0), tiny.picture(1, 40, 30)],
        "text": ["USER: <image>\nwhat is this? ASSISTANT:", "it is <image> a"],
        "padding": True,
        "return_tensors": "pt",
    }
    expected, found = source(**arguments, padding_side="left"), exported(**arguments, padding_side="left")
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def test_the_chat_template_stays(round_trip):
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    source, exported = (AutoProcessor.from_pretrained(folder) for folder in (round_trip.source, round_trip.exported))
    messages = [{"role": "user", "content": content}]
    expected = source.apply_chat_template(messages, add_generation_prompt=True)
    assert exported.apply_chat_template(messages, add_generation_prompt=True) == expected


def test_siglip_goes_back_too(tmp_path):
    model = llava_sources.build_hf_model(tiny.VISION_CONFIGS["siglip"], vision_feature_select_strategy="full")
    processor = llava_sources.build_hf_processor(strategy="full")
    llava_sources.write_hf_saved(tmp_path / "source", model, processor)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=2)
    export(tmp_path / "deco", tmp_path / "exported")
    assert torch.equal(
        logits_of(load_llava(tmp_path / "exported"), [PROMPT]), logits_of(load_llava(tmp_path / "source"), [PROMPT])
    )
    exported = AutoProcessor.from_pretrained(tmp_path / "exported")
    inputs = exported(images=tiny.picture(0), text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == NUM_PATCHES


def test_tied_embeddings_go_back_too(tmp_path):
    text_config = {**tiny.TEXT_CONFIGS["qwen2"], "vocab_size": 320, "tie_word_embeddings": True}
    model = llava_sources.build_hf_model(text_config=text_config, tie_word_embeddings=True)
    llava_sources.write_hf_saved(tmp_path / "source", model)
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=2)
    export(tmp_path / "deco", tmp_path / "exported")
    exported = load_llava(tmp_path / "exported")
    assert exported.lm_head.weight is exported.get_input_embeddings().weight
    assert torch.equal(logits_of(exported, [PROMPT]), logits_of(load_llava(tmp_path / "source"), [PROMPT]))


def test_an_original_llava_gets_to_transformers_by_way_of_deco(tmp_path):
    source = llava_sources.write("original, safetensors", tmp_path)
    convert(source.folder, tmp_path / "deco", **source.arguments)
    export(tmp_path / "deco", tmp_path / "exported")
    ids = [IMAGE_MARKER if index == IMAGE_TOKEN_ID else index for index in PROMPT]
    ids = [index for place, index in enumerate(ids) if index != IMAGE_MARKER or ids[place - 1] != IMAGE_MARKER]
    expected = source.reference(ids, tiny.pixels(1))
    found = logits_of(load_llava(tmp_path / "exported"), [PROMPT])[0, :, :VOCAB_SIZE]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_deco_that_was_saved_by_the_model_can_be_exported(tmp_path):
    model = tiny.build_model()
    model.save_pretrained(tmp_path / "deco")
    tiny.build_processor().save_pretrained(tmp_path / "deco")
    export(tmp_path / "deco", tmp_path / "exported")
    prompt = tiny.prompt("what", NUM_PATCHES, "?")
    inputs = {**tiny.batch(prompt), "pixel_values": tiny.pixels(1)}
    grids = torch.tensor([list(tiny.PATCH_GRID)])
    with torch.no_grad():
        expected = model(**inputs, pooled_grid_sizes=grids).logits
        assert torch.equal(load_llava(tmp_path / "exported")(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"projector_num_layers": 3}, r"projector_num_layers=3 .* has 2 linear layers"),
        (
            {"projector_type": "c_abstractor", "projector_config": {"hidden_size": 16, "num_hidden_layers": 1}},
            "projector_type='c_abstractor'.*avg_pool and mlp can be exported",
        ),
    ],
    ids=["three layers", "compressive"],
)
def test_another_projector_is_refused(changes, match, tmp_path):
    tiny.build_model(**changes).save_pretrained(tmp_path / "deco")
    with pytest.raises(InputError, match=match):
        export(tmp_path / "deco", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("direction", ["convert", "export"])
def test_overwrite_replaces_a_model_that_was_there(direction, round_trip, tmp_path):
    tiny.build_model().save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "model-00001-of-00009.safetensors").write_text("stale")
    round_trip.go(direction, tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "model-00001-of-00009.safetensors").exists()
    expected = DecoForConditionalGeneration if direction == "convert" else LlavaForConditionalGeneration
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path / "full"), expected)


def test_an_original_with_the_authors_projector_can_be_exported(tmp_path):
    """Its weights are LLaVA's, so that transformers' LLaVA reads them, without pooling."""
    source = llava_sources.write("snippet, full, query_num", tmp_path)
    convert(source.folder, tmp_path / "deco", **source.arguments)
    export(tmp_path / "deco", tmp_path / "exported")
    unpooled = OriginalLlava()
    unpooled.load_state_dict(source.reference.state_dict())
    expected = unpooled([1, 20, IMAGE_MARKER, 270, 285, 299], tiny.pixels(1))
    found = logits_of(load_llava(tmp_path / "exported"), [PROMPT])[0, :, :VOCAB_SIZE]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
