# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Relevance over pictures of several views: matrices against loops and autograd, maps against the naive rules."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling_deco.relevance import Relevance, explain, plot_relevance
from modeling_deco.relevance.maps import spread, token_matrix, view_patches, without_newlines
from modeling_deco.views import TokenMap

QUESTION, ANSWER = "what is this ?", "a red cat ."
PICTURE = tiny.picture(0, 40, 110)
FAMILIES = ("llava_next", "tiles", "llava_onevision")


def build(family, pooled_grid_size=3, **kwargs):
    """A model in float64, in which rounding does not hide a mistake."""
    if family == "llava_onevision":
        kwargs = {"vision_aspect_ratio": "anyres_max_1", **kwargs}  # most maps are shrunk
    if family == "one view":
        return tiny.build_model(pooled_grid_size=pooled_grid_size, **kwargs).double()
    return tiny.build_family(family, pooled_grid_size, **kwargs).double()


def processor_of(model):
    if model.config.image_grid_pinpoints is not None:
        return tiny.build_family_processor(model.config)
    return tiny.build_processor(patch_size=tiny.PATCH_SIZE, chat_template=tiny.CHAT_TEMPLATE)


def explain_answer(model, picture, answer=ANSWER, **kwargs) -> Relevance:
    return explain(model, processor_of(model), picture, QUESTION, answer, **kwargs)


# --- matrices --------------------------------------------------------------------------------------------------------


def pooled(num_patches, size):
    """Windows of adaptive average pooling along a line."""
    matrix = torch.zeros(size, num_patches)
    for token in range(size):
        window = slice(token * num_patches // size, math.ceil((token + 1) * num_patches / size))
        matrix[token, window] = 1 / (window.stop - window.start)
    return matrix


def interpolated(num_patches, size):
    """Bilinear interpolation along a line: a token looks at the two patches around its center."""
    matrix = torch.zeros(size, num_patches)
    for token in range(size):
        center = max(0.0, (token + 0.5) * num_patches / size - 0.5)
        left = int(center)
        matrix[token, left] += 1 - (center - left)
        matrix[token, min(left + 1, num_patches - 1)] += center - left
    return matrix


@pytest.mark.parametrize("is_interpolated", [False, True])
@pytest.mark.parametrize(("patches", "tokens"), [((6, 11), (3, 4)), ((5, 7), (5, 7)), ((4, 9), (1, 8))])
def test_shares_of_patches_in_tokens_are_exact(patches, tokens, is_interpolated):
    side = interpolated if is_interpolated else pooled
    rows, cols = (side(*sides) for sides in zip(patches, tokens, strict=True))
    expected = torch.einsum("ai,bj->abij", rows, cols).flatten(2).flatten(0, 1)
    found = token_matrix(TokenMap(patches, patches, tokens, is_interpolated=is_interpolated))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(len(found)))


