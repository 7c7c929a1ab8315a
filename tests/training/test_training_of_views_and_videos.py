# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures that are cut into views, and videos, are trained on as they are seen at inference."""

import pytest
import tiny
import torch

pytest.importorskip("trl")

import tiny_training
from tiny_training import conversation, view_conversation

from modeling_deco.training.collator import IGNORE_INDEX, DecoCollator, expand_images

FAMILIES = ["llava_next_video", "llava_onevision"]
SIZES = [(30, 40), (60, 25), (20, 90)]


@pytest.fixture(scope="module")
def families():
    """The model and the processor of each family."""
    found = {}
    for name in FAMILIES:
        model = tiny.build_family(name, pooled_video_grid_size=2)
        processor = tiny.build_family_processor(model.config)
        processor.chat_template = tiny_training.CHAT_TEMPLATE
        found[name] = model, processor
    return found


SAMPLES = {
    "one picture": [view_conversation(0, SIZES[:1])],
    "several": [view_conversation(1, SIZES)],
    "a video": [view_conversation(2, videos=[3])],
    "text": [view_conversation(3)],
    "all": [
        view_conversation(4, SIZES[1:2]),
        view_conversation(5, videos=[2, 5]),
        view_conversation(6),
        view_conversation(7, SIZES, [1], num_turns=2),
    ],
}
BUDGETS = [{}, {"pooled_grid_size": 2, "pooled_video_grid_size": 3}, {"max_image_tokens": 30}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("add_timestamps", [False, True], ids=["plain", "timestamps"])
def test_a_batch_is_what_the_processor_makes_of_it(family, add_timestamps, families):
    model, processor = families[family]
    collator = DecoCollator(processor, add_timestamps=add_timestamps)
    for name, samples in SAMPLES.items():
        for budget in BUDGETS:
            given = {"pooled_grid_size": None, **budget}
            batch = expand_images(collator(samples), processor=processor, **given)
            assert torch.isfinite(model(**batch).loss), (name, budget)
            texts = processor.apply_chat_template([sample["messages"] for sample in samples])
            expected = processor(
                images=[image for sample in samples for image in sample["images"]] or None,
                text=[text.strip() for text in texts],
                videos=[video for sample in samples for video in sample["videos"]] or None,
                add_timestamps=add_timestamps,
                padding=True,
                padding_side="right",
                add_special_tokens=False,
                return_tensors="pt",
                **budget,
            )
            if name == "text":
                assert torch.equal(batch["input_ids"][:, : expected["input_ids"].shape[1]], expected["input_ids"])
                continue
            learned = batch.pop("labels") != IGNORE_INDEX
            assert learned.any()
            if "pixel_values" not in expected:  # a blank image, for the newline
                batch = {key: value for key, value in batch.items() if key in expected}
                length = expected["input_ids"].shape[1]
                batch |= {key: batch[key][:, :length] for key in ("input_ids", "attention_mask")}
            assert batch.keys() == expected.keys() - {"mm_token_type_ids"}, name
            for key, value in batch.items():
                assert torch.equal(value, torch.as_tensor(expected[key])), (name, budget, key)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("add_timestamps", [False, True], ids=["plain", "timestamps"])
def test_lengths_are_counted_from_the_sizes_alone(family, add_timestamps, families):
    model, processor = families[family]
    largest = {"largest_grid": 4, "max_image_tokens": 50, "largest_video_grid": 3}
    collator = DecoCollator(processor, add_timestamps=add_timestamps, **largest)
    for sample in [view_conversation(1, SIZES, [2, 5]), view_conversation(2, SIZES[:1], [3])]:
        found = collator.count_tokens(collator.tokenize(collator.read(sample)))
        batch = collator([sample])
        at_grid = expand_images(batch, 4, processor, pooled_video_grid_size=3)
        at_budget = expand_images(batch, None, processor, max_image_tokens=50, pooled_video_grid_size=3)
        lengths = [inputs["input_ids"].shape[1] for inputs in (at_grid, at_budget)]
        assert max(lengths) <= found <= sum(lengths)
        if len(sample["images"]) == 1:
            assert found == max(lengths)
        places = model.model.position_behind(at_grid)
        assert collator.count_positions(collator.tokenize(collator.read(sample))) == places.item()


def test_independent_turns_see_the_video_and_the_picture(families):
    model, processor = families["llava_onevision"]
    sample = view_conversation(0, SIZES[:1], [3], num_turns=2)
    packed = expand_images(DecoCollator(processor, independent_turns=True)([sample]), None, processor)
    with torch.no_grad():
        found = model(**packed).logits[packed["labels"] != IGNORE_INDEX]
        expected = []
        shown = sample["messages"][0]["content"][:2]
        for question, answer in zip(sample["messages"][::2], sample["messages"][1::2], strict=True):
            asked = {**question, "content": [*shown, question["content"][-1]]}
            alone = expand_images(DecoCollator(processor)([{**sample, "messages": [asked, answer]}]), None, processor)
            expected.append(model(**alone).logits[alone["labels"] != IGNORE_INDEX])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_tiles_take_the_tokens_of_one_view():
    model, processor = tiny.build_model(), tiny_training.build_processor(patch_size=4)
    batch = expand_images(DecoCollator(processor, tiles=4)([conversation(0), conversation(1, 2)]), None, processor)
    assert batch["pixel_values"].shape == (3, 4, 3, 24, 24)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [9, 18]
    assert torch.isfinite(model(**batch).loss)
