# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The model against LLaVA, against a computation by hand, and against itself asked one image at a time."""

import copy
import re
from itertools import pairwise

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from test_projectors import mean_over_windows, windows
from tiny import batch, pixels, prompt
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, Siglip2ImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_deco import DecoForConditionalGeneration, DecoModel
from modeling_deco.modeling_deco import CACHE_NAME

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def grids(*pairs):
    return torch.tensor(pairs)


def naflex_inputs(*images):
    """SigLIP 2's own: flat patches, padded to a common number."""
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=40)
    return processor(list(images), return_tensors="pt")


def num_tower_calls(model, run) -> int:
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)


def assert_logits_of_prompts(model, prompts, logits, images_of, **kwargs):
    """Compare the logits of a left-padded batch with those of each prompt alone; `images_of[i]` is a dict."""
    for ids, found, images in zip(prompts, logits, images_of, strict=True):
        alone = model(torch.tensor([ids]), **images, **kwargs).logits[0]
        torch.testing.assert_close(found[-len(ids) :], alone, rtol=1e-4, atol=1e-4)


# --- LLaVA -----------------------------------------------------------------------------------------------------------

PAIRS = [("clip", "llama", "default"), ("siglip", "qwen2", "full"), ("dinov2", "gemma", "default")]
LLAVA_PROMPTS = {
    "one image": ([prompt("user", 36, "what is this ?")], 1),
    "two images": ([prompt("what", 36, "is", 36, "?")], 2),
    "left-padded batch": ([prompt(36, "what is this ?"), prompt("a", 36, "?")], 2),
    "different numbers of images": ([prompt(36, 36, "?"), prompt("a red cat"), prompt("what", 36)], 3),
    "text only": ([prompt("what is a cat ?"), prompt("dog ?")], 0),
}


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair[:2]))
def llava_and_deco(request):
    """A LLaVA, and the DeCo that has its weights."""
    vision, text, strategy = request.param
    config = LlavaConfig(
        vision_config=tiny.VISION_CONFIGS[vision],
        text_config=tiny.TEXT_CONFIGS[text],
        image_token_id=tiny.IMAGE_TOKEN_ID,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text == "gemma",
    )
    llava = tiny.randomize(LlavaForConditionalGeneration(config))
    config = tiny.build_config(vision, text, pooled_grid_size=6, vision_feature_select_strategy=strategy)
    deco = DecoForConditionalGeneration(config).eval()
    missing, unexpected = deco.load_state_dict(llava.state_dict(), strict=False)
    assert not missing
    assert all(re.search(r"vision_tower\.(head|.*layers?\.2)\.", name) for name in unexpected)
    return llava, deco


def llava_inputs(case):
    prompts, num_images = LLAVA_PROMPTS[case]
    inputs = batch(*prompts)
    return {**inputs, "pixel_values": pixels(num_images)} if num_images else inputs


@pytest.mark.parametrize("case", LLAVA_PROMPTS)
def test_logits_at_the_patch_grid_are_those_of_llava(case, llava_and_deco):
    llava, deco = llava_and_deco
    inputs = llava_inputs(case)
    assert (deco(**inputs).logits - llava(**inputs).logits).abs().max() == 0


@pytest.mark.newest
@pytest.mark.parametrize("case", LLAVA_PROMPTS)
def test_generation_at_the_patch_grid_is_that_of_llava(case, llava_and_deco):
    llava, deco = llava_and_deco
    inputs = llava_inputs(case)
    expected = llava.generate(**inputs, **GREEDY, suppress_tokens=[tiny.IMAGE_TOKEN_ID])  # which DeCo never writes
    assert torch.equal(deco.generate(**inputs, **GREEDY), expected)


@pytest.mark.newest
def test_loss_and_gradients_at_the_patch_grid_are_those_of_llava(llava_and_deco):
    llava, deco = llava_and_deco
    inputs = llava_inputs("left-padded batch")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE_TOKEN_ID, -100)
    losses = [model(**inputs).loss for model in llava_and_deco]
    assert losses[0] == losses[1]
    projectors = [model.model.multi_modal_projector.linear_1.weight for model in llava_and_deco]
    expected, found = (torch.autograd.grad(loss, weight)[0] for loss, weight in zip(losses, projectors, strict=True))
    assert torch.equal(found, expected)


def test_a_checkpoint_has_the_names_of_llavas_parameters(checkpoint):
    config = LlavaConfig(vision_config=tiny.VISION_CONFIGS["clip"], text_config=tiny.TEXT_CONFIGS["llama"])
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
    unused = set(LlavaForConditionalGeneration(config).state_dict()) - names
    assert unused
    assert all(name.startswith("model.vision_tower.encoder.layers.2.") for name in unused)


# --- grids -----------------------------------------------------------------------------------------------------------


