# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos that are cut into views: one map of tokens, LLaVA's at the full grid."""

import math
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    pipeline,
)

from modeling_deco import DecoConfig
from modeling_deco.positions import map_offsets
from modeling_deco.views import TokenMap, Views, num_map_tokens

LLAVA = {
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_next_video": LlavaNextVideoForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
SIZES = [(30, 40), (400, 50), (50, 400), (5, 5), (1, 300), (300, 2), (1000, 900), (24, 24), (48, 49), (110, 111)]
SIZES += [(77, 200), (200, 77)]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng([seed, width, height])
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def llava_of(family: str, deco):
    """transformers' own model with the weights of a DeCo."""
    llava_class, config = LLAVA[family], deco.config
    fields = {"image_token_index": IMAGE_TOKEN_ID, "image_grid_pinpoints": config.image_grid_pinpoints}
    if family != "llava_next":
        fields["video_token_index"] = VIDEO_TOKEN_ID
    if family == "llava_onevision":
        fields["vision_aspect_ratio"] = config.vision_aspect_ratio
    strategy = "full" if family == "llava_onevision" else "default"
    llava = llava_class(
        llava_class.config_class(
            vision_config=config.vision_config,
            text_config=config.text_config,
            vision_feature_layer=-1,
            vision_feature_select_strategy=strategy,
            **fields,
        )
    )
    missing = llava.load_state_dict(deco.state_dict(), strict=False).missing_keys
    assert not missing
    return llava.eval()


@pytest.fixture(scope="module", params=LLAVA)
def family(request):
    """A DeCo at the full grid, its processor, and transformers' model."""
    model = tiny.build_family(
        request.param, pooled_grid_size=6, image_positions="patch", pooled_video_grid_size=3, vision_feature_layer=-1
    )
    return model, tiny.build_family_processor(model.config), llava_of(request.param, model)


@pytest.fixture(scope="module")
def onevision():
    model = tiny.build_family("llava_onevision", image_positions="patch")
    return model, tiny.build_family_processor(model.config)


def for_llava(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "pooled_video_sizes"}


@torch.no_grad()
def test_logits_are_llavas_at_the_full_grid(family):
    model, processor, llava = family
    for width, height in SIZES:
        inputs = processor(images=picture(width, height), text="what <image> cat ?", return_tensors="pt")
        assert torch.equal(model(**inputs).logits, llava(**inputs).logits), (width, height)
    text = processor(text="what cat ?", return_tensors="pt")
    assert torch.equal(model(**text).logits, llava(**text).logits)


@torch.no_grad()
def test_a_batch_with_several_images_is_llavas(family):
    model, processor, llava = family
    images = [[picture(30, 40), picture(90, 20)], [picture(200, 200)]]
    inputs = processor(images=images, text=["a <image> b <image>", "<image> what"], padding=True, return_tensors="pt")
    assert torch.equal(model(**inputs).logits, llava(**inputs).logits)
    expected = llava.generate(**inputs, **OPTIONS, suppress_tokens=model.generation_config.suppress_tokens)
    ours = model.generate(**inputs, **OPTIONS)
    assert ours.shape == expected.shape


def test_onevision_does_not_tile_where_a_sample_has_several_images(onevision):
    _, processor = onevision
    for images in ([picture(30, 40), picture(90, 20)], [[picture(30, 40), picture(90, 20)]]):
        inputs = processor(images=images, text="<image> <image>", return_tensors="pt")
        assert inputs["batch_num_images"].tolist() == [2]
        assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == 2 * (3 * 3 + 1)  # and a newline


@torch.no_grad()
def test_videos_are_llavas_at_the_full_grid(family):
    model, processor, llava = family
    if model.config.video_token_id is None:
        pytest.skip("the family takes no videos")
    frames = [[picture(30, 20, seed) for seed in range(5)], [picture(20, 50, seed) for seed in range(5)]]
    inputs = processor(videos=frames, text=["a <video> ?", "what <video>"], padding=True, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (2, 5, 3, 24, 24)
    assert torch.equal(model(**inputs).logits, llava(**for_llava(inputs)).logits)


def test_the_processor_counts_as_llava_nexts(family):
    model, processor, _ = family
    if "batch_num_images" in processor.image_processor.model_input_names:
        pytest.skip("LlavaOnevisionProcessor needs torchvision")
    llavas = LlavaNextProcessor(
        processor.image_processor,
        tiny.build_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for width, height in SIZES:
        of_llava, ours = (
            each(images=picture(width, height), text="<image>", return_tensors="pt") for each in (llavas, processor)
        )
        assert torch.equal(ours["input_ids"], of_llava["input_ids"])
        assert torch.equal(ours["pixel_values"], of_llava["pixel_values"])
    sizes = [(height, width) for width, height in SIZES]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counts.num_image_tokens == llavas._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens


# --- the sizes of maps -----------------------------------------------------------------------------------------------


def test_the_map_is_pooled_by_the_factor_of_a_view():
    views = Views((24, 24), (6, 6), tiny.PINPOINTS, image_newline=True)
    overview, stitched = views.image_maps((30, 50), (4, 4))
    assert overview.pooled_grid == (4, 4)
    rows, cols = stitched.patch_grid
    assert stitched.pooled_grid == (math.ceil(rows * 4 / 6), math.ceil(cols * 4 / 6))
    assert stitched.num_tokens == stitched.pooled_grid[0] * (stitched.pooled_grid[1] + 1)


def test_the_cap_of_onevision_counts_at_smaller_grids_too():
    pinpoints = [[24 * rows, 24 * cols] for rows in range(1, 7) for cols in range(1, 7)]
    views = Views((24, 24), (6, 6), pinpoints, image_newline=True, vision_aspect_ratio="anyres_max_9")
    full, half = (views.image_maps((900, 900), (side, side))[1] for side in (6, 3))
    assert (full.patch_grid, full.full_grid, full.pooled_grid, full.is_interpolated) == (
        (36, 36),
        (18, 18),
        (18, 18),
        True,
    )
    assert (half.patch_grid, half.full_grid, half.pooled_grid, half.is_interpolated) == (
        (36, 36),
        (18, 18),
        (9, 9),
        False,
    )


@torch.no_grad()
def test_a_pooled_map_is_the_mean_over_the_stitched_picture(onevision):
    """Window means over the picture of patch features, whatever tile a patch is in."""
    model, processor = onevision
    inputs = processor(images=picture(100, 60), text="<image>", return_tensors="pt")
    ((overview, stitched),) = model.model.image_maps(image_sizes=inputs["image_sizes"])
    tower = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-1]
    tiles = tower[1:].reshape(*stitched.tile_grid, 6, 6, -1)
    whole = torch.cat([torch.cat(list(row), dim=1) for row in tiles], dim=0)
    (top, left), (rows, cols) = stitched.padding, stitched.patch_grid
    whole = whole[top : top + rows, left : left + cols]
    windows = [
        [(size * index // pooled, -(-size * (index + 1) // pooled)) for index in range(pooled)]
        for size, pooled in zip(stitched.patch_grid, stitched.pooled_grid, strict=True)
    ]
    means = torch.stack(
        [torch.stack([whole[r0:r1, c0:c1].mean((0, 1)) for c0, c1 in windows[1]]) for r0, r1 in windows[0]]
    )
    tokens = model.model.multi_modal_projector.project(means)
    newline = model.model.image_newline.expand(len(tokens), 1, -1)
    expected = torch.cat([tokens, newline], dim=1).flatten(0, 1)
    (found,) = model.get_image_features(
        **{name: inputs[name] for name in ("pixel_values", "image_sizes")}
    ).pooler_output
    torch.testing.assert_close(found[overview.num_tokens :], expected, rtol=1e-5, atol=1e-5)


def test_images_of_any_grid_in_a_batch_answer_as_alone(onevision):
    model, processor = onevision
    images = [picture(100, 60), picture(20, 70), picture(5, 5)]
    grids, texts = [[2, 2], [6, 6], [1, 3]], ["what <image> cat ?", "<image> ?", "a dog <image> what is this ?"]
    options = {"return_tensors": "pt", "padding": True}
    batch = processor(images=[[image] for image in images], text=texts, pooled_grid_size=grids, **options)
    together = model.generate(**batch, **OPTIONS)[:, batch["input_ids"].shape[1] :]
    for row, image, grid, text in zip(together, images, grids, texts, strict=True):
        alone = processor(images=image, text=text, pooled_grid_size=[grid], **options)
        answer = model.generate(**alone, **OPTIONS)[0, alone["input_ids"].shape[1] :]
        assert row.tolist()[: len(answer)] == answer.tolist()


@pytest.mark.parametrize("limit", [20, 50, 100, 1000])
def test_max_image_tokens_is_the_largest_grid_that_fits(onevision, limit):
    _, processor = onevision
    images = [picture(width, height) for width, height in SIZES]
    texts = ["<image>"] * len(images)
    options = {"images": [[image] for image in images], "text": texts, "padding": True, "return_tensors": "pt"}
    inputs = processor(**options, max_image_tokens=limit)
    counts = (inputs["input_ids"] == IMAGE_TOKEN_ID).sum(1)
    assert (counts <= limit).all()
    larger = (inputs["pooled_grid_sizes"] + 1).clamp(max=6)
    more = processor(**options, pooled_grid_size=larger.tolist())
    for count, grid, following in zip(
        counts, inputs["pooled_grid_sizes"], (more["input_ids"] == IMAGE_TOKEN_ID).sum(1), strict=True
    ):
        assert grid.tolist() == [6, 6] or following > limit >= count
    sizes = [(image.height, image.width) for image in images]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes, max_image_tokens=limit).num_image_tokens == (
        counts.tolist()
    )


def test_a_budget_below_the_smallest_grid_is_refused(onevision):
    _, processor = onevision
    with pytest.raises(ValueError, match=r"max_image_tokens=2 is less than the \d+ tokens .* choose at least"):
        processor(images=picture(200, 200), text="<image>", max_image_tokens=2)
    with pytest.raises(ValueError, match="either pooled_grid_size or max_image_tokens"):
        processor(images=picture(200, 200), text="<image>", max_image_tokens=20, pooled_grid_size=2)


def test_a_model_of_one_view_takes_max_image_tokens_too():
    processor = tiny.build_processor(patch_size=4)
    for limit, side in ((1, 1), (8, 2), (9, 3), (40, 6)):
        inputs = processor(images=tiny.picture(0), text="<image>", max_image_tokens=limit, return_tensors="pt")
        assert inputs["pooled_grid_sizes"].tolist() == [[side, side]]


# --- positions -------------------------------------------------------------------------------------------------------


def test_newlines_have_the_places_of_their_rows():
    token_map = TokenMap((4, 6), (4, 6), (2, 3), newline="rows")
    # rows 0 and 2 of 4, columns 0, 2 and 4 of 6, in rows of 7 tokens
    assert map_offsets(token_map).tolist() == [0, 2, 4, 6, 14, 16, 18, 20]
    assert token_map.span == 28
    assert map_offsets(TokenMap((4, 4), (4, 4), (1, 1), newline="end")).tolist() == [5, 16]


def test_positions_behind_an_image_are_those_of_the_full_grid(onevision):
    model, processor = onevision
    full, small = (
        processor(images=picture(100, 60), text="a <image> b", pooled_grid_size=grid, return_tensors="pt")
        for grid in (6, 2)
    )
    assert model.model.position_behind(full).item() == full["input_ids"].shape[1]
    assert model.model.position_behind(small).item() == full["input_ids"].shape[1]
    names = ("pixel_values", "image_sizes", "batch_num_images", "pooled_grid_sizes")
    position_ids, _ = model.model.get_rope_index(small["input_ids"], **{name: small[name] for name in names})
    assert (position_ids[0].diff() > 0).all()
    grids = torch.cat([small["image_sizes"], small["pooled_grid_sizes"]], dim=1)
    assert torch.equal(model.model.get_rope_index(small["input_ids"], image_grid_thw=grids)[0], position_ids)


# --- no overview, and tiles of a model for one view ------------------------------------------------------------------


def test_a_model_without_overview_sees_the_tiles_alone():
    model = tiny.build_family("tiles", pooled_grid_size=6)
    processor = tiny.build_family_processor(model.config)
    for width, height in SIZES:
        inputs = processor(images=picture(width, height), text="what <image>", return_tensors="pt")
        assert model(**inputs).logits.isfinite().all()
        views = processor.image_maps(inputs)[0]
        assert len(views) == 1
        assert views[0].num_views == inputs["pixel_values"].shape[1]
        assert 0 not in views[0].patch_grid


@pytest.fixture(scope="module")
def one_view():
    return tiny.build_model(image_positions="patch"), tiny.build_processor(patch_size=4)


@torch.no_grad()
@pytest.mark.parametrize(("tiles", "grid"), [(4, 3), (4, 6), (9, 3), (4, 12), ([1, 4], 3), ([9, 4], 2)])
def test_tiles_are_pooled_to_the_grid_of_a_view(one_view, tiles, grid):
    model, processor = one_view
    images = [tiny.picture(0), tiny.picture(1)]
    options = {"images": images, "text": "<image> what <image> ?", "return_tensors": "pt"}
    if grid > 6 and min([tiles] if isinstance(tiles, int) else tiles) < 4:
        pytest.skip("a view has no such grid")
    inputs = processor(**options, tiles=tiles, pooled_grid_size=grid)
    if grid <= 6:
        assert torch.equal(inputs["input_ids"], processor(**options, pooled_grid_size=grid)["input_ids"])
    features = model.get_image_features(
        **{name: inputs[name] for name in ("pixel_values", "image_sizes", "pooled_grid_sizes")}
    ).pooler_output
    for index, image in enumerate(images):
        side = math.isqrt(tiles if isinstance(tiles, int) else tiles[index])
        large = tiny.build_image_processor(24 * side)(image, return_tensors="pt")["pixel_values"][0]
        rows = [torch.cat([encoded(model, large, row, col) for col in range(side)], dim=1) for row in range(side)]
        patch_map = torch.cat(rows, dim=0).permute(2, 0, 1)  # (hidden, 6 * side, 6 * side)
        pooled = torch.nn.functional.adaptive_avg_pool2d(patch_map, grid).flatten(1).T
        torch.testing.assert_close(features[index], model.model.multi_modal_projector.project(pooled))
    assert model.model.position_behind(inputs).item() == 2 * max(6, grid) ** 2 + 2 if grid > 6 else True


def encoded(model, pixels, row: int, col: int) -> torch.Tensor:
    tile = pixels[:, 24 * row : 24 * row + 24, 24 * col : 24 * col + 24]
    hidden = model.model.vision_tower(tile[None], output_hidden_states=True).hidden_states[-1]
    return hidden[0, 1:].unflatten(0, (6, 6))


def test_one_tile_is_the_picture_as_it_is(one_view):
    _, processor = one_view
    options = {"images": tiny.picture(0), "text": "<image>", "return_tensors": "pt"}
    plain, tiled = processor(**options), processor(**options, tiles=1)
    assert plain.keys() == tiled.keys()
    assert torch.equal(plain["pixel_values"], tiled["pixel_values"])


def test_tiled_images_answer_in_a_batch_as_alone(one_view):
    model, processor = one_view
    images, tiles = [tiny.picture(0), tiny.picture(1)], [4, 1]
    options = {"return_tensors": "pt", "padding": True}
    batch = processor(images=images, text=["what <image> ?", "<image>"], tiles=tiles, **options)
    together = model.generate(**batch, **OPTIONS)[:, batch["input_ids"].shape[1] :]
    for row, image, number, text in zip(together, images, tiles, ("what <image> ?", "<image>"), strict=True):
        alone = processor(images=image, text=text, tiles=number, **options)
        answer = model.generate(**alone, **OPTIONS)[0, alone["input_ids"].shape[1] :]
        assert row.tolist()[: len(answer)] == answer.tolist()


@pytest.mark.parametrize("tiles", [2, 0, -4, 289, "4", True, 4.0, [4, 4, 4], [4, 3]])
def test_wrong_tiles_are_refused(one_view, tiles):
    _, processor = one_view
    with pytest.raises(ValueError, match="tiles"):
        processor(images=[tiny.picture(0)] * 2, text="<image> <image>", tiles=tiles)


def test_tiles_of_a_model_with_views_are_refused(onevision):
    _, processor = onevision
    with pytest.raises(ValueError, match="tiles=4: this processor cuts images into views by itself"):
        processor(images=picture(9, 9), text="<image>", tiles=4)


# --- videos ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_neighbouring_frames_are_averaged(onevision):
    model, processor = onevision
    frames = [picture(30, 20, seed) for seed in range(5)]
    options = {"pooled_video_grid_size": 2, "return_tensors": "pt"}
    inputs = processor(videos=frames, text="<video>", frames_per_token_grid=2, **options)
    assert inputs["pooled_video_sizes"].tolist() == [[5, 2, 2, 2]]
    (found,) = model.model.get_video_features(
        inputs["pixel_values_videos"], inputs["pooled_video_sizes"]
    ).pooler_output
    assert len(found) == 3 * 4 + 1 == (inputs["input_ids"] == VIDEO_TOKEN_ID).sum()
    tower = model.model.vision_tower(inputs["pixel_values_videos"][0], output_hidden_states=True).hidden_states[-1]
    means = [tower[:2].mean(0), tower[2:4].mean(0), tower[4]]
    pooled = [torch.nn.functional.adaptive_avg_pool2d(mean.T.unflatten(1, (6, 6)), 2).flatten(1).T for mean in means]
    expected = torch.cat(
        [model.model.multi_modal_projector.project(torch.cat(pooled)), model.model.image_newline[None]]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_long_videos_are_encoded_in_passes(onevision, monkeypatch):
    model, _ = onevision
    videos = torch.randn(2, 37, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[37, 3, 2, 3], [5, 1, 1, 1]])
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    in_passes = model.model.get_video_features(videos, sizes).pooler_output
    monkeypatch.setattr("modeling_deco.modeling_deco._FRAMES_PER_PASS", 1000)
    at_once = model.model.get_video_features(videos, sizes).pooler_output
    hook.remove()
    assert seen == [18, 18, 6, 42]
    for one, other in zip(in_passes, at_once, strict=True):
        torch.testing.assert_close(one, other)


def test_videos_and_images_answer_in_a_batch_as_alone(onevision):
    model, processor = onevision
    texts = ["what <video> cat ? <image>", "<video> ?"]
    videos = [[picture(30, 20, seed) for seed in range(4)], [picture(50, 20, seed) for seed in range(2)]]
    image, options = picture(70, 40), {"pooled_video_grid_size": 2, "return_tensors": "pt", "padding": True}
    batch = processor(images=[[image], []], videos=videos, text=texts, **options)
    together = model.generate(**batch, **OPTIONS)[:, batch["input_ids"].shape[1] :]
    for row, images, video, text in zip(together, ([image], None), videos, texts, strict=True):
        alone = processor(images=images, videos=[video], text=text, **options)
        answer = model.generate(**alone, **OPTIONS)[0, alone["input_ids"].shape[1] :]
        assert row.tolist()[: len(answer)] == answer.tolist()


def test_a_chat_template_takes_videos_and_timestamps(onevision):
    model, processor = onevision
    content = [{"type": "video", "video": [picture(30, 20, seed) for seed in range(3)]}, {"type": "text", "text": "?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"add_timestamps": True, "fps": 2.0, "pooled_video_grid_size": 1},
    )
    assert re.findall(r"<[\d.]+ seconds>", processor.video_text([3, 1, 1, 1], (24, 24), [0.0, 0.5, 1.0])) == [
        "<0.0 seconds>",
        "<0.5 seconds>",
        "<1.0 seconds>",
    ]
    assert (inputs["input_ids"] == VIDEO_TOKEN_ID).sum() == 4
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps"),
        ({"max_frames": 0}, "max_frames"),
        ({"frames_per_token_grid": 0}, "frames_per_token_grid must be a positive int"),
        ({"pooled_video_grid_size": 7}, "pooled_video_grid_size=7: 7 x 7 is larger than the 6 x 6 patches of a frame"),
        ({"text": "<video> <video>"}, "found 2 tokens and 1 videos"),
        ({"text": ["<video> <video>", "?"], "videos": [["a.mp4"], ["b.mp4"]]}, r"\[2, 0\] .* videos are \[1, 1\]"),
        ({"videos": [b"no video"]}, "Video 1 .* cannot be read"),
    ],
)
def test_wrong_videos_are_refused(onevision, options, message):
    _, processor = onevision
    frames = [picture(30, 20, seed) for seed in range(3)]
    with pytest.raises(ValueError, match=message):
        processor(**{"videos": [frames], "text": "<video>", "return_tensors": "pt", **options})


def test_a_pipeline_answers_about_a_video(onevision):
    model, processor = onevision
    content = [{"type": "video", "video": [tiny.picture(3), tiny.picture(4)]}, {"type": "text", "text": "what"}]
    messages = [{"role": "user", "content": content}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    (found,) = pipe(text=messages, return_full_text=False, generate_kwargs=OPTIONS)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model.generate(**inputs, **OPTIONS)[0, inputs["input_ids"].shape[1] :]
    assert found["generated_text"].strip() == processor.decode(expected, skip_special_tokens=True)


def test_a_model_without_a_video_token_says_so(one_view):
    model, processor = one_view
    with pytest.raises(ValueError, match="takes no videos"):
        processor(videos=[tiny.picture(0)], text="<image>")
    with pytest.raises(ValueError, match="takes no videos"):
        model(input_ids=torch.tensor([[1, 5]]), pixel_values_videos=torch.zeros(1, 2, 3, 24, 24))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_views_without_their_sizes_are_refused(onevision):
    model, processor = onevision
    inputs = processor(images=picture(70, 40), text="<image>", return_tensors="pt")
    del inputs["image_sizes"]
    with pytest.raises(ValueError, match="image_sizes is missing"):
        model(**inputs)


def test_tiles_are_refused_by_projectors_of_one_view():
    size = {"hidden_size": 16, "num_hidden_layers": 1}
    model = tiny.build_model(projector_type="c_abstractor", projector_config=size)
    inputs = tiny.build_processor(patch_size=tiny.PATCH_SIZE)(
        images=picture(40, 40), text="<image>", tiles=4, return_tensors="pt"
    )
    with pytest.raises(ValueError, match="The projector 'c_abstractor' makes the tokens of one view"):
        model(**inputs)


def test_views_of_another_size_are_refused(onevision):
    model, processor = onevision
    inputs = processor(images=picture(70, 40), text="<image>", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"][:, :2]
    with pytest.raises(ValueError, match="are not the views of 1 images"):
        model(**inputs)


def test_views_of_another_resolution_are_refused(onevision):
    model, processor = onevision
    inputs = processor(images=picture(70, 40), videos=[[picture(9, 9)]], text="<image> <video>", return_tensors="pt")
    for name in ("pixel_values", "pixel_values_videos"):
        wrong = {**inputs, name: torch.zeros(*inputs[name].shape[:3], 32, 24)}
        with pytest.raises(ValueError, match=f"{name} .* are not views of 24 x 24 pixels"):
            model(**wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_grid_pinpoints": []}, "list of 1 to"),
        ({"image_grid_pinpoints": [[24, 25]]}, r"\[24, 25\].*multiples"),
        ({"image_grid_pinpoints": [[24]]}, "multiples"),
        ({"image_grid_pinpoints": [[-24, 24]]}, "multiples"),
        ({"image_grid_pinpoints": [[True, 24]]}, "multiples"),
        ({"image_grid_pinpoints": [[24 * 300, 24]]}, "more than 256 tiles"),
        ({"image_grid_pinpoints": [[24, 24]], "projector_type": "qformer"}, "needs projector_type"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "anyres_max_N"),
        ({"vision_aspect_ratio": "pad"}, "anyres_max_N"),
        ({"video_token_id": IMAGE_TOKEN_ID}, "not image_token_id"),
        ({"video_token_id": 64}, "vocabulary"),
        ({"video_token_id": 21, "projector_type": "qformer"}, "projector_type='avg_pool'"),
        ({"pooled_video_grid_size": 7}, "pooled_video_grid_size=7"),
        ({"spatial_pool_stride": 4}, "divide it"),
        ({"spatial_pool_mode": "max"}, "spatial_pool_mode"),
        ({"frames_per_token_grid": 0}, "frames_per_token_grid"),
    ],
)
def test_impossible_views_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.build_config(**fields)


def test_a_config_of_views_survives_saving(tmp_path):
    config = tiny.build_family("llava_onevision").config
    config.save_pretrained(tmp_path)
    assert DecoConfig.from_pretrained(tmp_path).views == config.views
    assert num_map_tokens(config.views.image_maps((50, 50), (3, 3))) > 9


def test_a_processor_of_views_survives_saving(tmp_path, onevision):
    _, processor = onevision
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    options = {"images": picture(70, 40), "text": "<image>", "return_tensors": "pt"}
    assert torch.equal(loaded(**options)["input_ids"], processor(**options)["input_ids"])
