# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What is learned, position by position, and how images take their tokens."""

import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import Siglip2ImageProcessorPil

pytest.importorskip("trl")

import tiny_training
from tiny_training import conversation

from modeling_deco.training.collator import IGNORE_INDEX, DecoCollator, expand_images


@pytest.fixture(scope="module")
def processor():
    return tiny_training.build_processor()


@pytest.fixture(scope="module")
def model():
    return tiny.build_model()


def collate(processor, *examples, grid=None, **kwargs):
    return expand_images(DecoCollator(processor, **kwargs)(list(examples)), grid, processor)


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        # <s> user : [9 image tokens] what is this ? assistant : | a red cat . </s>
        (1, {18: "a", 19: "red", 20: "cat", 21: ".", 22: "</s>"}),
        (2, {27: "a", 28: "red", 29: "cat", 30: ".", 31: "</s>"}),
        (0, {9: "a", 10: "red", 11: "cat", 12: ".", 13: "</s>"}),
    ],
)
def test_the_answer_and_its_end_are_learned_and_nothing_else(num_images, expected, processor):
    longer = conversation(3, num_images=3)  # so that there is padding
    batch = collate(processor, conversation(0, num_images=num_images), longer)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    counted = {
        position: processor.tokenizer.convert_ids_to_tokens(labels[position].item())
        for position in (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    }
    print(f"\n{num_images} image(s): positions that count")  # noqa: T201
    for position, token in enumerate(processor.tokenizer.convert_ids_to_tokens(ids.tolist())):
        print(f"{position:4} {token:12} {'counts' if position in counted else ''}")  # noqa: T201
    assert counted == expected
    assert all(labels[position] == ids[position] for position in expected)
    assert (labels[ids == processor.image_token_id] == IGNORE_INDEX).all()
    assert (labels[batch["attention_mask"][0] == 0] == IGNORE_INDEX).all()


@pytest.mark.newest
def test_every_answer_of_a_conversation_is_learned(processor):
    batch = collate(processor, conversation(0, num_turns=2))
    learned = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
    assert processor.decode(learned) == "a red cat . </s> the blue dog . </s>"


def test_prompts_are_tokenized_as_at_inference(processor):
    example = conversation(0, num_images=2)
    batch = collate(processor, example)
    messages = [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": image} for image in example["images"]),
                *example["messages"][0]["content"][2:],
            ],
        }
    ]
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = prompt["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], prompt["input_ids"])
    assert batch["labels"][0, length] != IGNORE_INDEX
    assert torch.equal(batch["pixel_values"], prompt["pixel_values"])


@pytest.mark.parametrize("with_bos", [True, False])
def test_a_beginning_of_sequence_is_set_once(with_bos):
    template = (
        tiny_training.CHAT_TEMPLATE if with_bos else tiny_training.CHAT_TEMPLATE.replace("{{- bos_token -}}", "")
    )
    processor = tiny.build_processor(chat_template=template)
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = collate(processor, conversation(0))["input_ids"][0].tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1


@pytest.mark.parametrize("grid", [1, 2, [2, 3]])
def test_images_take_the_tokens_of_the_grid(grid, processor, model):
    batch = collate(
        processor, conversation(0), conversation(1, num_images=2), conversation(2, num_images=0), grid=grid
    )
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    per_sample = (batch["input_ids"] == processor.image_token_id).sum(-1)
    assert per_sample.tolist() == [rows * cols, 2 * rows * cols, 0]
    assert batch["pooled_grid_sizes"].tolist() == [[rows, cols]] * 3
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert torch.isfinite(model(**batch).loss)


def test_the_models_own_grid_adds_no_input(processor):
    assert "pooled_grid_sizes" not in collate(processor, conversation(0))


def test_pictures_in_their_own_shape_take_at_most_their_own_patches():
    processor = tiny_training.build_processor()
    processor.image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=40)
    flat = {**conversation(0), "images": [tiny.picture(0, 10, 150)]}  # 2 x 20 patches, and so 2 x 3 tokens
    batch = collate(processor, flat, conversation(1, num_images=2), conversation(2, num_images=0))
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert placeholders == [6, 2 * 9, 0]
    batch.pop("labels")
    logits = tiny.build_model("siglip2")(**batch).logits  # which takes as many
    assert logits.isfinite().all()


def test_a_batch_of_text_has_the_loss_of_text_and_moves_no_projector(processor, model):
    examples = [conversation(index, num_images=0) for index in range(3)]
    batch = collate(processor, *examples)
    assert len(batch["pixel_values"]) == 1
    text_only = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, 0)
    without = model(input_ids=text_only, attention_mask=batch["attention_mask"], labels=batch["labels"])
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    assert torch.equal(output.loss, without.loss)
    gradients = [parameter.grad for parameter in model.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.any()
    model.zero_grad()


def test_the_blank_image_of_a_batch_of_text_is_in_its_shortest_sample(processor):
    long, short = (conversation(0, num_images=0, num_turns=turns) for turns in (3, 1))
    batch = collate(processor, long, short)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 9]
    length = len(DecoCollator(processor).tokenize(long)["input_ids"])
    assert batch["input_ids"].shape == (2, length)