def test_images_of_mixed_grids_give_what_each_gives_alone(model):
    pairs = [(3, 3), (6, 6), (2, 5), (1, 1), (3, 3)]
    pixel_values = pixels(5)
    mixed = model.get_image_features(pixel_values, pooled_grid_sizes=torch.tensor(pairs)).pooler_output
    assert [len(features) for features in mixed] == [rows * cols for rows, cols in pairs]
    for index, pair in enumerate(pairs):
        (alone,) = model.get_image_features(
            pixel_values[index : index + 1], pooled_grid_sizes=grids(pair)
        ).pooler_output
        torch.testing.assert_close(mixed[index], alone)


def test_prompts_of_mixed_grids_in_a_batch_give_what_each_gives_alone(model):
    prompts = [prompt("what", 9, "?"), prompt(36, "?"), prompt("the red", 10, "is", 1)]
    pixel_values, sizes = pixels(4), grids((3, 3), (6, 6), (2, 5), (1, 1))
    logits = model(**batch(*prompts), pixel_values=pixel_values, pooled_grid_sizes=sizes).logits
    images_of = [
        {"pixel_values": pixel_values[part], "pooled_grid_sizes": sizes[part]}
        for part in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    assert_logits_of_prompts(model, prompts, logits, images_of)


def test_prompts_of_mixed_grids_in_a_batch_generate_what_each_generates_alone(model):
    prompts = [prompt("what", 4, "?"), prompt(36, "?")]
    pixel_values, sizes = pixels(2), grids((2, 2), (6, 6))
    together = model.generate(**batch(*prompts), pixel_values=pixel_values, pooled_grid_sizes=sizes, **GREEDY)
    for index, ids in enumerate(prompts):
        part = slice(index, index + 1)
        images = {"pixel_values": pixel_values[part], "pooled_grid_sizes": sizes[part]}
        alone = model.generate(torch.tensor([ids]), **images, **GREEDY)
        assert torch.equal(together[index, -8:], alone[0, -8:])


def test_the_grid_of_the_config_is_the_default(model):
    inputs = {**batch(prompt(9, "?")), "pixel_values": pixels(1)}
    assert torch.equal(model(**inputs).logits, model(**inputs, pooled_grid_sizes=grids((3, 3))).logits)


@pytest.mark.parametrize("vision", ["clip", "siglip2"])
def test_a_grid_set_in_the_config_holds_from_then_on(vision):
    model = tiny.build_model(vision)
    model.config.pooled_grid_size = [2, 5]
    inputs = {"pixel_values": pixels(1)} if vision == "clip" else naflex_inputs(tiny.picture(0))
    (features,) = model.get_image_features(**inputs).pooler_output
    (expected,) = model.get_image_features(**inputs, pooled_grid_sizes=grids((2, 5))).pooler_output
    assert torch.equal(features, expected)


def test_another_grid_gives_another_answer(model):
    answers = [
        model.generate(
            **batch(prompt(rows * cols, "?")), pixel_values=pixels(1), pooled_grid_sizes=grids((rows, cols)), **GREEDY
        )[0, -8:].tolist()
        for rows, cols in ((2, 2), (3, 3), (6, 6))
    ]
    assert all(one != other for one, other in pairwise(answers))


def image_features_by_hand(model, pixel_values, patch_grid, pooled_grid, num_prefix_tokens):
    """Tower, mean over windows, MLP; each written out."""
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    options = {} if model.config.vision_config.model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
    hidden_state = tower(pixel_values, output_hidden_states=True, **options).hidden_states[-1]
    pooled = mean_over_windows(hidden_state[:, num_prefix_tokens:], patch_grid, pooled_grid)
    hidden = torch.nn.functional.gelu(pooled @ projector.linear_1.weight.T + projector.linear_1.bias)
    return hidden @ projector.linear_2.weight.T + projector.linear_2.bias


@pytest.mark.parametrize(
    ("vision", "num_prefix_tokens"), [("clip", 1), ("siglip", 0), ("dinov2", 1), ("dinov2_with_registers", 5)]
)
@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (16, 36), (26, 43), (36, 36)])
def test_images_of_other_sizes_are_pooled_in_rows_and_columns(vision, num_prefix_tokens, height, width):
    model = tiny.build_model(vision)
    pixel_values, pooled_grid = pixels(2, height, width), (2, 5)
    features = model.get_image_features(pixel_values, pooled_grid_sizes=grids(pooled_grid, pooled_grid)).pooler_output
    patch_grid = (height // 4, width // 4)
    expected = image_features_by_hand(model, pixel_values, patch_grid, pooled_grid, num_prefix_tokens)
    torch.testing.assert_close(torch.stack(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
def test_a_picture_with_a_part_of_a_patch_at_its_edge_is_taken(vision):
    """27 x 25 pixels are not the tower's size, and hold as many patches as it has positions: 6 x 6."""
    (features,) = tiny.build_model(vision).get_image_features(pixels(1, 27, 25)).pooler_output
    assert features.shape == (9, 32)
    assert features.isfinite().all()


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 40), (40, 24)])
def test_a_changed_patch_changes_its_cell_alone(vision, height, width):
    """A patch is changed after the tower, which mixes them: only its cell of the pooled grid may change."""
    model = tiny.build_model(vision)
    num_prefix_tokens, (rows, cols), pooled_grid = model.config.num_prefix_tokens, (height // 4, width // 4), (3, 2)
    sizes = grids(pooled_grid)
    before = model.get_image_features(pixels(1, height, width), pooled_grid_sizes=sizes).pooler_output[0]
    for row, col in ((0, 0), (0, cols - 1), (rows - 1, 0), (rows // 2, cols // 3)):

        def change(_tower, _inputs, outputs, patch=num_prefix_tokens + row * cols + col):
            hidden_state = outputs.hidden_states[-1].clone()
            hidden_state[:, patch] += 1
            outputs.hidden_states = (hidden_state,)

        handle = model.model.vision_tower.register_forward_hook(change)
        after = model.get_image_features(pixels(1, height, width), pooled_grid_sizes=sizes).pooler_output[0]
        handle.remove()
        changed = (after != before).any(-1).view(pooled_grid)
        in_rows = torch.tensor([row in window for window in windows(rows, 3)])
        in_cols = torch.tensor([col in window for window in windows(cols, 2)])
        assert torch.equal(changed, in_rows[:, None] & in_cols)


def test_the_projector_reads_contiguous_features(model):
    """vLLM's CPU kernels refuse strided ones."""
    seen = []
    linear_1 = model.model.multi_modal_projector.linear_1
    handle = linear_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    model.get_image_features(pixels(2))
    model.get_image_features(pixels(2), pooled_grid_sizes=grids((2, 5), (6, 1)))
    handle.remove()
    assert seen == [True] * 3


# --- SigLIP 2's own inputs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip2():
    return tiny.build_model("siglip2")


def test_pixels_are_cut_as_the_image_processor_of_siglip2_cuts_them(siglip2):
    """A picture of the size that it would choose itself, so that nothing is resized."""
    image = tiny.picture(0, 20, 30).resize((32, 20))
    inputs = naflex_inputs(image)
    assert inputs["spatial_shapes"].tolist() == [[5, 8]]
    raw = torch.from_numpy(tiny.np.array(image)).permute(2, 0, 1)[None] / 255 * 2 - 1  # (1, 3, 20, 32)
    (found,) = siglip2.get_image_features(raw, pooled_grid_sizes=grids((5, 4))).pooler_output
    (expected,) = siglip2.get_image_features(**inputs, pooled_grid_sizes=grids((5, 4))).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_padded_images_of_siglip2_give_what_each_gives_alone(siglip2):
    images = [tiny.picture(0, 30, 90), tiny.picture(1, 60, 40), tiny.picture(2, 40, 40)]
    together = naflex_inputs(*images)
    assert not together["pixel_attention_mask"].all()
    features = siglip2.get_image_features(**together).pooler_output
    for index, image in enumerate(images):
        alone = naflex_inputs(image)
        rows, cols = alone["spatial_shapes"][0].tolist()
        unpadded = {
            "pixel_values": alone["pixel_values"][:, : rows * cols],
            "pixel_attention_mask": alone["pixel_attention_mask"][:, : rows * cols],
            "spatial_shapes": alone["spatial_shapes"],
        }
        (expected,) = siglip2.get_image_features(**unpadded).pooler_output
        torch.testing.assert_close(features[index], expected, rtol=1e-4, atol=1e-4)


def test_siglip2_generates_from_its_own_inputs_at_mixed_grids(siglip2):
    images = [tiny.picture(0, 30, 90), tiny.picture(1, 60, 40)]
    prompts, sizes = [prompt("what", 6, "?"), prompt(9)], grids((2, 3), (3, 3))
    together = siglip2.generate(**batch(*prompts), **naflex_inputs(*images), pooled_grid_sizes=sizes, **GREEDY)
    for index, ids in enumerate(prompts):
        inputs = {**naflex_inputs(images[index]), "pooled_grid_sizes": sizes[index : index + 1]}
        assert torch.equal(together[index, -8:], siglip2.generate(torch.tensor([ids]), **inputs, **GREEDY)[0, -8:])


def test_each_image_of_siglip2_is_pooled_to_at_most_its_own_patches(siglip2):
    inputs = naflex_inputs(tiny.picture(0, 60, 40), tiny.picture(1, 10, 150))
    assert inputs["spatial_shapes"].tolist()[1] == [2, 20]
    features = siglip2.get_image_features(**inputs)
    assert [len(image) for image in features.pooler_output] == [9, 6]
    patches = features.hidden_states[-1][1, :40].view(2, 20, 32)  # row by row; 3 windows of 7, 8 and 7 columns
    pooled = torch.stack([patches[:, i:j].mean(1) for i, j in ((0, 7), (6, 14), (13, 20))], dim=1).flatten(0, 1)
    expected = siglip2.model.multi_modal_projector.project(pooled)
    torch.testing.assert_close(features.pooler_output[1], expected, rtol=1e-4, atol=1e-4)


def test_a_grid_asked_of_siglip2_that_is_larger_than_one_of_the_images_is_refused(siglip2):
    inputs = naflex_inputs(tiny.picture(0, 60, 40), tiny.picture(1, 10, 150))
    with pytest.raises(ValueError, match="3 x 3 is larger than the 2 x 20 patches of image 2"):
        siglip2.get_image_features(**inputs, pooled_grid_sizes=grids((3, 3), (3, 3)))


# --- images and prompts ----------------------------------------------------------------------------------------------

# prompts with the images of each
BATCHES = {
    "one each": [("what", 9, "?"), (9, "is this a red cat ?")],
    "several": [(9, "is", 9, "?"), ("two", 9, 9, 9, ".")],
    "different numbers": [(9, 9, "?"), ("a",), ("the red cat", 9)],
    "none first": [("what is a cat ?",), (9, "?")],
    "none last": [(9, "?"), ("what is a cat ?",)],
}


def batch_of(case):
    prompts = [prompt(*parts) for parts in BATCHES[case]]
    numbers = [sum(isinstance(part, int) for part in parts) for parts in BATCHES[case]]
    images = pixels(sum(numbers)).split(numbers)
    return prompts, images, [{"pixel_values": some} if len(some) else {} for some in images]


@pytest.mark.parametrize("case", BATCHES)
def test_prompts_in_a_left_padded_batch_give_what_each_gives_alone(case, model):
    prompts, images, images_of = batch_of(case)
    logits = model(**batch(*prompts), pixel_values=torch.cat(images)).logits
    assert_logits_of_prompts(model, prompts, logits, images_of)


@pytest.mark.parametrize("case", BATCHES)
def test_prompts_in_a_left_padded_batch_generate_what_each_generates_alone(case, model):
    prompts, images, images_of = batch_of(case)
    together = model.generate(**batch(*prompts), pixel_values=torch.cat(images), **GREEDY)
    for index, (ids, own) in enumerate(zip(prompts, images_of, strict=True)):
        alone = model.generate(torch.tensor([ids]), **own, **GREEDY)
        assert torch.equal(together[index, -8:], alone[0, -8:])


def test_a_batch_without_images_needs_no_pixels(model):
    prompts = [prompt("what is a cat ?"), prompt("a red dog")]
    assert_logits_of_prompts(model, prompts, model(**batch(*prompts)).logits, [{}, {}])


def test_padding_on_the_right_gives_what_the_prompt_gives_alone(model):
    ids = prompt(9, "what ?")
    padded = {"input_ids": torch.tensor([[*ids, 0, 0]]), "attention_mask": torch.tensor([[1] * len(ids) + [0, 0]])}
    logits = model(**padded, pixel_values=pixels(1)).logits[0, :-2]
    torch.testing.assert_close(logits, model(torch.tensor([ids]), pixel_values=pixels(1)).logits[0])


def test_the_order_of_images_counts(model):
    inputs = batch(prompt("what", 9, "is", 9, "?"))
    logits = [model(**inputs, pixel_values=images).logits[0, -1] for images in (pixels(2), pixels(2).flip(0))]
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_features_take_the_places_of_the_placeholders_in_order(model):
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    inputs = batch(prompt(9, "a", 9), prompt("what is", 9))
    features = model(**inputs, pixel_values=pixels(3)).image_hidden_states
    handle.remove()
    is_image = inputs["input_ids"] == tiny.IMAGE_TOKEN_ID
    assert torch.equal(seen[0][is_image], torch.cat(model.get_image_features(pixels(3)).pooler_output))
    assert torch.equal(seen[0][is_image], features)
    assert torch.equal(seen[0][~is_image], model.get_input_embeddings()(inputs["input_ids"])[~is_image])


# --- other ways in and out -------------------------------------------------------------------------------------------


def test_embeddings_in_the_place_of_ids_give_the_same_logits(model):
    inputs = batch(prompt(9, "what ?"), prompt("a", 9))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], pixel_values=pixels(2)).logits
    assert torch.equal(found, model(**inputs, pixel_values=pixels(2)).logits)


def test_embeddings_in_the_place_of_ids_generate_the_same(model):
    inputs = batch(prompt(9, "what ?"), prompt("a", 9))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    images = {"attention_mask": inputs["attention_mask"], "pixel_values": pixels(2)}
    expected = model.generate(input_ids=inputs["input_ids"], **images, **GREEDY)[:, -8:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **images, **GREEDY), expected)


