# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The processor: as many placeholders as the model makes features, and a plain word where it cannot be so."""

import json
import re

import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoProcessor, Siglip2ImageProcessorPil

from modeling_deco import DecoProcessor

TWO = {"images": [tiny.picture(0), tiny.picture(1)], "text": "two <image> is <image> ?"}


def placeholders_of_each_image(processor, **kwargs):
    """Lengths of the runs of placeholders in the first text."""
    ids = processor(**kwargs)["input_ids"][0]
    runs = re.findall("i+", "".join("i" if token == tiny.IMAGE_TOKEN_ID else "t" for token in ids))
    return [len(run) for run in runs]


@pytest.fixture
def files(tmp_path):
    """A picture, half of one, and a text, by their paths."""
    tiny.picture(0, 300, 400).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    return tmp_path


# --- placeholders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (None, [9, 9]),
        (2, [4, 4]),
        ([2, 3], [6, 6]),
        ((2, 3), [6, 6]),
        ([[2, 3], [5, 5]], [6, 25]),
        ([(2, 3), torch.tensor([1, 1])], [6, 1]),
        (torch.tensor([[2, 3], [5, 5]]), [6, 25]),
        (torch.tensor([2, 3]), [6, 6]),
    ],
    ids=str,
)
def test_each_image_gets_as_many_placeholders_as_its_grid_has_cells(grid, expected, processor):
    assert placeholders_of_each_image(processor, **TWO, pooled_grid_size=grid) == expected


@pytest.mark.parametrize("given", [3, [2, 4], (2, 4)])
def test_the_grid_of_the_processor_is_the_default(given):
    expected = 9 if given == 3 else 8
    processor = tiny.build_processor(pooled_grid_size=given)
    assert placeholders_of_each_image(processor, **TWO) == [expected, expected]


@pytest.mark.newest
@pytest.mark.parametrize(
    ("grid", "expected"),
    [(2, [[2, 2], [2, 2]]), ([2, 3], [[2, 3], [2, 3]]), ([[2, 3], [5, 5]], [[2, 3], [5, 5]])],
    ids=str,
)
def test_a_given_grid_goes_to_the_model_image_by_image(grid, expected, processor):
    sizes = processor(**TWO, pooled_grid_size=grid, return_tensors="pt")["pooled_grid_sizes"]
    assert sizes.dtype == torch.int64
    assert sizes.tolist() == expected


def test_grids_go_to_the_model_only_where_they_are_given(processor):
    assert set(processor(**TWO, return_tensors="pt")) == {"input_ids", "attention_mask", "pixel_values"}


def test_a_grid_may_be_given_among_the_arguments_for_images(processor):
    assert placeholders_of_each_image(processor, **TWO, images_kwargs={"pooled_grid_size": 2}) == [4, 4]


@pytest.mark.parametrize("grid", [None, 2, [[1, 5], [6, 6]]], ids=str)
def test_the_model_makes_as_many_features_as_there_are_placeholders(grid, processor, model):
    inputs = processor(**TWO, pooled_grid_size=grid, return_tensors="pt")
    assert len(model(**inputs).image_hidden_states) == (inputs["input_ids"] == tiny.IMAGE_TOKEN_ID).sum()


def test_the_placeholders_of_an_image_are_asked_for_by_its_number(processor):
    inputs = processor(**TWO, pooled_grid_size=[[2, 3], [5, 1]], return_tensors="pt")
    assert [processor.replace_image_token(inputs, index).count("<image>") for index in (0, 1)] == [6, 5]


def test_placeholders_stand_where_the_image_tokens_stood(processor):
    ids = processor(**TWO, pooled_grid_size=[[1, 2], [3, 1]])["input_ids"]
    assert ids == [tiny.prompt("two", 2, "is", 3, "?")[1:]]


def test_images_may_be_given_text_by_text(processor):
    one, two, three = (tiny.picture(seed) for seed in range(3))
    texts = ["<image> what", "a", "<image> is <image>"]
    nested = processor(images=[[one], [], [two, three]], text=texts, padding=True, return_tensors="pt")
    flat = processor(images=[one, two, three], text=texts, padding=True, return_tensors="pt")
    assert (nested["input_ids"] == tiny.IMAGE_TOKEN_ID).sum(-1).tolist() == [9, 0, 18]
    assert all(torch.equal(nested[name], flat[name]) for name in flat)


