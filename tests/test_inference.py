# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`stream`: the same text as `generate`, piece by piece; it stops when nobody reads on."""

import threading
import time

import pytest
import tiny
from transformers import AutoProcessor

from modeling_deco.inference import load, stream


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(str(checkpoint))


def ask(*pictures) -> list[dict]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what is this ?"}]}]


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("grid", [None, [2, 4]])
def test_the_pieces_are_the_text_of_generate(pictures, grid, loaded):
    model, processor = loaded
    messages = ask(*(tiny.picture(seed) for seed in range(pictures)))
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"pooled_grid_size": grid},
    )
    generated = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    pieces = list(stream(model, processor, messages, pooled_grid_size=grid, max_new_tokens=5))
    assert "".join(pieces) == processor.decode(generated, skip_special_tokens=True)
    assert len(pieces) > 1


def test_an_iterator_that_is_closed_stops_generation(loaded):
    model, processor = loaded
    before = threading.active_count()
    pieces = stream(model, processor, ask(tiny.picture(0)), max_new_tokens=100_000)
    next(pieces)
    start = time.monotonic()
    pieces.close()
    assert threading.active_count() == before
    assert time.monotonic() - start < 5


def test_an_error_of_generation_is_raised_where_the_answer_is_read(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match=r"7 x 7 is larger than the 6 x 6"):
        list(stream(model, processor, ask(tiny.picture(0)), pooled_grid_size=7))


def test_two_answers_at_once_do_not_mix(loaded):
    model, processor = loaded
    messages = [ask(tiny.picture(seed)) for seed in range(2)]
    alone = ["".join(stream(model, processor, one)) for one in messages]
    first, second = (stream(model, processor, one) for one in messages)
    together = [next(first), next(second)]
    assert [together[0] + "".join(first), together[1] + "".join(second)] == alone


def test_the_dtype_of_the_checkpoint_is_kept(checkpoint, tmp_path):
    model, processor = load(str(checkpoint))
    model.bfloat16().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert str(load(str(tmp_path))[0].dtype) == "torch.bfloat16"
    assert type(load(str(tmp_path))[1]) is type(AutoProcessor.from_pretrained(checkpoint))
