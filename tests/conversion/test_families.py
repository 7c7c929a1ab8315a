# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision become DeCos with the logits of transformers' own classes: of
transformers' folders and of the original code's, with pictures of twelve sizes, several pictures, text and videos."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import llava_families
import llava_sources
import pytest
import tiny
import torch
import yaml
from llava_families import SIZES, VIDEO_MARKER, build, frames, image_inputs, logits_of, prepare
from llava_sources import IMAGE_MARKER, PAD_TOKEN_ID
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextProcessor

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoProcessor
from modeling_deco.conversion import InputError, convert, export
from modeling_deco.conversion.checkpoints import build_config
from modeling_deco.conversion.views import parse_pinpoints, view_fields

IMAGE, VIDEO = [IMAGE_MARKER], [VIDEO_MARKER]
DEEP = [(rows, cols) for rows in range(1, 7) for cols in range(1, 7)]
VARIANTS = {
    "next, Mistral": ("llava_next", {"text": "mistral"}, "mistral"),
    "next, SigLIP of 27 pixels, tied Qwen2": (
        "llava_next",
        {
            "vision": "siglip",
            "text": "qwen2",
            "side": 27,  # 6 patches of 4 pixels
            "shapes": [(2, 3), (3, 2), (1, 1)],
            "text_choices": {"tie_word_embeddings": True},
            "tie_word_embeddings": True,
        },
        "llama3",
    ),
    "next video": ("llava_next_video", {}, "next video"),
    "next video, stride 3": ("llava_next_video", {"spatial_pool_stride": 3, "vision_feature_layer": -1}, "yi"),
    "onevision": ("llava_onevision", {}, "onevision"),
    "onevision of 30 pixels, deep, 9 views": (
        "llava_onevision",
        {"side": 30, "shapes": DEEP, "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1},
        "onevision",
    ),
}


SLOW = ("next video, stride 3", "onevision", "1.6, sharded .bin", "OneVision, tower inside")


def _marked(cases):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in cases]


@dataclass
class Family:
    """A model of transformers, its folder, and its conversion."""

    model: Any
    source: Path
    folder: Path
    report: dict
    deco: Any
    processor: Any

    @property
    def has_videos(self):
        return self.model.config.model_type != "llava_next"

    @property
    def atol(self):
        """Of videos. The mean of 9 patches is divided by 9 at once in LLaVA-NeXT-Video, by 3 twice in DeCo."""
        return 1e-5 if getattr(self.model.config, "spatial_pool_stride", 2) == 3 else 0.0


