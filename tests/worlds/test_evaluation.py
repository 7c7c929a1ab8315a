# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What evaluations share: answers from common keys and values are those of `generate`, and the standard error."""

import pytest
import tiny
import torch

from modeling_deco.inference.generation import encode
from modeling_deco.worlds.evaluation import answer_about, summary

TEXTS = ("what is this ?", "the red cat", "two", "a dog . is this the blue dog ?")


@pytest.fixture
def processor():
    return tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)


@pytest.mark.parametrize("image_positions", ["sequence", "patch"])
@pytest.mark.parametrize("grid", [(2, 3), (6, 6)])
def test_answers_are_those_of_generate(processor, image_positions, grid):
    model = tiny.build_model(image_positions=image_positions)
    images = [tiny.picture(seed) for seed in range(3)]
    asked = [(place, text) for text in TEXTS for place in (2, 0, 1)]
    found = answer_about(model, processor, images, asked, [(3, 3), grid], max_new_tokens=8, batch_size=5)
    assert list(found) == [(3, 3), grid]
    assert len(set(found[grid])) > 4
    for (place, text), answer in zip(asked, found[grid], strict=True):
        content = [{"type": "image", "image": images[place]}, {"type": "text", "text": text}]
        inputs = encode(processor, [{"role": "user", "content": content}], grid)
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.decode(generated, skip_special_tokens=True).strip()


@pytest.mark.parametrize("projector_type", ["c_abstractor", "qformer"])
def test_a_projector_with_one_grid_answers_at_it(processor, projector_type):
    options = {"hidden_size": 16, "num_hidden_layers": 1}
    if projector_type == "qformer":
        options["num_attention_heads"] = 2
    model = tiny.build_model(projector_type=projector_type, projector_config=options)
    found = answer_about(
        model, processor, [tiny.picture(0)], [(0, text) for text in TEXTS], [(3, 3)], max_new_tokens=4
    )
    assert len(found[3, 3]) == len(TEXTS)


def test_nan_is_refused(processor):
    model = tiny.build_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        answer_about(model, processor, [tiny.picture(0)], [(0, "two")], [(3, 3)], max_new_tokens=4)


def test_standard_error_counts_pictures_not_questions():
    # Ten questions of a picture that are right or wrong together are one observation: sqrt(p (1 - p) / (n - 1)).
    assert summary([[True] * 10] * 60 + [[False] * 10] * 40) == {
        "accuracy": 60.0,
        "standard_error": pytest.approx(100 * (0.24 / 99) ** 0.5, abs=0.01),
        "questions": 1000,
    }
