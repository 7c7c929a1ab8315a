# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers at several grids from one pass of the vision tower, and what their comparison shows."""

from functools import partial

import pytest
import tiny
from transformers import Siglip2ImageProcessorPil

from modeling_deco import DecoProcessor
from modeling_deco.inference.budgets import Comparison, compare, grids_to_compare, summarize
from modeling_deco.inference.costs import kv_cache_bytes
from modeling_deco.inference.grid_answers import Answer, GridAnswers
from modeling_deco.inference.images import ImageError
from modeling_deco.inference.pictures import find_pictures
from modeling_deco.inference.questions import Question

TEXTS = ["what is this ?", "a cat or the red dog two : ?", "is"]
QUESTIONS = [Question("what", "what is this ?"), Question("is", "is this a dog ?"), Question("is", "is this red ?")]
GRIDS = [(1, 1), (2, 3), (4, 4), (6, 6)]


def speaking(model):
    """Make a model answer in words, with answers of different lengths."""
    words = {*range(len(tiny.SPECIAL_TOKENS), tiny.IMAGE_TOKEN_ID), 2}
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCAB_SIZE) if token not in words]
    return model


@pytest.fixture(scope="module", params=["sequence", "patch"])
def model(request):
    return speaking(tiny.build_model(image_positions=request.param))


@pytest.fixture(scope="module")
def processor():
    return tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE, patch_size=tiny.PATCH_SIZE)


def plain(model, processor, image, text, grid, max_new_tokens=6) -> str:
    prompt = f"<s>user : <image>{text} assistant : "
    inputs = processor(images=image, text=prompt, pooled_grid_size=grid, return_tensors="pt", add_special_tokens=False)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def pictures(number):
    return [(f"{seed}.png", partial(tiny.picture, seed)) for seed in range(number)]


def test_answers_of_a_batch_are_those_of_plain_generate(model, processor):
    images = [tiny.picture(seed) for seed in range(3)]
    answers = GridAnswers(model, processor, TEXTS, max_new_tokens=6)
    encoded = [answers.encode(image, TEXTS[0]) for image in images]
    found = set()
    for grid in GRIDS:
        asked = [(picture, text) for picture in encoded for text in TEXTS]
        given = [answer.text for answer in answers.answer(asked, grid)]
        assert given == [plain(model, processor, image, text, list(grid)) for image in images for text in TEXTS]
        found.update(given)
    assert len(found) > 12  # they depend on picture, question and grid
    first = answers.first_token(encoded[0], TEXTS[0], (4, 4))[0, -1].argmax()
    assert processor.decode(first) == plain(model, processor, images[0], TEXTS[0], 4).split()[0]


def test_pictures_of_any_shape_are_compared_with_all_of_their_patches():
    siglip = speaking(tiny.build_model("siglip2", image_positions="patch"))
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36)
    processor = DecoProcessor(
        image_processor, tiny.build_tokenizer(), 3, chat_template=tiny.CHAT_TEMPLATE, patch_size=4
    )
    answers = GridAnswers(siglip, processor, TEXTS, max_new_tokens=4)
    images = [tiny.picture(0, 20, 80), tiny.picture(1, 60, 60)]
    encoded = [answers.encode(image, TEXTS[0]) for image in images]
    (rows, cols), _ = (picture.patch_grid for picture in encoded)
    assert rows < 5 < 6 < cols
    for grid, own in ((5, 5), (rows, 5)), ((6, 6), (rows, cols)):
        inputs = answers.inputs([(picture, TEXTS[0]) for picture in encoded], grid)
        assert inputs["pooled_grid_sizes"][0].tolist() == list(own)
        (given,) = answers.answer([(encoded[0], TEXTS[0])], grid)
        assert given.text == plain(siglip, processor, images[0], TEXTS[0], list(own), 4)


def test_each_picture_is_encoded_once_and_one_that_cannot_be_read_is_named(model, processor):
    def fail():
        raise ImageError("The image 'b.png' cannot be read: it is empty.")

    looks = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *call: looks.append(1))
    named = pictures(3)
    found = compare(
        model, processor, [named[0], ("b.png", fail), *named[1:]], QUESTIONS, GRIDS, max_new_tokens=4, batch_size=3
    )
    hook.remove()
    assert len(looks) == 3
    assert found.unreadable == {"b.png": "The image 'b.png' cannot be read: it is empty."}
    assert [[question.kind for question in asked] for asked in found.asked] == [["what", "is"]] * 3
    for grid in GRIDS:
        assert [[answer.text for answer in given] for given in found.answers[grid]] == [
            [plain(model, processor, read(), question.text, list(grid), 4) for question in asked]
            for (_, read), asked in zip(named, found.asked, strict=True)
        ]
        assert len(found.first_token_seconds[grid]) == 3
        assert min(found.first_token_seconds[grid]) > found.tower_seconds > 0
    with pytest.raises(ValueError, match=r"None of 2 pictures can be read; the first: The image 'b.png'"):
        compare(model, processor, [("b.png", fail), ("c.png", fail)], QUESTIONS, GRIDS)