def test_embeddings_that_hold_the_image_features_need_no_pixels(model):
    inputs = batch(prompt(9, "what ?"))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == tiny.IMAGE_TOKEN_ID] = model.get_image_features(pixels(1)).pooler_output[0]
    assert torch.equal(model(inputs_embeds=embeds).logits, model(**inputs, pixel_values=pixels(1)).logits)


def test_encoded_images_take_the_place_of_pixels(model):
    inputs = batch(prompt(9, "what ?"))
    encoded = {"image": model.get_image_features(pixels(1), return_dict=True)}
    found = model(**inputs, mm_encoder_outputs=encoded).logits
    assert torch.equal(found, model(**inputs, pixel_values=pixels(1)).logits)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 5, -1])], ids=str)
def test_only_the_logits_asked_for_are_computed(kept, model):
    inputs = {**batch(prompt(9, "what ?"), prompt("a", 9)), "pixel_values": pixels(2)}
    whole = model(**inputs).logits
    expected = whole[:, -kept:] if isinstance(kept, int) else whole[:, kept]
    torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, expected)


def test_the_loss_is_the_cross_entropy_of_the_next_labelled_tokens(model):
    inputs = {**batch(prompt(9, "what ?"), prompt("a", 9)), "pixel_values": pixels(2)}
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    outputs = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, -3:-1].flatten(0, 1), labels[:, -2:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_outputs_come_as_a_tuple_on_request(model):
    inputs = {**batch(prompt(9, "what ?")), "pixel_values": pixels(1)}
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    assert isinstance(model.get_image_features(pixels(1), return_dict=False), tuple)


def test_of_the_towers_hidden_states_only_the_last_is_kept(model):
    outputs = model.get_image_features(pixels(1))
    last = model.get_image_features(pixels(1), output_hidden_states=True).hidden_states[-1]
    assert outputs.hidden_states[:-1] == (None, None)  # as transformers marks those that are not kept
    assert torch.equal(outputs.hidden_states[-1], last)


@pytest.mark.newest
def test_all_hidden_states_of_the_tower_come_on_request(model):
    outputs = model.get_image_features(pixels(1), output_hidden_states=True)
    assert isinstance(outputs, BaseModelOutputWithPooling)
    assert [state.shape for state in outputs.hidden_states] == [(1, 37, 32)] * 3  # CLS and 36 patches


def test_hidden_states_and_attentions_of_the_language_model_come_on_request():
    model = tiny.build_model(attn_implementation="eager")
    inputs = {**batch(prompt(9, "what ?")), "pixel_values": pixels(1)}
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(1, 12, 32)] * 3
    assert [weights.shape for weights in outputs.attentions] == [(1, 2, 12, 12)] * 2