@pytest.fixture(scope="module", params=_marked(VARIANTS))
def family(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    name, choices, template = VARIANTS[request.param]
    model = build(name, **choices)
    llava_families.write_hf(root / "source", model, template)
    report = convert(root / "source", root / "deco", pooled_grid_size=2, check_logits=True)
    deco = DecoForConditionalGeneration.from_pretrained(root / "deco")
    processor = AutoProcessor.from_pretrained(root / "deco")
    return Family(model, root / "source", root / "deco", report, deco, processor)


def at_full_grid(deco, inputs, image_token_id=None, video_token_id=None) -> dict[str, torch.Tensor]:
    """Inputs of transformers' model for DeCo: with its full grids, and its ids of placeholders."""
    inputs, config = dict(inputs), deco.config
    ids = inputs["input_ids"]
    is_image, is_video = ids == (image_token_id or config.image_token_id), ids == (video_token_id or -1)
    ids = ids.masked_fill(is_image, config.image_token_id)
    inputs["input_ids"] = ids.masked_fill(is_video, config.video_token_id)
    if "image_sizes" in inputs:
        inputs["pooled_grid_sizes"] = torch.tensor([config.patch_grid] * len(inputs["image_sizes"]))
    if "pixel_values_videos" in inputs:
        num_videos, num_frames = inputs["pixel_values_videos"].shape[:2]
        size = [num_frames, 1, *config.views.full_video_grid]
        inputs["pooled_video_sizes"] = torch.tensor([size] * num_videos)
    return inputs


def assert_equal_logits(deco, model, inputs, atol=0.0):
    placeholders = model.config.image_token_id, getattr(model.config, "video_token_id", None)
    expected = logits_of(model, inputs)
    found = logits_of(deco, at_full_grid(deco, inputs, *placeholders))[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# --- logits ----------------------------------------------------------------------------------------------------------


def test_pictures_of_twelve_sizes(family):
    images = image_inputs(family.model, [[size] for size in SIZES])
    inputs = prepare(family.model, [[1, 20, *IMAGE, 270, 285 - index] for index in range(len(SIZES))], images)
    assert_equal_logits(family.deco, family.model, inputs)


def test_several_pictures_in_a_prompt_and_text_alone(family):
    images = image_inputs(family.model, [[(30, 40), (100, 33), (24, 24)], [], [(70, 71)]])
    prompts = [[1, 20, *IMAGE, 40, *IMAGE, *IMAGE], [1, 266, 285, 278], [1, *IMAGE, 41, 290]]
    assert_equal_logits(family.deco, family.model, prepare(family.model, prompts, images))
    assert_equal_logits(family.deco, family.model, prepare(family.model, [[1, 266, 285, 278, 271, 5, 80]]))


def test_videos_and_a_picture_beside_a_video(family):
    if not family.has_videos:
        pytest.skip("transformers' LLaVA-NeXT takes no videos")
    side = family.model.config.vision_config.image_size
    for num_frames in (1, 3):
        inputs = prepare(family.model, [[1, 20, *VIDEO, 30], [1, *VIDEO]], videos=frames(2, num_frames, side))
        assert_equal_logits(family.deco, family.model, inputs, family.atol)
    images = image_inputs(family.model, [[(50, 90)]])
    inputs = prepare(family.model, [[1, *VIDEO, 30, *IMAGE], [1, 7]], images, frames(1, 2, side))
    assert_equal_logits(family.deco, family.model, inputs, family.atol)


def test_check_logits_of_the_command_finds_no_difference(family):
    assert family.report["parity"]["max_abs_difference"] == 0
    assert family.report["parity"]["num_logits"] > 10_000


# --- what goes with the weights --------------------------------------------------------------------------------------


def pictures(sizes):
    return [
        Image.fromarray(llava_families.noise(*size, seed=index).transpose(1, 2, 0)) for index, size in enumerate(sizes)
    ]


def test_pixels_and_ids_are_those_of_transformers(family):
    """The ids follow from the number of features that transformers' model makes."""
    model, samples = family.model, [[size] for size in SIZES if min(size) > 3] + [[(30, 40), (90, 50)], []]
    texts = ["a <image> what is this?"] * (len(samples) - 2) + ["<image> and <image>", "what is this?"]
    inputs = family.processor(
        images=[pictures(sample) for sample in samples],
        text=texts,
        padding=True,
        pooled_grid_size=family.deco.config.patch_grid,
        return_tensors="pt",
    )
    expected = image_inputs(model, samples)
    for name, values in expected.items():
        if name != "batch_num_images":  # DeCo's has the samples without images too
            assert torch.equal(inputs[name], values), name
    config = family.deco.config
    prompts = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        ids = [IMAGE_MARKER if index == config.image_token_id else index for index in ids[mask.index(1) :]]
        prompts.append([index for place, index in enumerate(ids) if index != IMAGE_MARKER or ids[place - 1] != index])
    assert [prompt.count(IMAGE_MARKER) for prompt in prompts] == [1] * (len(samples) - 2) + [2, 0]
    reference = prepare(model, prompts, expected)
    mask = reference["attention_mask"] == 1
    assert torch.equal(inputs["attention_mask"] == 1, mask)
    assert torch.equal(inputs["input_ids"][mask], reference["input_ids"][mask])


def test_a_llava_next_counts_as_transformers_processor(family):
    if family.model.config.model_type != "llava_next":
        pytest.skip("the processors of the others cannot be built without torchvision")
    source = LlavaNextProcessor.from_pretrained(family.source)
    arguments = {"images": pictures(SIZES[:5]), "text": ["USER: <image>\nwhat is this?"] * 5, "padding": True}
    expected = source(**arguments, return_tensors="pt", padding_side="left")
    found = family.processor(**arguments, return_tensors="pt", pooled_grid_size=6)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    sizes = [list(size) for size in SIZES]
    expected = source._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert family.processor._get_num_multimodal_tokens(sizes, pooled_grid_size=6)["num_image_tokens"] == expected


def test_a_video_is_asked_about_by_messages(family):
    processor, config = family.processor, family.deco.config
    content = [{"type": "video", "video": pictures([(24, 24)] * 3)}, {"type": "text", "text": "what is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    (maps,) = family.deco.model.video_maps(inputs["pooled_video_sizes"])
    num_tokens = sum(token_map.num_tokens for token_map in maps)
    assert (inputs["input_ids"] == config.video_token_id).sum() == num_tokens
    assert logits_of(family.deco, inputs).isfinite().all()


def test_the_template_marks_answers_with_their_end(family):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = family.processor.apply_chat_template(messages, **options)
    (ids,), (mask,) = inputs["input_ids"], inputs["assistant_masks"]
    marked = family.processor.tokenizer.decode([index for index, mark in zip(ids, mask, strict=True) if mark])
    ends = {"mistral": "</s>", "vicuna": "</s>", "llama3": "<|eot_id|>", "yi": "<|im_end|>", "onevision": "<|im_end|>"}
    template = next(template for name, _, template in VARIANTS.values() if template_of(family) == template)
    assert marked.strip() == "a dog" + ends.get(template, "</s>")


def template_of(family):
    stored = json.loads((family.source / "chat_template.json").read_text())["chat_template"]
    return next(name for name, template in llava_families.CHAT_TEMPLATES.items() if template == stored)


def test_report_card_and_config_say_what_it_is(family):
    config, report = family.deco.config, family.report
    assert report["model_type"] == family.model.config.model_type
    assert report["image_grid_pinpoints"] == config.image_grid_pinpoints == family.model.config.image_grid_pinpoints
    assert report == json.loads((family.folder / "conversion_report.json").read_text())
    assert report["tensors"]["model.image_newline"]["how"] == "copied"
    assert (config.pooled_grid_size, config.image_positions, config.image_newline) == (2, "patch", True)
    assert family.deco.generation_config.suppress_tokens == [config.image_token_id, config.video_token_id]
    card = (family.folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == llava_sources.LICENSE
    rows, cols = config.patch_grid
    assert f"A view's {rows} x {cols} patches" in card
    assert f"At {rows} x {cols} for each view its logits are LLaVA's" in card


# --- without a conversion --------------------------------------------------------------------------------------------


def test_the_folder_of_transformers_loads_directly(family):
    direct = DecoForConditionalGeneration.from_pretrained(family.source)
    assert direct.config.pooled_grid == direct.config.patch_grid
    if family.has_videos:
        assert direct.config.pooled_video_grid == direct.config.views.full_video_grid
    images = image_inputs(family.model, [[(30, 40), (100, 33)], [(70, 71)]])
    inputs = prepare(family.model, [[1, 20, *IMAGE, *IMAGE], [1, *IMAGE, 41]], images)
    assert torch.equal(logits_of(direct, inputs), logits_of(family.model, inputs))
    if family.has_videos:
        side = family.model.config.vision_config.image_size
        inputs = prepare(family.model, [[1, *VIDEO, 41]], videos=frames(1, 2, side))
        torch.testing.assert_close(
            logits_of(direct, inputs), logits_of(family.model, inputs), rtol=0, atol=family.atol
        )


def test_it_is_the_conversion(family):
    grids = {"pooled_grid_size": 2, "pooled_video_grid_size": None}
    config = DecoConfig.from_pretrained(family.source, **grids)
    fields, expected = config.to_dict(), DecoConfig.from_pretrained(family.folder).to_dict()
    assert {**fields, "_name_or_path": None} == {**expected, "_name_or_path": None}
    direct = DecoForConditionalGeneration.from_pretrained(family.source, **grids)
    weights, expected = direct.state_dict(), family.deco.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    processor = DecoProcessor.from_pretrained(family.source, **grids)
    assert processor.to_dict() == family.processor.to_dict()
    assert processor.chat_template == family.processor.chat_template
    assert processor.tokenizer.get_vocab() == family.processor.tokenizer.get_vocab()


def test_a_processor_of_other_views_is_refused_by_both(family, tmp_path):
    hostile_copy(family.source, tmp_path / "copy")
    for pinpoints in ([[336, 672]], [5], "(1x1),...,(2x2)"):
        hostile.edit_json(tmp_path / "copy" / "preprocessor_config.json", image_grid_pinpoints=pinpoints)
        for load in (DecoProcessor.from_pretrained, lambda source: convert(source, tmp_path / "deco")):
            with pytest.raises(
                ValueError, match=r"image_grid_pinpoints of .* must be equal in config\.json and prepro"
            ):
                load(tmp_path / "copy")


def hostile_copy(source, destination):
    destination.mkdir()
    for path in source.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())


# --- back ------------------------------------------------------------------------------------------------------------


def test_an_export_is_of_the_family_that_it_came_from(family, tmp_path):
    export(family.folder, tmp_path / "back")
    model, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(model) is type(family.model)
    assert not any(loading.values()), loading
    inputs = prepare(family.model, [[1, 20, *IMAGE, 41]] * 2, image_inputs(family.model, [[(30, 40)], [(100, 33)]]))
    assert torch.equal(logits_of(model, inputs), logits_of(family.model, inputs))
    if family.has_videos:
        side = family.model.config.vision_config.image_size
        inputs = prepare(family.model, [[1, *VIDEO, 41]], videos=frames(1, 2, side))
        assert torch.equal(logits_of(model, inputs), logits_of(family.model, inputs))
    again = convert(tmp_path / "back", tmp_path / "deco", pooled_grid_size=2)
    assert again["image_grid_pinpoints"] == family.report["image_grid_pinpoints"]
    weights = llava_sources.read_weights(tmp_path / "deco")
    expected = llava_sources.read_weights(family.folder)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    processors = AutoProcessor.from_pretrained(tmp_path / "deco"), family.processor
    assert processors[0].to_dict() == processors[1].to_dict()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_overview": False}, "image_overview=False"),
        ({"vision_aspect_ratio": "anyres_max_9"}, "vision_aspect_ratio='anyres_max_9', spatial_pool_mode='average'"),
        ({"video_newline": True}, "video_newline=True"),
    ],
    ids=str,
)
def test_views_that_no_llava_has_are_not_exported(changes, match, tmp_path):
    views = {"image_grid_pinpoints": [[24, 48]], "image_newline": True, "video_token_id": 21, **changes}
    tiny.build_model(**views).save_pretrained(tmp_path / "deco")
    with pytest.raises(InputError, match=f"no LLaVA of transformers has .*{match}"):
        export(tmp_path / "deco", tmp_path / "exported")


# --- the original code -----------------------------------------------------------------------------------------------

ORIGINALS = {
    "1.6, sharded .bin": ("llava_next", {"text": "llama"}, {"kind": "bin", "shards": 2}),
    "1.6 on Mistral, tower inside": ("llava_next", {"text": "mistral"}, {"tower_inside": True, "shards": 3}),
    "OneVision, tower inside": ("llava_onevision", {}, {"tower_inside": True}),
    "OneVision, .bin": ("llava_onevision", {"side": 30}, {"kind": "bin"}),
    "NeXT-Video": ("llava_next_video", {}, {"config": {"model_type": "llava_llama"}, "shards": 2}),
}


@pytest.mark.parametrize("name", _marked(ORIGINALS))
def test_a_checkpoint_of_the_original_code(name, tmp_path):
    kind, choices, layout = ORIGINALS[name]
    model = build(kind, vision_feature_layer=-2, **choices)
    tower = model
    if layout.get("tower_inside"):  # the named one is where training began
        tower = build(kind, vision_feature_layer=-2, seed=7, **choices)
    llava_families.write_tower(tmp_path / "tower", tower)
    llava_families.write_original(tmp_path / "source", model, tmp_path / "tower", **layout)
    template = "chatml" if kind == "llava_onevision" else "vicuna"
    convert(tmp_path / "source", tmp_path / "deco", pooled_grid_size=2, chat_template=template)
    assert_equals_original(tmp_path / "deco", model)


def test_lora_adapters_with_a_trained_newline(tmp_path):
    model = build("llava_next", text="mistral", vision_feature_layer=-2)
    llava_families.write_tower(tmp_path / "tower", model)
    llava_families.write_lora(tmp_path / "source", model, tmp_path / "tower", tmp_path / "base")
    report = convert(tmp_path / "source", tmp_path / "deco", 2, base_model=tmp_path / "base", chat_template="mistral")
    assert report["tensors"]["model.image_newline"]["file"] == "non_lora_trainables.bin"
    assert_equals_original(tmp_path / "deco", model, atol=1e-5)  # PEFT merges in another order


def assert_equals_original(folder, model, atol=0.0):
    deco = DecoForConditionalGeneration.from_pretrained(folder)
    images = image_inputs(model, [[size] for size in SIZES])
    assert_equal_logits(deco, model, prepare(model, [[1, 20, *IMAGE, 270]] * len(SIZES), images), atol)
    if model.config.model_type != "llava_next":
        side = model.config.vision_config.image_size
        videos = frames(2, 3, side)
        assert_equal_logits(deco, model, prepare(model, [[1, *VIDEO, 30], [1, 5, *VIDEO]], videos=videos), atol)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor.image_processor) is type(llava_families.image_processor(model))
    found = processor(images=pictures([(30, 40)]), text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(found, image_inputs(model, [[(30, 40)]])["pixel_values"])


WHERE = "config.json of x"


@pytest.mark.parametrize(
    ("pinpoints", "expected"),
    [
        ("(1x1),...,(2x3)", [[24, 24], [48, 24], [72, 24], [24, 48], [48, 48], [72, 48]]),  # columns x rows
        ("(1x1),...,(2x2)", [[24, 24], [24, 48], [48, 24], [48, 48]]),
        ([[24, 48], [48, 24]], [[24, 48], [48, 24]]),  # in its order, as in llava-hf's conversions
        ("[[24, 48], [48, 24]]", [[24, 48], [48, 24]]),
        ([[24, 48], [24, 72]], [[48, 24], [72, 24]]),  # [width, height] is turned
        (((24, 48),), [[48, 24]]),
    ],
)
def test_pinpoints_of_the_original_code(pinpoints, expected):
    assert parse_pinpoints(pinpoints, 24, WHERE) == expected


@pytest.mark.parametrize(
    "pinpoints",
    [None, 3, "", "x", "(0x1),...,(2x2)", "(1x1),...,(999999x2)", "[[24, 48]", "[" * 9999, [], [24, 48], [[24]]]
    + [[["24", "48", "72"]], "__import__('os')", {"24": 48}],
    ids=lambda pinpoints: str(pinpoints)[:12],
)
def test_pinpoints_that_are_none_are_named(pinpoints):
    with pytest.raises(InputError, match=r"image_grid_pinpoints .* in config\.json of x is not a") as raised:
        parse_pinpoints(pinpoints, 24, WHERE)
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[24, 48]]}
ONEVISION = {**ANYRES, "image_aspect_ratio": "anyres_max_9"}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres'"),
        ({"image_aspect_ratio": ["anyres"]}, "image_aspect_ratio"),
        ({"image_aspect_ratio": "pad", "mm_patch_merge_type": "spatial_unpad"}, "'spatial_unpad' .* supports 'flat'"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type 'flat' .* supports 'spatial_unpad'"),
        ({**ANYRES, "mm_patch_merge_type": "spatial"}, "mm_patch_merge_type 'spatial'"),
        ({**ANYRES, "mm_patch_merge_type": "spatial_unpad_nobase"}, "'spatial_unpad_nobase'"),
        ({**ANYRES, "mm_resampler_type": "perceiver"}, "mm_resampler_type 'perceiver'"),
        ({**ANYRES, "mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode 'max'"),
        ({**ANYRES, "mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode 'average'"),
        ({**ONEVISION, "mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode 'conv'"),
        ({**ONEVISION, "mm_newline_position": "grid"}, "mm_newline_position 'grid'"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer'"),
    ],
    ids=str,
)
def test_what_the_original_code_can_and_deco_cannot_is_named(config, match):
    with pytest.raises(InputError, match=match):
        view_fields(config, 24, WHERE)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision")
    llava_families.write_hf(folder, build("llava_onevision", shapes=[(1, 1), (1, 2), (2, 1)]))
    return folder


@pytest.fixture
def copy(onevision, tmp_path):
    hostile_copy(onevision, tmp_path / "copy")
    return tmp_path / "copy"


REFUSED = [
    ({"image_grid_pinpoints": [[24, 25]]}, r"\[24, 25\], which is not a \[height, width\] of multiples"),
    ({"image_grid_pinpoints": [[-24, 24]]}, r"\[-24, 24\]"),
    ({"image_grid_pinpoints": [[24, 24], "24"]}, r"image_grid_pinpoints has 24"),
    ({"image_grid_pinpoints": [[[24, 24], [24, 24]]]}, r"image_grid_pinpoints"),
    ({"image_grid_pinpoints": [["24", "24"]]}, r"image_grid_pinpoints"),
    ({"image_grid_pinpoints": "(1x1),...,(2x2)"}, r"image_grid_pinpoints"),
    ({"image_grid_pinpoints": [[24 * 10**9, 24]]}, r"more than 256 tiles"),
    ({"image_grid_pinpoints": [[24, 24]] * 2000}, r"image_grid_pinpoints must be a list of 1 to"),
    ({"image_grid_pinpoints": []}, r"image_grid_pinpoints must be a list of 1 to"),
    ({"image_grid_pinpoints": [[24.0, 24]]}, r"image_grid_pinpoints has \[24\.0, 24\]"),
    ({"vision_aspect_ratio": "anyres_max_0"}, r"vision_aspect_ratio .* 'anyres_max_0'"),
    ({"vision_aspect_ratio": "anyres_max_-9"}, r"vision_aspect_ratio"),
    ({"vision_aspect_ratio": "anyres_max_" + "9" * 400}, r"vision_aspect_ratio"),
    ({"vision_aspect_ratio": 9}, r"vision_aspect_ratio"),
    ({"video_token_index": 5}, r"video_token_index is 5 .* '<video>' in its tokenizer is 301"),
    ({"video_token_index": "<video>"}, r"video_token_index .* must be an int"),
    ({"image_token_index": 301}, r"image_token_index is 301"),
    ({"model_type": "vipllava"}, r"vipllava.*reads several layers"),
    ({"model_type": "video_llava"}, r"video_llava.*second vision tower"),
    ({"model_type": "qwen2_vl"}, r"qwen2_vl.*merges patches by learned weights"),
    ({"model_type": "internvl"}, r"internvl.*shuffled"),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED, ids=[str(changes)[:60] for changes, _ in REFUSED])
def test_a_config_that_lies_is_refused_in_one_line_by_both(changes, match, copy, tmp_path):
    hostile.edit_json(copy / "config.json", **changes)
    for load in (DecoForConditionalGeneration.from_pretrained, lambda source: convert(source, tmp_path / "deco")):
        with pytest.raises(ValueError, match=match) as raised:
            load(copy)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "deco").exists()


@pytest.mark.parametrize(
    ("newline", "match"),
    [
        (None, r"1 parameters are missing, such as 'model\.image_newline'"),
        (torch.zeros(31), r"image_newline.* has the shape \(31,\), and .* wants \(32,\)"),
        (torch.zeros(32, 1), r"image_newline.* has the shape \(32, 1\)"),
        (torch.zeros(()), r"image_newline.* has the shape \(\)"),
        (torch.zeros(32, dtype=torch.int64), r"image_newline.* is torch\.int64"),
    ],
    ids=["none", "short", "matrix", "scalar", "int"],
)
def test_a_newline_of_another_shape_is_named(newline, match, copy, tmp_path):
    path = copy / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if "image_newline" not in name}
    save_file(tensors if newline is None else {**tensors, "image_newline": newline}, path, {"format": "pt"})
    with pytest.raises(InputError, match=match):
        convert(copy, tmp_path / "deco")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"spatial_pool_mode": "max"}, "spatial_pool_mode 'max' .* and has no 'max' and no 'conv'"),
        ({"spatial_pool_mode": "conv"}, "spatial_pool_mode 'conv'"),
        ({"spatial_pool_stride": 4}, "spatial_pool_stride must .* divide it"),
        ({"spatial_pool_stride": 0}, "spatial_pool_stride"),
    ],
    ids=str,
)
def test_frames_that_are_pooled_otherwise_are_refused(changes, match, tmp_path):
    llava_families.write_hf(tmp_path / "source", build("llava_next_video", shapes=[(1, 2)]))
    hostile.edit_json(tmp_path / "source" / "config.json", **changes)
    for load in (DecoConfig.from_pretrained, lambda source: convert(source, tmp_path / "deco")):
        with pytest.raises(ValueError, match=match):
            load(tmp_path / "source")


