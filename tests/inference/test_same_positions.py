# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Every way to ask a model gives the tokens of plain `generate` with the same image positions."""

import json

import pytest
import tiny
import torch
from transformers import pipeline
from typer.testing import CliRunner

from modeling_deco.cli import app
from modeling_deco.inference import PromptCache, encode, load, quantize_to_int8, stream
from modeling_deco.inference.generation import check_length, num_positions
from modeling_deco.relevance import explain

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def processor():
    return tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def model():
    model = tiny.build_model(image_positions="patch")
    words = range(len(tiny.SPECIAL_TOKENS), tiny.IMAGE_TOKEN_ID)
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCAB_SIZE) if token not in words]
    model.generation_config.update(max_new_tokens=6, min_new_tokens=6)
    return model


def messages(*pictures, text="what is this ?"):
    content = [{"type": "image", "image": tiny.picture(seed)} for seed in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def plain(model, processor, asked, grid, image_positions=None):
    inputs = encode(processor, asked, grid)
    generated = model.generate(**inputs, **OPTIONS, image_positions=image_positions)
    return generated[:, inputs["input_ids"].shape[1] :]


def text_of(processor, tokens):
    return processor.decode(tokens[0], skip_special_tokens=True)


GRIDS = {"the config's grid": None, "another grid": 2, "a grid per image": [[2, 4], [1, 2]]}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_prompt_cache(grid, model, processor):
    """Also in a second turn with the same image, and never from keys of the other numbering."""
    cache = PromptCache(model)
    first = messages(1, 2)
    for image_positions in ("patch", "sequence", "patch"):
        inputs = encode(processor, first, grid)
        answer = cache.generate(**inputs, **{**OPTIONS, "image_positions": image_positions})
        expected = plain(model, processor, first, grid, image_positions)
        assert torch.equal(answer[:, inputs["input_ids"].shape[1] :], expected)
        said = text_of(processor, expected)
        second = [*first, {"role": "assistant", "content": said}, *messages(text="is this red ?")]
        inputs = encode(processor, second, grid)
        answer = cache.generate(**inputs, **{**OPTIONS, "image_positions": image_positions})
        expected = plain(model, processor, second, grid, image_positions)
        assert torch.equal(answer[:, inputs["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("image_positions", ["patch", "sequence"])
@pytest.mark.parametrize("grid", [None, 2])
def test_relevance_explains_the_answer_of_generate(grid, image_positions, model, processor):
    asked = messages(1)
    expected = text_of(processor, plain(model, processor, asked, grid, image_positions))
    image = asked[0]["content"][0]["image"]
    arguments = {"pooled_grid_size": grid, "image_positions": image_positions}
    explained = explain(model, processor, image, "what is this ?", **arguments, **OPTIONS)
    assert explained.answer == expected
    given = explain(model, processor, image, "what is this ?", answer=expected, **arguments)
    torch.testing.assert_close(given.text_to_patch, explained.text_to_patch)


def test_streams_and_pipelines(model, processor):
    asked, grid = messages(1), 2
    expected = text_of(processor, plain(model, processor, asked, grid))
    assert "".join(stream(model, processor, asked, pooled_grid_size=grid, max_new_tokens=6)).strip() == expected
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    for image_positions in ("patch", "sequence"):
        options = {"generate_kwargs": {**OPTIONS, "image_positions": image_positions}, "return_full_text": False}
        answer = pipe(text=asked, **options, processor_kwargs={"pooled_grid_size": grid})
        expected = text_of(processor, plain(model, processor, asked, grid, image_positions))
        assert answer[0]["generated_text"].strip() == expected


def test_int8_has_the_positions_of_float(processor):
    """Its answers can differ, but by rounding: positions are the same, so a wrong numbering is further away."""
    model = tiny.build_model(image_positions="patch")
    inputs = encode(processor, messages(1), 2)
    with torch.no_grad():
        floats = {name: model(**inputs, image_positions=name).logits for name in ("patch", "sequence")}
        rounded = quantize_to_int8(model)(**inputs).logits
    assert (rounded - floats["patch"]).norm() < 0.5 * (rounded - floats["sequence"]).norm()


def test_a_checkpoint_keeps_its_positions_or_gets_others_at_loading(tmp_path, model, processor):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    asked = messages(1)
    for image_positions in (None, "sequence", "patch"):
        loaded, _ = load(tmp_path, device="cpu", image_positions=image_positions)
        assert loaded.config.image_positions == (image_positions or "patch")
        expected = plain(model, processor, asked, 2, image_positions)
        assert torch.equal(plain(loaded, processor, asked, 2), expected)
    with pytest.raises(ValueError, match="image_positions must be 'patch' or 'sequence', got 'both'"):
        load(tmp_path, device="cpu", image_positions="both")


def test_the_commands(tmp_path, model, processor):
    """`deco ask`, and the page, which encodes an image once for all grids."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tiny.picture(1).save(tmp_path / "picture.png")
    command = ["ask", str(tmp_path / "picture.png"), "what is this ?", "--model", str(tmp_path), "--json"]
    command += ["--pooled-grid-size", "2x4", "--max-new-tokens", "6", "--device", "cpu"]
    asked = messages(1)
    images = pytest.importorskip("modeling_deco.page.encoded_images").EncodedImages(model)
    for image_positions in (None, "sequence"):
        expected = text_of(processor, plain(model, processor, asked, [2, 4], image_positions))
        options = [] if image_positions is None else ["--image-positions", image_positions]
        result = CliRunner().invoke(app, [*command, *options])
        assert json.loads(result.stdout)["answer"] == expected
    expected = text_of(processor, plain(model, processor, asked, [2, 4]))
    for _ in range(2):
        with images.in_use():
            pieces = stream(model, processor, asked, pooled_grid_size=[2, 4], max_new_tokens=6)
            assert "".join(pieces).strip() == expected
    result = CliRunner().invoke(app, [*command, "--image-positions", "both"])
    assert result.exit_code == 2
    assert result.stderr == "deco ask: image_positions must be 'patch' or 'sequence', got 'both'.\n"


def test_a_batch_has_the_answers_of_its_rows(model, processor):
    asked = [messages(1), messages(2, 3, text="is this red ?"), messages(text="what ?")]
    together = plain(model, processor, asked, 2)
    for row, one in zip(together, asked, strict=True):
        assert torch.equal(row, plain(model, processor, one, 2)[0])


def test_the_context_is_used_up_by_positions(processor):
    """An image takes 36 positions, and 4 tokens; the message says what else to do."""
    model = tiny.build_model(image_positions="patch")
    inputs = encode(processor, messages(1), 2)
    num_tokens = inputs["input_ids"].shape[1]
    assert num_positions(model, inputs) == num_tokens + 36 - 4
    batch = encode(processor, [messages(1), messages(text="what ?")], 2)
    assert num_positions(model, batch) == num_tokens + 36 - 4
    model.config.text_config.max_position_embeddings = num_tokens + 36 - 4
    with pytest.raises(ValueError, match=rf"takes {num_tokens + 32} positions.*context is .*'sequence'.*{num_tokens}"):
        check_length(model, inputs)
    check_length(model, inputs | {"image_positions": "sequence"})
    model.config.text_config.max_position_embeddings += 1
    check_length(model, inputs)


def test_encoded_images_come_with_their_grids(model, processor):
    inputs = encode(processor, messages(1), 2)
    encoded = {"image": model.get_image_features(inputs["pixel_values"], pooled_grid_sizes=torch.tensor([[2, 2]]))}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = plain(model, processor, messages(1), 2)
    grids = {"pooled_grid_sizes": inputs["pooled_grid_sizes"]}
    generated = model.generate(**text, **grids, mm_encoder_outputs=dict(encoded), **OPTIONS)
    assert torch.equal(generated[:, text["input_ids"].shape[1] :], expected)
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match=r"images of \[4\] tokens, and their grids give \[9\]: pass the pooled_grid_sizes"
        ):
            call(**text, mm_encoder_outputs=dict(encoded))


def test_an_adapter_keeps_the_positions_of_its_model(processor):
    peft = pytest.importorskip("peft")
    model = tiny.build_model(image_positions="patch")
    asked = [*messages(1, 2), {"role": "assistant", "content": "red"}, *messages(3, text="is this red ?")]
    expected = {name: plain(model, processor, asked, 2, name) for name in (None, "sequence")}
    config = peft.LoraConfig(target_modules=r".*language_model.*\.q_proj")
    adapted = peft.get_peft_model(model, config)  # a new adapter changes nothing
    for image_positions, answer in expected.items():
        assert torch.equal(plain(adapted, processor, asked, 2, image_positions), answer)