def test_the_images_may_be_encoded_in_another_dtype_than_the_language_model_has():
    model, inputs = tiny.build_model(), {**batch(prompt(9, "what ?")), "pixel_values": pixels(1)}
    expected = model(**inputs).logits
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    found = model(**inputs).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
    model.float()
    model.model.vision_tower.to(torch.bfloat16)
    model.model.multi_modal_projector.to(torch.bfloat16)
    found = model(**inputs).logits
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_embeddings_that_share_a_number_with_the_placeholder_are_none():
    model = tiny.build_model()
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[5:10, :16] = embeddings[tiny.IMAGE_TOKEN_ID, :16]  # of 32 dimensions
    ids = torch.tensor([[1, 5, 6, *[tiny.IMAGE_TOKEN_ID] * 9, 7, 8, 9]])
    found = model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=pixels(1)).logits
    assert torch.equal(found, model(ids, pixel_values=pixels(1)).logits)


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
def test_a_model_in_bfloat16_takes_the_pixels_of_the_processor_as_they_are(vision):
    model = tiny.build_model(vision).to(torch.bfloat16)
    outputs = model(**batch(prompt(9, "?")), pixel_values=pixels(1))
    assert outputs.logits.dtype == outputs.image_hidden_states.dtype == torch.bfloat16
    assert outputs.logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", {"vision_config": "eager", "text_config": "sdpa"}], ids=str)