def test_text_alone_needs_no_images(processor):
    assert set(processor(text="what is a cat ?")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("images", [[], [[], []]], ids=str)
def test_no_images_in_a_list_are_no_images(images, processor):
    inputs = processor(images=images, text=["what ?", "a cat"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_images_alone_need_no_text(processor):
    inputs = processor(images=TWO["images"], pooled_grid_size=2, return_tensors="pt")
    assert set(inputs) == {"pixel_values", "pooled_grid_sizes"}


@pytest.mark.newest
@pytest.mark.parametrize(
    ("grid", "expected"), [(None, [9, 9]), (2, [4, 4]), ([2, 3], [6, 6]), ([[1, 2], [3, 3]], [2, 9])], ids=str
)
def test_tokens_are_counted_without_a_text(grid, expected, processor):
    """vLLM asks so, and must get what the expansion gives."""
    kwargs = {} if grid is None else {"pooled_grid_size": grid}
    counts = processor._get_num_multimodal_tokens(image_sizes=[(300, 400), (50, 60)], **kwargs)
    assert counts.num_image_tokens == placeholders_of_each_image(processor, **TWO, **kwargs) == expected
    assert counts.num_image_patches == [1, 1]


@pytest.mark.newest
@pytest.mark.parametrize(
    ("grid", "expected"), [(None, [[24, 24, 3, 3]] * 2), ([[1, 2], [3, 3]], [[24, 24, 1, 2], [24, 24, 3, 3]])], ids=str
)
def test_one_who_asks_where_the_images_are_gets_them_one_by_one(grid, expected, processor):
    """vLLM asks so, and keeps each image in its cache."""
    call = {**TWO, "pooled_grid_size": grid, "return_tensors": "pt"}
    inputs, separate = processor(**call), processor(**call, return_text_replacement_offsets=True)
    assert separate["image_grid_thw"].tolist() == expected
    assert isinstance(separate["views"], list)
    assert torch.equal(torch.stack(separate["views"]), inputs["pixel_values"])
    assert set(separate) == {*inputs, "text_replacement_offsets", "image_grid_thw", "views"} - {"pooled_grid_sizes"}
    assert [image.shape for image in separate["pixel_values"]] == [(1,), (1,)]
    assert "image_grid_thw" not in processor(text="what ?", return_text_replacement_offsets=True)


def test_images_of_naflex_are_separated_with_their_shapes():
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), pooled_grid_size=3, patch_size=4)
    images = [tiny.picture(0, 20, 100), tiny.picture(1, 30, 30)]
    call = {"images": images, "text": "<image> is <image>", "return_tensors": "pt"}
    inputs, separate = processor(**call), processor(**call, return_text_replacement_offsets=True)
    assert torch.equal(torch.stack(separate["views"]), inputs["pixel_values"])
    for name in ("pixel_attention_mask", "spatial_shapes"):
        assert torch.equal(torch.stack(separate[name]), inputs[name])
    sizes, grids = separate["image_grid_thw"].split(2, dim=-1)
    assert torch.equal(sizes, inputs["spatial_shapes"] * 4)
    assert grids.tolist() == [list(grid) for grid in processor.image_grids(inputs)]


def test_no_tokens_are_counted_without_images(processor):
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [0, -1, "3", 2.5, True, [2], [2, 0], [], [[2, 3], [0, 3]]], ids=str)
def test_a_malformed_grid_is_refused(grid, processor):
    with pytest.raises(ValueError, match=r"a positive int .* or two positive ints \[rows, cols\], got "):
        processor(**TWO, pooled_grid_size=grid)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"pooled_grid_size": 7}, "7 x 7 is larger than the 6 x 6 patches of image 1;"),
        (
            {"pooled_grid_size": [[6, 6], [1, 7]]},
            "1 x 7 is larger than the 6 x 6 patches of image 2;",
        ),
        ({"size": {"height": 11, "width": 24}}, "3 x 3 is larger than the 2 x 6 patches of image 1;"),
    ],
    ids=str,
)
def test_a_processor_that_knows_the_patch_size_refuses_a_grid_larger_than_the_patch_grid(call, message):
    with pytest.raises(ValueError, match=message):
        tiny.build_processor(patch_size=tiny.PATCH_SIZE)(**TWO, **call)


@pytest.mark.parametrize("return_tensors", ["pt", None])
def test_a_processor_that_knows_the_patch_size_takes_the_patch_grid(return_tensors):
    processor = tiny.build_processor(patch_size=tiny.PATCH_SIZE)
    ids = processor(**TWO, pooled_grid_size=6, return_tensors=return_tensors)["input_ids"]
    assert list(ids[0]).count(tiny.IMAGE_TOKEN_ID) == 2 * 36


