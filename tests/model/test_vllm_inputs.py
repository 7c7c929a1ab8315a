# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What vLLM gets of processor and model, which encodes images one by one or together, whatever the prompt.

tests/integrations/test_vllm.py runs vLLM itself.
"""

import pytest
import tiny
import torch

SIZES = [(50, 45), (30, 100), (5, 5), (100, 20)]  # height, width


def build(family):
    if family == "one view":
        return tiny.build_model(), tiny.build_processor(patch_size=4)
    model = tiny.build_family(family)
    return model, tiny.build_family_processor(model.config)


def for_vllm(processor, pictures, **budget):
    text = "<image>" * len(pictures)
    return processor(pictures, text, return_tensors="pt", return_text_replacement_offsets=True, **budget)


def batched(values):
    """As vLLM batches a field: a tensor if the images have one shape, else a list."""
    is_one_shape = len({value.shape for value in values}) == 1
    return torch.stack(list(values)) if is_one_shape else list(values)


def encode(model, inputs):
    names = inputs.keys() & {"pixel_values", "views", "image_sizes", "batch_num_images", "image_grid_thw"}
    with torch.no_grad():
        return model.model.get_image_features(
            return_dict=True, **{name: batched(inputs[name]) for name in names}
        ).pooler_output


@pytest.mark.parametrize(
    ("family", "budget"),
    [
        ("llava_next", {}),
        ("llava_next", {"pooled_grid_size": [2, 5]}),
        ("llava_onevision", {"max_image_tokens": 40}),
        ("llava_onevision", {"pooled_grid_size": 6}),
        ("tiles", {}),
        ("one view", {"pooled_grid_size": 2, "tiles": 4}),
        ("one view", {"tiles": 9, "pooled_grid_size": 8}),
    ],
    ids=str,
)
def test_an_image_is_the_same_alone_and_among_others(family, budget):
    model, processor = build(family)
    pictures = [tiny.picture(seed, *size) for seed, size in enumerate(SIZES)]
    together = for_vllm(processor, pictures, **budget)
    features = encode(model, together)
    for index, picture in enumerate(pictures):
        alone = for_vllm(processor, [picture], **budget)
        counts = processor._get_num_multimodal_tokens(image_sizes=[SIZES[index]], **budget)
        assert torch.equal(together["image_grid_thw"][index], alone["image_grid_thw"][0])
        assert (
            counts.num_image_tokens
            == [len(features[index])]
            == [int((alone["input_ids"] == tiny.IMAGE_TOKEN_ID).sum())]
        )
        assert torch.equal(together["views"][index], alone["views"][0])
        torch.testing.assert_close(encode(model, alone)[0], features[index], rtol=0, atol=1e-5)
        # and as in transformers
        inputs = processor([picture], "<image>", return_tensors="pt", **budget)
        names = inputs.keys() & {"pixel_values", "image_sizes", "pooled_grid_sizes"}
        with torch.no_grad():
            expected = model.model.get_image_features(**{name: inputs[name] for name in names}).pooler_output
        torch.testing.assert_close(features[index], expected[0], rtol=0, atol=1e-5)
        positions, _ = model.model.get_rope_index(inputs["input_ids"], image_grid_thw=alone["image_grid_thw"])
        expected_positions, _ = model.model.get_rope_index(
            inputs["input_ids"], **{name: inputs[name] for name in names}
        )
        assert torch.equal(positions, expected_positions)


def test_images_of_other_pixels_are_encoded_one_by_one():
    """Requests may have a `size` each."""
    model, processor = build("one view")
    sizes = [{"height": 24, "width": 24}, {"height": 16, "width": 40}, {"height": 24, "width": 24}]
    alone = [for_vllm(processor, [tiny.picture(seed)], size=size) for seed, size in enumerate(sizes)]
    names = ("pixel_values", "views", "image_grid_thw")
    features = encode(model, {name: [one[name][0] for one in alone] for name in names})
    for one, expected in zip(alone, features, strict=True):
        torch.testing.assert_close(encode(model, one)[0], expected, rtol=0, atol=1e-5)


def test_vllm_finds_no_videos():
    _, processor = build("llava_onevision")
    assert processor._get_num_multimodal_tokens(video_sizes=([1, 224, 224],))["num_video_tokens"] is None