def test_attention_is_chosen_for_both_parts_or_for_each(implementation, checkpoint, model):
    loaded = DecoForConditionalGeneration.from_pretrained(checkpoint, attn_implementation=implementation)
    chosen = {"vision_config": "eager", "text_config": implementation if isinstance(implementation, str) else "sdpa"}
    for part, name in chosen.items():
        assert getattr(loaded.config, part)._attn_implementation == name
    inputs = {**batch(prompt(9, "?")), "pixel_values": pixels(1)}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


# --- generation ------------------------------------------------------------------------------------------------------


def generate_from_embeddings(model, prompts, images_of, **options):
    """What each prompt generates alone, its features in their places beforehand: `generate` sees no image."""
    answers = []
    for ids, images in zip(prompts, images_of, strict=True):
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        if images:
            is_image = torch.tensor([ids]) == tiny.IMAGE_TOKEN_ID
            embeds[is_image] = torch.cat(model.get_image_features(**images).pooler_output)
        answers.append(model.generate(inputs_embeds=embeds, **options))
    return torch.cat(answers)


SEVERAL_SEQUENCES = {
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"num_return_sequences": 3, "do_sample": True, "top_k": 1},  # of the likeliest token
}


@pytest.mark.parametrize("case", ["several", "different numbers", "none first"])
@pytest.mark.parametrize("mode", SEVERAL_SEQUENCES)
@torch.no_grad()
def test_each_sequence_of_a_prompt_sees_its_own_images(case, mode, model):
    prompts, images, images_of = batch_of(case)
    options = {**GREEDY, **SEVERAL_SEQUENCES[mode]}
    found = model.generate(**batch(*prompts), pixel_values=torch.cat(images), **options)[:, -8:]
    assert torch.equal(found, generate_from_embeddings(model, prompts, images_of, **options))