def test_the_patch_grids_of_an_image_processor_that_names_them_count():
    """SigLIP 2's (NaFlex) gives flat patches, and says how many rows and columns of them there are."""
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), pooled_grid_size=3, patch_size=4)
    rows, cols = image_processor(tiny.picture(0), return_tensors="pt")["spatial_shapes"][0].tolist()
    processor(images=tiny.picture(0), pooled_grid_size=[rows, cols])
    with pytest.raises(ValueError, match=f"{rows + 1} x {cols} is larger than the {rows} x {cols} patches of image 1"):
        processor(images=tiny.picture(0), pooled_grid_size=[rows + 1, cols])


def test_by_default_a_flat_picture_in_its_own_shape_takes_as_many_placeholders_as_it_has_patches():
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=40)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), pooled_grid_size=3, patch_size=4)
    sizes = [(60, 40), (10, 150), (150, 10)]
    pictures = [tiny.picture(index, *size) for index, size in enumerate(sizes)]
    outputs = processor(images=[[picture] for picture in pictures], text=["<image> a"] * 3, padding=True)
    assert [tuple(shape) for shape in outputs["spatial_shapes"][1:]] == [(2, 20), (20, 2)]
    assert [list(ids).count(tiny.IMAGE_TOKEN_ID) for ids in outputs["input_ids"]] == [9, 6, 6]
    assert "pooled_grid_sizes" not in outputs
    assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == [9, 6, 6]


@pytest.mark.parametrize("num_grids", [1, 3])
def test_grids_that_are_not_as_many_as_images_are_refused(num_grids, processor):
    with pytest.raises(
        ValueError, match=f"pooled_grid_size has {num_grids} grids for 2 images; give one grid for all"
    ):
        processor(**TWO, pooled_grid_size=[[2, 2]] * num_grids)


def test_a_malformed_default_grid_is_refused():
    with pytest.raises(ValueError, match=r"two positive ints \[rows, cols\], got \[3\]"):
        tiny.build_processor(pooled_grid_size=[3])


def test_a_tokenizer_without_the_image_token_is_refused():
    tokenizer = tiny.build_tokenizer(with_image_token=False)
    with pytest.raises(
        ValueError, match=re.escape("has no token '<image>'; add it by tokenizer.add_tokens('<image>'")
    ):
        DecoProcessor(tiny.build_image_processor(), tokenizer)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("num_images", "text", "num_tokens"),
    [(2, "<image> what", 1), (1, "<image> <image>", 2), (0, "<image>", 1), (1, "what", 0)],
)
def test_images_and_image_tokens_that_disagree_are_refused(num_images, text, num_tokens, processor):
    images = [tiny.picture(seed) for seed in range(num_images)] or None
    with pytest.raises(ValueError, match=f"found {num_tokens} tokens and {num_images} images"):
        processor(images=images, text=text)


def test_images_of_one_text_are_not_taken_for_another(processor):
    images = [[tiny.picture(0), tiny.picture(1)], []]
    with pytest.raises(
        ValueError, match=re.escape("The texts have [1, 1] <image> tokens, and their images are [2, 0]")
    ):
        processor(images=images, text=["<image> what", "<image> is"])


@pytest.mark.newest
@pytest.mark.parametrize(("max_length", "left"), [(3, 2), (9, 8)])
def test_a_text_that_is_cut_inside_an_image_is_refused(max_length, left, processor):
    message = f"Text 1 was cut to {max_length} tokens, which leaves {left} of its 9 image placeholders"
    with pytest.raises(ValueError, match=message):
        processor(images=tiny.picture(0), text=["a", "a <image> ?"], truncation=True, max_length=max_length)


