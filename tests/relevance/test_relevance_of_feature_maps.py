# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Relevance with a convolutional vision tower, by autograd written down here once more."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling_deco.processing_deco import arguments_of_config
from modeling_deco.relevance import explain
from modeling_deco.worlds.emoji import efficientnet_lite0

QUESTION, ANSWER = "what is this ?", "a red cat ."


def build_processor(model, **kwargs):
    return tiny.build_processor(
        chat_template=tiny.CHAT_TEMPLATE, **{**arguments_of_config(model.config), "pooled_grid_size": 3, **kwargs}
    )


@pytest.mark.parametrize("vision", tiny.FEATURE_MAP_CONFIGS)
def test_cells_of_a_window_are_weighted_by_gradient_times_input(vision):
    model = tiny.build_model(vision)
    processor = build_processor(model)
    found = explain(model, processor, tiny.picture(0), QUESTION, ANSWER)
    assert (found.patch_grid, found.pooled_grid) == ((6, 6), (3, 3))

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=tiny.picture(0), text=text, return_tensors="pt")
    answer_ids = processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer_ids])], dim=1)
    kept = []
    handle = model.model.vision_tower.register_forward_hook(lambda *call: kept.append(call[2].last_hidden_state))
    inputs["pixel_values"].requires_grad_()
    logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
    handle.remove()
    for index, token in enumerate(answer_ids):
        scores = logits[inputs["input_ids"].shape[1] + index - 1]
        margin = scores[token] - torch.cat([scores[:token], scores[token + 1 :]]).max()
        (gradient,) = torch.autograd.grad(margin, kept[0], retain_graph=True)
        cells = (gradient * kept[0]).sum(1)[0].clamp(min=0).detach()  # (6, 6)
        for query in range(9):
            row, col = divmod(query, 3)
            expected = torch.zeros(6, 6)
            window = cells[2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            share = window / window.sum() if window.sum() > 0 else torch.full((2, 2), 0.25)
            expected[2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = share
            torch.testing.assert_close(
                found.query_to_patch[index, query].unflatten(0, (6, 6)), expected, atol=2e-3, rtol=1e-2
            )
    assert (found.query_to_patch[0] > 0.26).any()  # not the pooling alone


@pytest.mark.parametrize("vision", tiny.FEATURE_MAP_CONFIGS)
def test_at_the_full_grid_the_map_is_that_of_the_tokens(vision):
    model = tiny.build_model(vision)
    found = explain(model, build_processor(model), tiny.picture(0), QUESTION, ANSWER, pooled_grid_size=6)
    torch.testing.assert_close(found.text_to_patch, found.text_to_query)
    assert found.text_to_patch.any()


@pytest.mark.parametrize("projector", ["mlp", "qformer", "resampler", "c_abstractor", "d_abstractor"])
@pytest.mark.parametrize("method", ["gae", "attention"])
def test_every_projector_gives_maps(projector, method):
    grid = 6 if projector == "mlp" else 3
    sizes = {"hidden_size": 32, "num_hidden_layers": 1}
    sizes |= {"mlp_num_layers": 2} if projector == "c_abstractor" else {"num_attention_heads": 2}
    model = tiny.build_model(
        "efficientnet",
        projector_type=projector,
        projector_config=None if projector == "mlp" else sizes,
        pooled_grid_size=grid,
    )
    processor = build_processor(model, pooled_grid_size=grid)
    if method == "attention" and projector.endswith("abstractor"):
        with pytest.raises(ValueError, match="use method='gae'"):
            explain(model, processor, tiny.picture(0), QUESTION, ANSWER, method=method)
        return
    found = explain(model, processor, tiny.picture(0), QUESTION, ANSWER, method=method)
    assert found.text_to_patch.shape == (4, 36)
    assert found.text_to_patch.isfinite().all()
    assert found.text_to_patch.any()


def test_a_picture_of_several_views_has_one_map():
    model = tiny.build_model("convnextv2", image_grid_pinpoints=tiny.PINPOINTS, image_newline=True)
    processor = tiny.build_family_processor(model.config)
    found = explain(model, processor, tiny.picture(0, 48, 48), QUESTION, ANSWER)
    assert (found.patch_grid, found.image.shape, found.overview_grid) == ((12, 12), (48, 48, 3), (3, 3))
    torch.testing.assert_close(found.query_to_patch.sum(-1), torch.ones(4, 9 + 36))


def test_the_last_patches_of_a_network_that_rounds_up_are_shown_whole():
    model = tiny.build_model("mobilenet_v2")
    processor = build_processor(model)
    processor.image_processor = efficientnet_lite0.image_processor(22)
    found = explain(model, processor, Image.new("RGB", (22, 22), "red"), QUESTION, ANSWER)
    assert found.patch_grid == (6, 6)
    assert found.image.shape == (24, 24, 3)
    assert np.abs(found.image.astype(int) - [255, 0, 0]).max() <= 1