@pytest.mark.newest
@pytest.mark.parametrize("mode", SEVERAL_SEQUENCES)
@torch.no_grad()
def test_each_sequence_of_a_prompt_sees_its_own_images_at_mixed_grids(mode, model):
    prompts = [prompt(4, "is", 1, "?"), prompt("two", 10, 9, ".")]
    pixel_values, sizes = pixels(4), grids((2, 2), (1, 1), (2, 5), (3, 3))
    options = {**GREEDY, **SEVERAL_SEQUENCES[mode]}
    inputs = {**batch(*prompts), "pixel_values": pixel_values, "pooled_grid_sizes": sizes}
    images_of = [{"pixel_values": pixel_values[part], "pooled_grid_sizes": sizes[part]} for part in ([0, 1], [2, 3])]
    found = model.generate(**inputs, **options)[:, -8:]
    assert torch.equal(found, generate_from_embeddings(model, prompts, images_of, **options))


@pytest.mark.parametrize("mode", SEVERAL_SEQUENCES)
@torch.no_grad()
def test_each_sequence_of_embeddings_sees_its_own_images(mode, model):
    prompts, images, images_of = batch_of("several")
    inputs = {**batch(*prompts), "pixel_values": torch.cat(images)}
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    options = {**GREEDY, **SEVERAL_SEQUENCES[mode]}
    found = model.generate(**inputs, **options)
    assert torch.equal(found, generate_from_embeddings(model, prompts, images_of, **options))


GENERATION_MODES = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.newest
@pytest.mark.skipif(
    not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"), reason="this transformers cuts no images"
)
@pytest.mark.parametrize("chunk_size", [4, 7])
def test_a_prefill_in_chunks_gives_the_greedy_answer(chunk_size, model):
    inputs = {**batch(prompt("what", 9, "is", 9, "?"), prompt("a", 9)), "pixel_values": pixels(3)}
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk_size), expected)


@pytest.mark.parametrize("mode", GENERATION_MODES)
def test_other_modes_of_generation_give_the_greedy_answer(mode, model):
    inputs = {**batch(prompt(9, "is", 9, "?")), "pixel_values": pixels(2)}
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, **GENERATION_MODES[mode]), expected)


@pytest.mark.parametrize("seed", [0, 1], ids=["as the model itself", "as another model"])
def test_an_assistant_changes_nothing_in_the_greedy_answer(seed, model):
    inputs = {**batch(prompt(9, "is", 9, "?")), "pixel_values": pixels(2)}
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=tiny.build_model(seed=seed)), expected)


@pytest.mark.parametrize("mode", ["greedy", "static cache", "beams", "mixed grids"])
def test_the_tower_runs_once_per_generation(mode, model):
    inputs = {**batch(prompt(9, "is", 9, "?")), "pixel_values": pixels(2)}
    inputs |= {
        "greedy": {},
        "static cache": GENERATION_MODES["static cache"],
        "beams": {"num_beams": 2},
        "mixed grids": {"pooled_grid_sizes": grids((3, 3), (3, 3))},
    }[mode]
    assert num_tower_calls(model, lambda: model.generate(**inputs, **GREEDY)) == 1


def test_the_tower_does_not_run_without_images(model):
    assert num_tower_calls(model, lambda: model.generate(**batch(prompt("what is this ?")), **GREEDY)) == 0