def test_a_batch_is_as_long_as_its_longest_sample_with_its_images(processor):
    examples = conversation(0, num_images=2), conversation(0, num_images=0, num_turns=3)
    collator = DecoCollator(processor)
    batch = collate(processor, *examples)
    assert batch["input_ids"].shape[1] == max(collator.count_tokens(collator.tokenize(row)) for row in examples)


@pytest.mark.newest
def test_mixed_batches_have_the_losses_of_their_samples(processor, model):
    examples = [conversation(0), conversation(1, num_images=0), conversation(2, num_images=2)]
    with torch.no_grad():
        together = model(**collate(processor, *examples))
        batch = collate(processor, *examples)
        counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(-1)
        alone = torch.stack([model(**collate(processor, example)).loss for example in examples])
    torch.testing.assert_close(together.loss, (alone * counts).sum() / counts.sum())


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("grid", [None, 2, 6])
@pytest.mark.parametrize("image_positions", ["patch", "sequence"])
def test_independent_turns_have_the_logits_of_separate_samples(
    image_positions, num_images, grid, processor, model, monkeypatch
):
    monkeypatch.setattr(model.config, "image_positions", image_positions)
    example, other = conversation(0, num_images=num_images, num_turns=3), conversation(1, num_turns=1)
    packed = collate(processor, example, other, grid=grid, independent_turns=True)
    with torch.no_grad():
        packed_logits = model(**packed).logits[0]
    learned = packed["labels"][0] != IGNORE_INDEX
    separate_logits = []
    shown = [part for part in example["messages"][0]["content"] if part["type"] == "image"]
    for question, answer in zip(example["messages"][::2], example["messages"][1::2], strict=True):
        text = [part for part in question["content"] if part["type"] == "text"]
        messages = [{"role": "user", "content": [*shown, *text]}, answer]
        batch = collate(processor, {**example, "messages": messages}, grid=grid)
        with torch.no_grad():
            logits = model(**batch).logits[0]
        separate_logits.append(logits[batch["labels"][0] != IGNORE_INDEX])
    torch.testing.assert_close(packed_logits[learned], torch.cat(separate_logits), atol=1e-5, rtol=1e-5)


def test_turns_that_are_not_independent_are_refused(processor):
    collator = DecoCollator(processor, independent_turns=True)
    example = conversation(0, num_turns=2)
    example["messages"][2]["content"].insert(0, {"type": "image", "text": None})
    example["images"] *= 2
    with pytest.raises(
        ValueError, match=r"'sample-0': its turns are not independent.*all images in the first question"
    ):
        collator([example])
    example = conversation(0)
    with pytest.raises(ValueError, match="'sample-0': its turns are not independent"):
        collator([{**example, "messages": example["messages"][:1]}])


def test_turns_whose_questions_are_not_shown_are_refused():
    template = tiny_training.CHAT_TEMPLATE.replace("{{- message['role'] + ' : ' -}}\n", "").replace(
        "else part['text'] + ' '", "else ''"
    )
    collator = DecoCollator(tiny.build_processor(chat_template=template), independent_turns=True)
    collator([conversation(0)])
    with pytest.raises(ValueError, match="'sample-0': the chat template puts no question before an answer"):
        collator([conversation(0, num_turns=2)])


def test_a_sample_that_is_too_long_is_never_cut(processor):
    collator = DecoCollator(processor, max_length=22)
    with pytest.raises(ValueError, match=r"Sample 'sample-0' has 23 tokens, with 1 image\(s\).*max_length=22"):
        collator([conversation(0)])
    assert collator([conversation(0, num_images=0)])["input_ids"].shape[1] <= 22
    DecoCollator(processor, max_length=23)([conversation(0)])
    with pytest.raises(ValueError, match="has 50 tokens"):
        DecoCollator(processor, max_length=23, largest_grid=6)([conversation(0)])


def test_a_template_that_marks_no_answers_is_refused():
    with pytest.raises(ValueError, match=r"no \{% generation %\} marks.*--chat_template plain, vicuna, chatml, "):
        DecoCollator(tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE))


def test_text_and_images_that_do_not_match_are_refused(processor):
    example = conversation(0, num_images=2)
    with pytest.raises(ValueError, match=r"'sample-0': 1 images in the row for 2 places"):
        DecoCollator(processor)([{**example, "images": example["images"][:1]}])
    example["messages"][0]["content"][-1]["text"] = "what is <image> ?"
    with pytest.raises(ValueError, match="'sample-0': 2 images in the row for 3 places"):
        DecoCollator(processor)([example])


def test_pictures_of_data_sets_have_the_pixels_that_they_have_at_inference(processor):
    """Pictures of a data set come undecoded or as Pillow opens them: on their side, with alpha, with 16 bits."""
    picture = tiny.picture(0)
    clear = picture.copy()
    clear.putalpha(0)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    grey = np.asarray(picture.convert("L"))
    given = {
        "transparent": (clear, Image.new("RGB", picture.size, "white")),
        "turned": (Image.open(turned), picture),
        "undecoded": ({"bytes": turned.getvalue(), "path": None}, picture),
        "16 bit": (Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey).convert("RGB")),
    }
    for name, (image, seen) in given.items():
        batch = collate(processor, {**conversation(0), "images": [image]})
        expected = processor.image_processor(seen, return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["pixel_values"], expected), name