# --- the token of videos, and the default grid -----------------------------------------------------------------------


def test_a_llava_for_pictures_gets_a_token_for_videos_where_a_row_is_free(tmp_path):
    rows = PAD_TOKEN_ID + 1  # none is free
    text_config = {**llava_sources.TEXT_CONFIG, "vocab_size": rows, "pad_token_id": PAD_TOKEN_ID}
    llava_sources.write_hf_saved(tmp_path / "source", llava_sources.build_hf_model(text_config=text_config))
    direct = DecoForConditionalGeneration.from_pretrained(tmp_path / "source")
    assert direct.config.video_token_id is None
    assert DecoProcessor.from_pretrained(tmp_path / "source").video_token is None
    convert(tmp_path / "source", tmp_path / "deco")
    deco = DecoForConditionalGeneration.from_pretrained(tmp_path / "deco")
    assert (deco.config.video_token_id, len(deco.lm_head.weight)) == (rows, 320)
    assert torch.equal(deco.lm_head.weight[:rows], direct.lm_head.weight)
    assert AutoProcessor.from_pretrained(tmp_path / "deco").video_token_id == rows
    llava_sources.write_hf_saved(tmp_path / "roomy")
    assert DecoConfig.from_pretrained(tmp_path / "roomy").video_token_id == rows
    assert DecoProcessor.from_pretrained(tmp_path / "roomy").video_token_id == rows


@pytest.mark.parametrize(("side", "grid"), [(6, 6), (12, 12), (16, 12), (24, 12), (27, 14), (37, 19)])
def test_the_default_grid(side, grid):
    vision_config = {**tiny.VISION_CONFIGS["siglip"], "image_size": side * tiny.PATCH_SIZE}
    fields = {"vision_config": vision_config, "text_config": tiny.TEXT_CONFIGS["llama"], "image_token_id": 5}
    assert build_config(None, **fields).pooled_grid_size == grid