@pytest.mark.newest
def test_a_conversation_is_continued_from_its_cache(model):
    first = batch(prompt(9, "what ?"))
    outputs = model.generate(**first, pixel_values=pixels(1), **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([outputs.sequences, torch.tensor([prompt("a red dog ?")[1:]])], dim=1)
    found = model.generate(longer, **{CACHE_NAME: outputs[CACHE_NAME]}, **GREEDY)
    assert torch.equal(found, model.generate(longer, pixel_values=pixels(1), **GREEDY))


# --- training and compilation ----------------------------------------------------------------------------------------


def gradients(model):
    inputs = {**batch(prompt(9, "what ?"), prompt("a", 9)), "pixel_values": pixels(2)}
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.newest
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = tiny.build_model().train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    num_calls = []
    for layer in (model.model.vision_tower.encoder.layers[0], model.model.language_model.layers[0]):
        layer.mlp.register_forward_pre_hook(lambda *_: num_calls.append(1))
    found = gradients(model)
    assert len(num_calls) == 4  # each once more on the way back
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_tower_that_is_trained_in_part_gets_its_gradients_under_reentrant_checkpointing():
    model = tiny.build_model().train()
    model.model.vision_tower.requires_grad_(False)
    trained = model.model.vision_tower.encoder.layers[1].mlp.fc1
    trained.requires_grad_(True)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    found = gradients(model)
    assert expected["model.vision_tower.encoder.layers.1.mlp.fc1.weight"].any()
    for name, gradient in expected.items():
        assert gradient is None or torch.equal(gradient, found[name]), name


def test_every_parameter_that_is_read_gets_a_gradient():
    without = {name for name, gradient in gradients(tiny.build_model().train()).items() if gradient is None}
    assert without == {f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_forward_pass_compiles_to_one_graph_and_stays_compiled(backend):
    """transformers installs the hooks that read hidden states in the first call, which therefore is not compiled."""
    model = tiny.build_model()
    first = {**batch(prompt(9, "what ?"), prompt("a", 9, ".")), "pixel_values": pixels(2)}
    second = {**batch(prompt("the", 9, "?"), prompt(9, "is")), "pixel_values": pixels(2, seed=1)}
    expected = [model(**inputs).logits for inputs in (first, second)]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(compiled(**first).logits, expected[0], rtol=1e-4, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(**second).logits, expected[1], rtol=1e-4, atol=1e-4)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_placeholders", [8, 10])
def test_a_feature_too_many_or_too_few_is_an_error(num_placeholders, model):
    message = (
        "1 image(s) give 9 features (9 per image; the config's grid 3 gives 9), but the text has "
        f"{num_placeholders} placeholders (image_token_id=19)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**batch(prompt(num_placeholders, "?")), pixel_values=pixels(1))


def test_features_that_disagree_are_an_error_in_generation(model):
    with pytest.raises(ValueError, match=r"2 image\(s\) give 18 features \(9, 9 per image; .* 27 placeholders"):
        model.generate(**batch(prompt(9, 9, 9)), pixel_values=pixels(2), **GREEDY)


def test_features_of_mixed_grids_that_disagree_are_named_image_by_image(model):
    message = r"3 image\(s\) give 23 features \(9, 4, 10 per image; the config's grid 3 gives 9\), .* 27 placeholders"
    with pytest.raises(ValueError, match=message):
        model(**batch(prompt(9, 9, 9)), pixel_values=pixels(3), pooled_grid_sizes=grids((3, 3), (2, 2), (2, 5)))


def test_features_that_disagree_with_embeddings_are_an_error(model):
    embeds = model.get_input_embeddings()(torch.tensor([prompt(10)]))
    with pytest.raises(ValueError, match="give 9 features .* 10 placeholders"):
        model(inputs_embeds=embeds, pixel_values=pixels(1))


@pytest.mark.parametrize(
    ("parts", "num_images", "case"),
    [
        (("what ?",), 1, "give 9 features .* 0 placeholders .*: there are none. Write the image token once"),
        (("a", 5, "what ?"), 1, r"1 image\(s\) give 9 features .* 5 placeholders .*: there are too few. Use one"),
        (("a", 9, "what ?"), 2, r"2 image\(s\) give 18 features \(9, 9 per image; .* 9 placeholders .* too few"),
        (("a", 18, "?"), 1, r"1 image\(s\) give 9 features .* 18 placeholders .* too many. Pass every image"),
        (("what ?", 5), 1, "5 placeholders .* too few, and the text ends within an image, so it was truncated"),
    ],
)
def test_features_and_placeholders_that_disagree_say_which_case_it_is(parts, num_images, case, model):
    with pytest.raises(ValueError, match=f"^Image features and image tokens do not match: .*{case}"):
        model(**batch(prompt(*parts)), pixel_values=pixels(num_images))


def test_too_few_placeholders_at_the_start_of_a_text_may_be_another_grids(model):
    ids = batch(prompt(5, "what ?"))["input_ids"][:, 1:]  # no beginning of sequence
    with pytest.raises(ValueError, match="5 placeholders .* too few. Use one .* If the text was truncated"):
        model(input_ids=ids, pixel_values=pixels(1))


def test_images_that_are_in_the_cache_already_are_not_given_again(model):
    first = model(**batch(prompt(9, "what ?")), pixel_values=pixels(1), use_cache=True)
    message = (
        "^Image features and image tokens do not match: .* 0 placeholders .* continue from a cache: an image is passed"
    )
    for arguments in ({CACHE_NAME: first[CACHE_NAME]}, {"past_key_values": first[CACHE_NAME]}):
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([[5, 6]]), pixel_values=pixels(1), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"suppress_tokens": [7]},
        {"generation_config": GenerationConfig(max_new_tokens=8)},
        {"generation_config": GenerationConfig(max_new_tokens=8, suppress_tokens=[7])},
        {"do_sample": True},
        {"num_beams": 2},
    ],
    ids=str,
)
def test_the_image_token_is_never_written(arguments):
    model, ids = tiny.build_model(), torch.tensor([prompt("what is this ?")])
    with torch.no_grad():
        model.lm_head.weight[tiny.IMAGE_TOKEN_ID] = 10 * model.model(ids).last_hidden_state[0, -1]
        model.lm_head.weight[[7, 11]] = model.lm_head.weight[tiny.IMAGE_TOKEN_ID] * torch.tensor([[0.9], [0.8]])
    assert model(ids).logits[0, -1].argmax() == tiny.IMAGE_TOKEN_ID
    model.generation_config.suppress_tokens = [11]
    given = copy.deepcopy(arguments)
    answer = model.generate(ids, **arguments)
    written = set(answer[0, ids.shape[1] :].tolist())
    config = given.get("generation_config") or GenerationConfig()
    assert not written & {tiny.IMAGE_TOKEN_ID, *(given.get("suppress_tokens") or config.suppress_tokens or [11])}
    if "generation_config" in given:  # the caller's own is left as it was
        assert arguments["generation_config"].to_dict() == config.to_dict()
    assert model.generation_config.suppress_tokens == [11]