def test_a_resized_map_keeps_each_share_in_its_place():
    (rows, cols), (to_rows, to_cols) = grid, to = (3, 4), (5, 2)
    expected = torch.zeros(rows, cols, to_rows, to_cols)
    height, width = 15, 4  # pixels in which both grids have borders
    for y in range(height):
        for x in range(width):
            cell, other = (y * rows // height, x * cols // width), (y * to_rows // height, x * to_cols // width)
            expected[(*cell, *other)] += rows * cols / (height * width)
    found = spread(grid, to)
    torch.testing.assert_close(found, expected.flatten(2).flatten(0, 1))
    torch.testing.assert_close(found.sum(1), torch.ones(12))
    assert torch.equal(spread((3, 4), (3, 4)), torch.eye(12))


def test_newlines_are_left_out():
    tokens = torch.arange(20)
    grids = {"patch_grid": (4, 8), "full_grid": (4, 8), "pooled_grid": (2, 4)}
    assert without_newlines(tokens[:10], TokenMap(**grids, newline="rows")).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert without_newlines(tokens[:9], TokenMap(**grids, newline="end")).tolist() == list(range(8))
    assert without_newlines(tokens[:8], TokenMap(**grids)).tolist() == list(range(8))


def shares_of_patches(model, maps):
    """Share of each patch of all views in each token, newlines included, `(num_tokens, num_views * num_patches)`."""
    model = copy.deepcopy(model)
    model.multi_modal_projector.project = lambda features: features  # token by token, so it adds nothing
    num_views, num_patches = sum(token_map.num_views for token_map in maps), math.prod(tiny.PATCH_GRID)
    features = torch.zeros(num_views, num_patches, model.config.text_hidden_size, dtype=torch.float64)

    def tokens_of(shift):
        return model.project_maps(features + shift[..., None], [maps])[0][:, 0]

    return torch.autograd.functional.jacobian(tokens_of, features[..., 0]).flatten(1)


@pytest.mark.parametrize("image_size", [(20, 60), (70, 33), (40, 40), (24, 24), (90, 20)], ids=str)
@pytest.mark.parametrize("grid", [3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_the_derivatives_of_the_models_own_stitching(family, grid, image_size):
    model = build(family, grid).model
    (maps,) = model.image_maps(image_sizes=torch.tensor([image_size]))
    num_views, num_patches = sum(token_map.num_views for token_map in maps), math.prod(tiny.PATCH_GRID)
    expected = shares_of_patches(model, maps)
    first_view = first_token = 0
    for token_map in maps:
        found = torch.zeros(math.prod(token_map.pooled_grid), num_views, num_patches)
        view, patch = view_patches(token_map, tiny.PATCH_GRID)
        found[:, (first_view + view).flatten(), patch.flatten()] = token_matrix(token_map)
        rows = expected[first_token : first_token + token_map.num_tokens]
        torch.testing.assert_close(found.flatten(1), without_newlines(rows, token_map), check_dtype=False)
        first_view, first_token = first_view + token_map.num_views, first_token + token_map.num_tokens
    assert first_token == len(expected)
    is_capped = family == "llava_onevision" and image_size != (24, 24)
    assert maps[-1].is_interpolated == (is_capped and grid == 6)


# --- maps ------------------------------------------------------------------------------------------------------------


def keep(attentions):
    """A hook that keeps a module's attention and its gradient."""

    def hook(module, args, output):
        output[1].retain_grad()
        attentions.append(output[1])

    return hook


def naive_map(model, picture, index, **budget) -> torch.Tensor:
    """Text-to-Patch `(rows, cols)` of a token, by one relevance matrix over all views' tokens and the text's."""
    model, processor = copy.deepcopy(model), processor_of(model)
    model.set_attn_implementation("eager")
    kept = {"vision_tower": [], "language_model": []}
    for part, attentions in kept.items():
        for module in model.model.get_submodule(part).modules():
            if "Attention" in type(module).__name__:
                module.register_forward_hook(keep(attentions))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=budget,
    )
    answer = processor.tokenizer(ANSWER)["input_ids"]
    ids = inputs.pop("input_ids")[0].tolist() + answer
    position = len(ids) - len(answer) + index - 1
    inputs.pop("attention_mask")
    (maps,) = model.model.image_maps(inputs.get("pooled_grid_sizes"), image_sizes=inputs["image_sizes"])
    logits = model(input_ids=torch.tensor([ids]), **inputs).logits[0, position]
    (logits[answer[index]] - max(logit for token, logit in enumerate(logits) if token != answer[index])).backward()

    num_views, _, num_tower, _ = kept["vision_tower"][0].shape
    first_patch, num_patches = model.config.num_prefix_tokens, math.prod(tiny.PATCH_GRID)
    size = num_views * num_tower + len(ids)
    row = torch.eye(size, dtype=torch.float64)[num_views * num_tower + position]

    def products(attention):
        return torch.where(attention.grad * attention > 0, attention.grad * attention, 0.0).detach().mean(1)

    for attention in reversed(kept["language_model"]):
        layer = torch.zeros(size, size, dtype=torch.float64)
        layer[-len(ids) :, -len(ids) :] = products(attention)[0]
        row = row + row @ layer
    placeholders = [at for at, token in enumerate(ids) if token == tiny.IMAGE_TOKEN_ID]
    layer = torch.zeros(size, size, dtype=torch.float64)
    patches = torch.arange(num_views * num_tower).view(num_views, num_tower)[:, first_patch:][:, :num_patches]
    for placeholder, shares in zip(placeholders, shares_of_patches(model.model, maps), strict=True):
        layer[num_views * num_tower + placeholder, patches.flatten()] = shares
    row = row + row @ layer
    for attention in reversed(kept["vision_tower"]):
        layer = torch.zeros(size, size, dtype=torch.float64)
        layer[: num_views * num_tower, : num_views * num_tower] = torch.block_diag(*products(attention))
        row = row + row @ layer
    views = row[patches]

    whole, (rows, cols) = maps[-1], tiny.PATCH_GRID
    tile_rows, tile_cols = whole.tile_grid
    canvas = torch.zeros(tile_rows * rows, tile_cols * cols, dtype=torch.float64)
    for tile, values in enumerate(views[-tile_rows * tile_cols :]):
        top, left = tile // tile_cols * rows, tile % tile_cols * cols
        canvas[top : top + rows, left : left + cols] = values.view(rows, cols)
    (top, left), (rows, cols) = whole.padding, whole.patch_grid
    joined = canvas[top : top + rows, left : left + cols].clone()
    if len(maps) == 2:
        height, width = rows * tiny.PATCH_GRID[0], cols * tiny.PATCH_GRID[1]  # in which both grids have borders
        for y in range(height):
            for x in range(width):
                patch = views[0].view(tiny.PATCH_GRID)[y // rows, x // cols]
                joined[y // tiny.PATCH_GRID[0], x // tiny.PATCH_GRID[1]] += patch / (rows * cols)
    return joined


@pytest.mark.newest
@pytest.mark.parametrize(
    ("family", "size", "budget"),
    [
        ("llava_next", (40, 110), {}),
        ("llava_next", (110, 40), {"pooled_grid_size": [4, 5]}),
        ("tiles", (60, 60), {"max_image_tokens": 50}),
        ("llava_onevision", (60, 70), {"pooled_grid_size": 6}),
        ("llava_onevision", (70, 60), {"pooled_grid_size": 4}),
        ("one view", (40, 60), {"tiles": 4}),
        ("one view", (40, 60), {"tiles": 9, "pooled_grid_size": [5, 8]}),
    ],
)
def test_a_map_over_all_views_is_that_of_the_naive_rules(family, size, budget):
    model, picture = build(family), tiny.picture(0, *size)
    found = explain_answer(model, picture, **budget)
    for index in (0, 2):
        expected = naive_map(model, picture, index, **budget)
        assert expected.shape == found.patch_grid
        torch.testing.assert_close(
            found.text_to_patch[index].unflatten(0, found.patch_grid),
            expected,
            rtol=1e-5,
            atol=1e-6,
            check_dtype=False,
        )


@pytest.mark.parametrize(("tiles", "side"), [(4, 12), (9, 18)])
def test_tiles_of_a_model_for_one_view_have_one_map_in_its_number_of_tokens(tiles, side):
    found = explain_answer(build("one view"), tiny.picture(0, 60, 60), tiles=tiles)
    assert (found.patch_grid, found.pooled_grid, found.overview_grid) == ((side, side), (3, 3), None)
    assert found.image.shape == (side * tiny.PATCH_SIZE, side * tiny.PATCH_SIZE, 3)


def test_the_largest_grid_that_fits_is_explained():
    found = explain_answer(build("llava_next"), PICTURE, max_image_tokens=64)
    assert (found.overview_grid, found.pooled_grid) == ((4, 4), (4, 11))  # 16 + 4 * (11 + 1) tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_of_relevance_is_that_of_all_tokens_but_newlines(family):
    model = build(family)
    with torch.no_grad():  # a tower in which relevance stays where it is
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
    found = explain_answer(model, tiny.picture(0, 60, 70))
    torch.testing.assert_close(found.query_to_patch.sum(-1), torch.ones_like(found.text_to_query))
    torch.testing.assert_close(found.text_to_patch.sum(-1), found.text_to_query.sum(-1))
    (maps,) = model.model.image_maps(image_sizes=torch.tensor([[60, 70]]))
    assert found.text_to_query.shape[1] == sum(math.prod(token_map.pooled_grid) for token_map in maps)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_baseline_over_views_is_mean_attention_times_shares(family):
    model = build(family)
    gae, found = explain_answer(model, PICTURE), explain_answer(model, PICTURE, method="attention")
    torch.testing.assert_close(found.query_to_patch.sum(-1), torch.ones_like(found.text_to_query))
    assert found.patch_grid == gae.patch_grid
    assert (found.text_to_query.sum(-1) < 1).all()
    assert not torch.allclose(found.text_to_patch, gae.text_to_patch)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_about_views_is_what_the_model_generates(family):
    model = build(family)
    processor = tiny.build_family_processor(model.config)
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    words = range(len(tiny.SPECIAL_TOKENS), tiny.IMAGE_TOKEN_ID)
    others = [token for token in range(tiny.VOCAB_SIZE) if token not in words]
    arguments = {"max_new_tokens": 5, "num_beams": 2, "suppress_tokens": others}
    expected = model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :].tolist()
    found = explain(model, processor, PICTURE, QUESTION, **arguments)
    assert [token for (token,) in found.token_ids] == expected
    given = explain_answer(model, PICTURE, answer=found.answer)
    torch.testing.assert_close(found.text_to_patch, given.text_to_patch)


def test_a_very_thin_picture_has_the_map_of_its_overview():
    model = build("llava_next")
    found = explain_answer(model, Image.new("RGB", (400, 2), "red"))
    (maps,) = model.model.image_maps(image_sizes=torch.tensor([[2, 400]]))
    assert [token_map.num_tokens for token_map in maps] == [9, 0]
    assert (found.patch_grid, found.pooled_grid, found.overview_grid) == ((6, 6), (3, 3), None)
    assert found.image.shape == (24, 24, 3)
    assert (found.text_to_patch.sum(-1) > 0).all()


def without_places(model):
    """A model that sees what is in a patch, but neither where it is nor its neighbours: every patch of one colour has
    the same relevance."""
    with torch.no_grad():
        tower = model.model.vision_tower
        tower.embeddings.position_embedding.weight.zero_()
        for layer in tower.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
        first, last = model.model.language_model.layers
        first.self_attn.o_proj.weight.zero_()
        for parameter in last.self_attn.q_proj.parameters():
            parameter.zero_()
    return model


def picture_with_a_spot(height, width, box):
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    top, left, bottom, right = box
    pixels[top:bottom, left:right] = (255, 255, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((48, 144), (16, 8, 24, 16)),  # landscape, in the first, the second and the last tile
        ((48, 144), (8, 64, 16, 72)),
        ((48, 144), (40, 136, 48, 144)),
        ((144, 48), (128, 8, 136, 16)),  # portrait
        ((60, 108), (10, 90, 20, 100)),  # padded above and below
        ((108, 60), (90, 10, 100, 20)),  # padded to the left and to the right
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_spot_lights_up_at_its_place_in_the_whole_picture(family, size, box):
    (height, width), (top, left, bottom, right) = size, box
    model = without_places(build(family, 6))
    found = explain_answer(model, picture_with_a_spot(height, width, box))
    without_spot = explain_answer(model, picture_with_a_spot(height, width, (0, 0, 0, 0)))
    rows, cols = found.patch_grid
    assert found.image.shape == (rows * tiny.PATCH_SIZE, cols * tiny.PATCH_SIZE, 3)
    change = (found.text_to_patch - without_spot.text_to_patch).abs().sum(0).unflatten(0, found.patch_grid)
    brightness = torch.from_numpy(found.image).float().mean(-1)
    for heat, tolerance in ((change, 6), (brightness, 18)):
        y, x = divmod(int(heat.argmax()), heat.shape[1])
        y, x = (y + 0.5) * height / heat.shape[0], (x + 0.5) * width / heat.shape[1]
        # a patch of the overview is a sixth of the picture
        assert top - height / tolerance <= y <= bottom + height / tolerance
        assert left - width / tolerance <= x <= right + width / tolerance


# --- figure ----------------------------------------------------------------------------------------------------------


def test_tokens_of_the_overview_are_drawn_over_those_of_the_map():
    found = explain_answer(build("llava_next"), PICTURE)
    assert (found.overview_grid, found.pooled_grid) == ((3, 3), (3, 8))
    figure = plot_relevance(found, "both")
    titles = [axes.get_title() for axes in figure.axes if axes.images and axes.get_title()]
    assert titles == ["6 x 16 patches", "a", "red", "cat", "3 x 3 + 3 x 8 tokens", "a", "red", "cat"]
    drawn = [axes.images[-1].get_array() for axes in figure.axes if axes.get_title() == "red"]
    tokens = found.text_to_query[1]
    expected = tokens[9:].view(3, 8).clone()
    for row in range(3):
        for col in range(24):  # an eighth of a token of the overview, a third of one of the map
            expected[row, col // 3] += tokens[row * 3 + col // 8] / 8
    np.testing.assert_allclose(drawn[1], expected / expected.max(), rtol=1e-5)
    np.testing.assert_allclose(drawn[0], found.text_to_patch[1].view(6, 16) / found.text_to_patch[1].max(), rtol=1e-5)