def test_a_text_that_is_cut_behind_its_images_is_taken(processor):
    inputs = processor(images=tiny.picture(0), text="a <image> what is this ?", truncation=True, max_length=11)
    assert inputs["input_ids"] == [tiny.prompt("a", 9, "what")[1:]]


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.png", "its content is not an image that Pillow can read"),
        ("half.png", "truncated"),
        ("missing.png", "there is no such file"),
        ("", "it is a folder"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_by_its_number_and_name(name, reason, files, processor):
    with pytest.raises(ValueError, match=rf"Image 2 \('.*{name}'\) cannot be read: .*{reason}"):
        processor(images=[str(files / "whole.png"), str(files / name)], text="<image> <image>")


def test_a_truncated_file_that_pil_has_opened_is_refused_by_its_name(files, processor):
    with pytest.raises(ValueError, match=r"Image 1 \('.*half.png'\) cannot be read: .*truncated"):
        processor(images=Image.open(files / "half.png"), text="<image>")


@pytest.mark.parametrize("image", [3, None, {"path": "picture.png"}, b"bytes"], ids=str)
def test_what_is_no_picture_is_refused_by_its_type(image, processor):
    with pytest.raises(ValueError, match=rf"Image 2 \('{type(image).__name__}'\) cannot be read"):
        processor(images=[tiny.picture(0), image], text="<image> <image>")


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_an_image_that_cannot_be_downloaded_is_refused_by_its_address(processor):
    with pytest.raises(ValueError, match=r"Image 1 \('https://example.com/a.png'\) cannot be read"):
        processor(images="https://example.com/a.png", text="<image>")


def test_the_images_of_a_batch_are_numbered_through(files, processor):
    images = [[tiny.picture(0)], [tiny.picture(1), str(files / "text.png")]]
    with pytest.raises(ValueError, match=r"Image 3 \('.*text.png'\)"):
        processor(images=images, text=["<image>", "<image> <image>"])


def test_long_strings_are_shortened_in_the_message(processor):
    with pytest.raises(ValueError, match=r"^Image 1 \('data:image/png;base64,x+\.\.\.\) cannot be read: ") as error:
        processor(images="data:image/png;base64," + "x" * 5000, text="<image>")
    assert len(str(error.value)) < 400


def test_a_path_gives_the_pixels_of_the_picture(files, processor):
    from_path = processor(images=str(files / "whole.png"), return_tensors="pt")
    from_picture = processor(images=tiny.picture(0, 300, 400), return_tensors="pt")
    assert torch.equal(from_path["pixel_values"], from_picture["pixel_values"])


# --- padding, templates, files ---------------------------------------------------------------------------------------


def test_text_is_padded_on_the_left(processor):
    assert processor(text=["what is", "a"], padding=True)["attention_mask"] == [[1, 1], [0, 1]]


@pytest.mark.parametrize("kwargs", [{"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}], ids=str)
def test_text_is_padded_on_the_right_on_request_and_for_one_call(kwargs, processor):
    assert processor(text=["what is", "a"], padding=True, **kwargs)["attention_mask"] == [[1, 1], [1, 0]]
    assert processor(text=["what is", "a"], padding=True)["attention_mask"] == [[1, 1], [0, 1]]


def conversation(*images):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "what is this ?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.newest
def test_a_chat_template_puts_placeholders_for_the_images_of_the_conversation():
    processor = tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(conversation(tiny.picture(0), tiny.picture(1)), **options)
    assert inputs["input_ids"].tolist() == [tiny.prompt("user :", 18, "what is this ? assistant :")]
    expected = processor(images=TWO["images"], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


def test_a_chat_template_takes_a_grid():
    processor = tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options["processor_kwargs"] = {"pooled_grid_size": [2, 3]}
    inputs = processor.apply_chat_template([conversation(tiny.picture(0)), conversation(tiny.picture(1))], **options)
    assert inputs["pooled_grid_sizes"].tolist() == [[2, 3], [2, 3]]
    assert (inputs["input_ids"] == tiny.IMAGE_TOKEN_ID).sum(-1).tolist() == [6, 6]


def test_the_chat_template_of_the_tokenizer_is_the_default():
    tokenizer = tiny.build_tokenizer(chat_template=tiny.CHAT_TEMPLATE)
    assert DecoProcessor(tiny.build_image_processor(), tokenizer).chat_template == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize(("grid", "stored"), [(3, 3), ([2, 3], [2, 3]), ((2, 3), [2, 3]), ([3, 3], [3, 3])], ids=str)
def test_a_saved_processor_is_loaded_as_it_was(grid, stored, tmp_path):
    processor = tiny.build_processor(grid, chat_template=tiny.CHAT_TEMPLATE)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["pooled_grid_size"] == stored
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DecoProcessor
    assert (type(loaded.pooled_grid_size), loaded.pooled_grid_size) == (type(stored), stored)
    assert loaded.chat_template == tiny.CHAT_TEMPLATE
    expected, found = (one(**TWO, return_tensors="pt") for one in (processor, loaded))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_name_of_the_image_token_is_kept(tmp_path):
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens("<picture>", special_tokens=True)
    processor = DecoProcessor(tiny.build_image_processor(), tokenizer, pooled_grid_size=2, image_token="<picture>")
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.image_token == "<picture>"
    ids = loaded(images=tiny.picture(0), text="<picture> what")["input_ids"][0]
    assert ids.count(tiny.IMAGE_TOKEN_ID + 1) == 4


def test_the_image_token_that_the_tokenizer_names_comes_first():
    tokenizer = tiny.build_tokenizer(extra_special_tokens={"image_token": "<picture>"})
    assert DecoProcessor(tiny.build_image_processor(), tokenizer).image_token == "<picture>"