def test_answers_that_reach_the_limit_are_counted(model, processor):
    answers = GridAnswers(model, processor, TEXTS, max_new_tokens=2)
    asked = [(answers.encode(tiny.picture(seed), TEXTS[0]), text) for seed in range(6) for text in TEXTS]
    given = answers.answer(asked, (6, 6))
    assert [answer.is_cut for answer in given] == [len(answer.text.split()) == 2 for answer in given]
    assert {answer.is_cut for answer in given} == {True, False}


def comparison(by_grid):
    """Two questions about each of 400 pictures; `by_grid` has the number of pictures with other answers to each."""
    asked = [[Question("read", "Read."), Question("count", "Count.")]] * 400
    answers = {
        grid: [
            [Answer("7" if index >= read else "8", False), Answer("2" if index >= count else "3", index == 0)]
            for index in range(400)
        ]
        for grid, (read, count) in by_grid.items()
    }
    seconds = {grid: [0.1 * (place + 1), 0.2 * (place + 1)] for place, grid in enumerate(by_grid)}
    num_tokens = {grid: [grid[0] * grid[1]] * 400 for grid in by_grid}
    return Comparison(list(by_grid), num_tokens, asked, answers, {}, 0.05, seconds)


def test_the_summary_is_what_one_counts_by_hand(model):
    found = comparison({(1, 1): (100, 60), (2, 2): (4, 0), (3, 3): (0, 0), (6, 6): (0, 0)})
    summary = summarize(found, model, target=0.99)
    one, two, three, full = summary["grids"]
    assert [row["num_image_tokens"] for row in summary["grids"]] == [1, 4, 9, 36]
    assert (one["agreement"]["share"], two["agreement"]["share"], three["agreement"]["share"]) == (0.8, 0.995, 1)
    assert one["agreement_by_kind"]["read"]["share"] == 0.75
    assert one["agreement_by_kind"]["count"]["share"] == 0.85
    assert one["accuracy_change"] == pytest.approx({"at_most": 0.2, "high": 1 - one["agreement"]["low"]})
    assert [row["meets_target"] for row in (one, two, three)] == [False, False, True]
    assert (summary["smallest_grid"], summary["num_pictures"], summary["num_answers"]) == ([3, 3], 400, 800)
    assert one["pictures_needed"] is None
    assert two["pictures_needed"] > 400 >= three["pictures_needed"] == summary["pictures_needed_if_all_agree"]
    assert "agreement" not in full
    assert full["first_token_ratio"]["median"] == 1
    assert three["first_token_ratio"]["median"] == 0.75
    assert full["cut_answers"] == 1
    assert full["kv_cache_bytes"] == kv_cache_bytes(model.config.text_config, 36, model.dtype)
    assert summarize(found, model, target=0.999)["smallest_grid"] is None


def test_grids_are_sorted_and_end_with_the_patch_grid():
    config = tiny.build_config()
    assert grids_to_compare(config, None) == [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6)]
    assert grids_to_compare(config, [[5, 5], [2, 3], [6, 6], [2, 3]]) == [(2, 3), (5, 5), (6, 6)]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[7, 7]], r"--grids=\[7, 7\]: 7 x 7 is larger than the 6 x 6 patches of the vision tower"),
        ([[0, 3]], "must be a positive int"),
        ([[6, 6]], "--grids needs a grid that is smaller than 6 x 6"),
    ],
)
def test_grids_that_cannot_be_compared_are_refused(grids, message):
    with pytest.raises(ValueError, match=message):
        grids_to_compare(tiny.build_config(), grids)


def test_a_projector_with_one_grid_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tiny.build_config(projector_type="qformer", projector_config=sizes)
    with pytest.raises(ValueError, match="The projector 'qformer' has one grid only, 3 x 3; there is nothing"):
        grids_to_compare(config, None)


def test_pictures_of_folders_files_and_urls_are_found_once(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.PNG", "a.jpg", "more/c.webp", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    folder = [str(tmp_path / name) for name in ("a.jpg", "b.PNG", "more/c.webp")]
    url = "https://example.org/picture"
    found = find_pictures([folder[1], str(tmp_path), url, "missing.png"])
    assert found == [folder[1], folder[0], folder[2], url, "missing.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"The folder '.*none' has no pictures"):
        find_pictures([str(tmp_path / "none")])