def test_an_image_without_a_placeholder_is_an_error(model):
    with pytest.raises(ValueError, match="give 9 features .* 0 placeholders"):
        model(**batch(prompt("what ?")), pixel_values=pixels(1))


@pytest.mark.parametrize(("grid", "asked_for"), [((7, 7), "7 x 7"), ((1, 7), "1 x 7"), ((7, 1), "7 x 1")])
def test_a_grid_larger_than_the_patches_is_an_error(grid, asked_for, model):
    with pytest.raises(ValueError, match=f"{asked_for} is larger than the 6 x 6 patches of image 1; "):
        model(**batch(prompt(grid[0] * grid[1])), pixel_values=pixels(1), pooled_grid_sizes=grids(grid))


def test_an_image_smaller_than_the_grid_of_the_config_is_an_error(model):
    with pytest.raises(ValueError, match="3 x 3 is larger than the 2 x 6 patches of the image"):
        model(**batch(prompt(9)), pixel_values=pixels(1, 8, 24))


def test_grids_that_are_not_as_many_as_images_are_an_error(model):
    with pytest.raises(ValueError, match="pooled_grid_sizes has 1 grids for 2 images"):
        model(**batch(prompt(9, 9)), pixel_values=pixels(2), pooled_grid_sizes=grids((3, 3)))


@pytest.mark.parametrize("names", [(), ("input_ids", "inputs_embeds")], ids=["neither", "both"])
def test_ids_and_embeddings_exclude_each_other(names, model):
    inputs = {"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 32)}
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**{name: inputs[name] for name in names})


def test_pixels_and_encoded_images_exclude_each_other(model):
    encoded = {"image": model.get_image_features(pixels(1), return_dict=True)}
    with pytest.raises(ValueError, match="either as pixel_values or as mm_encoder_outputs"):
        model(**batch(prompt(9)), pixel_values=pixels(1), mm_encoder_outputs=encoded)


# --- backbones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", tiny.TEXT_CONFIGS)
@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
def test_every_pair_of_backbones_answers_the_same_after_saving_and_loading(vision, text, tmp_path):
    model = tiny.build_model(vision, text)
    inputs = {**batch(prompt(9, "what ?"), prompt("a", 4)), "pixel_values": pixels(2)}
    inputs["pooled_grid_sizes"] = grids((3, 3), (2, 2))
    model.save_pretrained(tmp_path)
    loaded, report = DecoForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert torch.equal(loaded(**inputs).logits, logits)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("vision", tiny.VISION_CONFIGS)
def test_the_answer_depends_on_the_image(vision):
    model = tiny.build_model(vision)
    logits = [model(**batch(prompt(9, "?")), pixel_values=pixels(1, seed=seed)).logits[0, -1] for seed in (0, 1)]
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_the_base_model_loads_from_the_checkpoint_of_the_whole(checkpoint, model):
    loaded, report = DecoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    inputs = {**batch(prompt(9, "?")), "pixel_values": pixels(1)}
    assert torch.equal(loaded(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
