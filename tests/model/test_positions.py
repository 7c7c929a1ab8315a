# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""With `image_positions="patch"`, pooled tokens have the positions of their patches: which ones, in every mode."""

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny import (
    IMAGE_TOKEN_ID,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    batch,
    build_config,
    build_model,
    build_processor,
    picture,
    pixels,
    prompt,
    randomize,
)
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_deco import DecoConfig, DecoForConditionalGeneration
from modeling_deco.modeling_deco import CACHE_NAME
from modeling_deco.positions import image_offsets, patch_position_ids, places
from modeling_deco.views import one_map

GRIDS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (2, 5), (1, 6)]


def windows(num_patches, num_windows):
    """First and last patch of each window, found by pooling unit vectors."""
    pooled = torch.nn.functional.adaptive_avg_pool1d(torch.eye(num_patches)[None], num_windows)[0]
    return [(weights.nonzero()[0].item(), weights.nonzero()[-1].item()) for weights in pooled.T]


def expected_positions(ids, images, patch_grid=(6, 6)):
    """Positions of one row without padding, token by token."""
    positions, position, images = [], 0, list(images)
    index = 0
    while index < len(ids):
        if ids[index] != IMAGE_TOKEN_ID:
            positions.append(position)
            position, index = position + 1, index + 1
            continue
        grid = images.pop(0)
        rows, cols = (windows(*sides) for sides in zip(patch_grid, grid, strict=True))
        for first_row, last_row in rows:
            for first_col, last_col in cols:
                row, col = (first_row + last_row) // 2, (first_col + last_col) // 2
                positions.append(position + row * patch_grid[1] + col)
        position, index = position + patch_grid[0] * patch_grid[1], index + grid[0] * grid[1]
    assert not images
    return positions


@contextmanager
def seen_positions(model):
    """The `position_ids` of each call of the language model."""
    seen = []

    def hook(module, args, kwargs):
        seen.append(kwargs["position_ids"])

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def model():
    return build_model(image_positions="patch")


def conversation(*grids):
    parts = []
    for number, (rows, cols) in enumerate(grids):
        parts += ["what is" if number else "the", rows * cols]
    return prompt(*parts, "what is this ?")


def test_offsets_are_those_of_the_central_patch_of_each_window():
    for patch_grid in [(6, 6), (24, 24), (7, 9)]:
        for grid in [(1, 1), (2, 2), (3, 3), (5, 4), (6, 6), (7, 9), (5, 7)]:
            if grid[0] > patch_grid[0] or grid[1] > patch_grid[1]:
                continue
            expected = expected_positions([IMAGE_TOKEN_ID] * (grid[0] * grid[1]), [grid], patch_grid)
            offsets = image_offsets(patch_grid, grid)
            assert offsets.tolist() == expected
            assert (offsets.diff() > 0).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_forward_numbers_a_batch_of_unlike_images(model, grid):
    rows = [conversation(grid), conversation(grid, (3, 3), (2, 5)), prompt("what is this ?"), conversation((4, 4))]
    images = [[grid], [grid, (3, 3), (2, 5)], [], [(4, 4)]]
    inputs = batch(*rows)
    grids = torch.tensor([grid for row in images for grid in row])
    with seen_positions(model) as seen, torch.no_grad():
        model(**inputs, pixel_values=pixels(5), pooled_grid_sizes=grids)
    (positions,) = seen
    for row, ids, row_images, mask in zip(positions, rows, images, inputs["attention_mask"], strict=True):
        assert row[mask == 1].tolist() == expected_positions(ids, row_images)
        assert (row[mask == 0] == 0).all()


def test_right_padding_and_placeholders_in_it_take_no_position():
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * 9, 5, 6], [1, 5, 6, *[IMAGE_TOKEN_ID] * 9]])
    mask = torch.tensor([[1] * 12, [1] * 3 + [0] * 9])
    positions = patch_position_ids([places(ids == IMAGE_TOKEN_ID, one_map((6, 6), (3, 3)))], mask)
    assert positions[0].tolist() == expected_positions(ids[0].tolist(), [(3, 3)])
    assert positions[1].tolist() == [0, 1, 2] + [0] * 9


def test_a_mask_of_pairs_counts_what_a_token_attends_to():
    """Two questions about one image that do not see each other have the positions of two samples."""
    image, questions = [IMAGE_TOKEN_ID] * 4, ([5, 6, 7], [8, 9])
    ids = torch.tensor([[1, *image, *questions[0], *questions[1]]])
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[8:, 5:8] = False
    positions = patch_position_ids([places(ids == IMAGE_TOKEN_ID, one_map((6, 6), (2, 2)))], mask[None, None])[
        0
    ].tolist()
    for question, start in zip(questions, (5, 8), strict=True):
        alone = expected_positions([1, *image, *question], [(2, 2)])
        assert positions[:5] == alone[:5]
        assert positions[start : start + len(question)] == alone[5:]


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_other_sizes_of_pictures_have_other_patch_grids(vision):
    model = build_model(vision, image_positions="patch")
    ids = prompt("the", 6, "what ?")
    with seen_positions(model) as seen, torch.no_grad():
        inputs = {"pixel_values": pixels(1, height=32, width=40), "pooled_grid_sizes": torch.tensor([[2, 3]])}
        model(**batch(ids), **inputs)
        model.generate(**batch(ids), **inputs, max_new_tokens=1)
    for positions in seen:
        assert positions[0].tolist() == expected_positions(ids, [(2, 3)], (8, 10))


def test_siglip2_images_have_the_patch_grids_of_their_shapes():
    model = build_model("siglip2", image_positions="patch")
    shapes = torch.tensor([[4, 6], [6, 2]])
    ids = prompt("the", 9, "what", 6, "?")  # the default grid, 3 x 3, cut to 3 x 2 for the second
    inputs = {
        "pixel_values": torch.randn(2, 24, 48),
        "pixel_attention_mask": torch.tensor([[1] * 24, [1] * 12 + [0] * 12]),
        "spatial_shapes": shapes,
    }
    with seen_positions(model) as seen, torch.no_grad():
        model(**batch(ids), **inputs)
        model.generate(**batch(ids), **inputs, max_new_tokens=1)
    first = expected_positions(ids[:11], [(3, 3)], (4, 6))
    rest = expected_positions(ids[11:], [(3, 2)], (6, 2))
    for positions in seen:
        assert positions[0].tolist() == first + [2 + 24 + position for position in rest]


def test_sequence_is_the_numbering_of_the_language_model(model):
    inputs = {**batch(conversation((3, 3))), "pixel_values": pixels(1)}
    with seen_positions(model) as seen, torch.no_grad():
        called = model(**inputs, image_positions="sequence").logits
        model.generate(**inputs, max_new_tokens=2, image_positions="sequence")
    assert seen[0] is None
    assert seen[1].tolist() == [list(range(inputs["input_ids"].shape[1]))]
    other = DecoForConditionalGeneration(build_config(image_positions="sequence")).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, called)
        assert torch.equal(other(**inputs, image_positions="patch").logits, model(**inputs).logits)
        assert not torch.equal(called, model(**inputs).logits)


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_the_patch_grid_has_the_same_logits_either_way(text):
    """So a converted LLaVA is the LLaVA, bit by bit."""
    model = build_model(text=text, pooled_grid_size=6, image_positions="patch")
    inputs = {**batch(prompt("the", 36, "what ?"), prompt(36, "is this ?", 36, "?")), "pixel_values": pixels(3)}
    with torch.no_grad():
        patch, sequence = (model(**inputs, image_positions=name).logits for name in ("patch", "sequence"))
    assert torch.equal(patch, sequence)
    answers = [model.generate(**inputs, max_new_tokens=8, image_positions=name) for name in ("patch", "sequence")]
    assert torch.equal(*answers)


def test_text_alone_is_numbered_as_ever(model):
    inputs = batch(prompt("what is this ?"), prompt("what ?"))
    with seen_positions(model) as seen, torch.no_grad():
        model(**inputs)
    assert seen == [None]


# --- generation ------------------------------------------------------------------------------------------------------

PROMPTS = {
    "one image": [[(3, 3)]],
    "several images": [[(3, 3), (2, 2)]],
    "a batch, padded on the left": [[(2, 2)], [(4, 5), (3, 3)], [], [(6, 6)]],
}
MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "inputs_embeds": {},
}


def prompt_inputs(images):
    inputs = batch(*[conversation(*row) if row else prompt("what is this ?") for row in images])
    grids = [grid for row in images for grid in row]
    return {**inputs, "pixel_values": pixels(len(grids)), "pooled_grid_sizes": torch.tensor(grids)}


def reference(model, inputs, images, num_new):
    """Greedy answers by whole forward passes, each row alone, with the positions of `expected_positions`."""
    answers, number = [], 0
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], images, strict=True):
        ids = ids[mask == 1].tolist()
        pictures = slice(number, number + len(row))
        number += len(row)
        extra = {} if not row else {name: inputs[name][pictures] for name in ("pixel_values", "pooled_grid_sizes")}
        answer = []
        for _ in range(num_new):
            positions = torch.tensor([expected_positions(ids + answer, row)])
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([ids + answer]),
                    attention_mask=torch.ones_like(positions),
                    position_ids=positions,
                    **extra,
                ).logits[0, -1]
            logits[IMAGE_TOKEN_ID] = -torch.inf
            answer.append(logits.argmax().item())
        answers.append(answer)
    return torch.tensor(answers)


@pytest.mark.parametrize("images", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generate_has_these_positions(model, mode, images):
    inputs = prompt_inputs(images)
    if mode == "prompt lookup" and len(images) > 1:
        pytest.skip("transformers does it for one prompt at a time")
    if mode == "chunked prefill" and CACHE_NAME != "cache":
        pytest.skip("transformers before 5.24 loses the images of a prompt in chunks")
    expected = reference(model, inputs, images, 6)
    length = inputs["input_ids"].shape[1]
    if mode == "inputs_embeds":
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = model.get_input_embeddings()(ids)
        length = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **MODES[mode]}
    if mode == "beams":  # a beam of width 1 is greedy; wider ones are compared without a cache
        expected = model.generate(**inputs, **options, use_cache=False)[:, length:]
    assert torch.equal(model.generate(**inputs, **options, do_sample=False)[:, length:], expected)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "beams"])
def test_an_answer_begins_behind_all_patches_of_an_image_that_ends_the_prompt(model, mode):
    """As a caption does in training (the chat template `plain`). Rows that end in text are not changed."""
    if mode == "chunked prefill" and CACHE_NAME != "cache":
        pytest.skip("transformers before 5.24 loses the images of a prompt in chunks")
    rows, images = [prompt("the", 9), conversation((2, 2)), prompt("is", 4, 6)], [[(3, 3)], [(2, 2)], [(2, 2), (1, 6)]]
    if mode == "prompt lookup":  # is for one prompt at a time
        rows, images = rows[-1:], images[-1:]
    grids = torch.tensor([grid for row in images for grid in row])
    inputs = {**batch(*rows), "pixel_values": pixels(len(grids)), "pooled_grid_sizes": grids}
    expected = reference(model, inputs, images, 4)
    with torch.no_grad():  # and in a loop over forward
        cache = model(**inputs, use_cache=True)[CACHE_NAME]
        step = {
            "input_ids": expected[:, :1],
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
            CACHE_NAME: cache,
        }
        with seen_positions(model) as seen:
            model(**step)
    assert seen[0][:, 0].tolist() == [
        expected_positions([*ids, 5], row)[-1] for ids, row in zip(rows, images, strict=True)
    ]
    length = inputs["input_ids"].shape[1]
    if mode == "inputs_embeds":
        inputs["inputs_embeds"], length = model.get_input_embeddings()(inputs.pop("input_ids")), 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **MODES[mode]}
    assert torch.equal(model.generate(**inputs, **options)[:, length:], expected)
    for ids, row in zip(rows, images, strict=True):
        ids, sizes = torch.tensor([ids]), torch.tensor([[24, 24, *grid] for grid in row])
        _, delta = model.model.get_rope_index(ids, sizes)
        assert delta.item() + ids.shape[1] == expected_positions([*ids[0].tolist(), 5], row)[-1]


def test_assisted_decoding_gives_the_same_whatever_assists(model):
    inputs = prompt_inputs([[(3, 3), (2, 4)]])
    expected = reference(model, inputs, [[(3, 3), (2, 4)]], 6)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    text_model = randomize(AutoModelForCausalLM.from_config(AutoConfig.for_model(**TEXT_CONFIGS["llama"])))
    for assistant in (build_model(seed=1, image_positions="patch"), build_model(seed=2), text_model):
        generated = model.generate(**inputs, **options, assistant_model=assistant)
        assert torch.equal(generated[:, inputs["input_ids"].shape[1] :], expected)


def test_a_loop_over_forward_continues_behind_the_span(model):
    """Without position_ids, new tokens go on where the cached ones ended, not at the length of the cache."""
    inputs = prompt_inputs([[(3, 3)], [(2, 2), (2, 2)]])
    expected = reference(model, inputs, [[(3, 3)], [(2, 2), (2, 2)]], 4)
    answer, mask = [], inputs["attention_mask"]
    cache, step = DynamicCache(config=model.config.text_config), inputs
    with torch.no_grad():
        for _ in range(4):
            logits = model(**step, **{CACHE_NAME: cache}, use_cache=True).logits[:, -1]
            logits[:, IMAGE_TOKEN_ID] = -torch.inf
            answer.append(logits.argmax(-1))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            step = {"input_ids": answer[-1][:, None], "attention_mask": mask}
    assert torch.equal(torch.stack(answer, dim=1), expected)


@pytest.mark.parametrize("kept", ["generate", "forward"])
@pytest.mark.parametrize("ids", ["all ids", "new ids"])
def test_a_second_turn_continues_from_the_cache(model, kept, ids):
    """With another image in the second turn, whose pixels alone are passed."""
    first, second = conversation((3, 3)), prompt("is", 4, "red ?")[1:]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    pictures = pixels(2)
    one = {"pixel_values": pictures[:1], "pooled_grid_sizes": torch.tensor([[3, 3]])}
    other = {"pixel_values": pictures[1:], "pooled_grid_sizes": torch.tensor([[2, 2]])}
    with torch.no_grad():
        if kept == "generate":
            result = model.generate(**batch(first), **one, **options, return_dict_in_generate=True)
            cache, history = result[CACHE_NAME], result.sequences[0].tolist()
        else:
            cache, history = model(**batch(first), **one, use_cache=True)[CACHE_NAME], first
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    whole = batch(history + second)
    expected = model.generate(**whole, **both, **options)[:, -5:]
    if ids == "new ids":
        whole["input_ids"] = whole["input_ids"][:, cache.get_seq_length() :]
    continued = model.generate(**whole, **other, **options, **{CACHE_NAME: copy.deepcopy(cache)})
    assert torch.equal(continued[:, -5:], expected)


def test_a_cache_that_is_reset_begins_at_its_first_position(model):
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    inputs = prompt_inputs([[(2, 4)]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, CACHE_NAME: cache}
    first = model.generate(**inputs, **options)
    cache.reset()
    assert torch.equal(model.generate(**inputs, **options), first)
    cache.reset()
    with seen_positions(model) as seen, torch.no_grad():
        model(**inputs)
        model(**inputs, **{CACHE_NAME: cache})
    assert torch.equal(*seen)


@pytest.mark.slow
def test_the_graph_at_a_fixed_grid_is_static(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {**batch(conversation((3, 3)), conversation((3, 3))), "pixel_values": pixels(2)}
    with torch.no_grad():
        expected = model(**inputs).logits  # first: transformers installs its hooks in the first call, under a lock
        torch.testing.assert_close(compiled(**inputs).logits, expected)
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        positions = torch.tensor([expected_positions(inputs["input_ids"][0].tolist(), [(3, 3)])] * 2)
        torch.testing.assert_close(compiled(**inputs, position_ids=positions, **{CACHE_NAME: cache}).logits, expected)


# --- traps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_positions_that_jump_are_not_packed_sequences(attention):
    """Without a mask and a cache, transformers reads a sequence where positions jump as several."""
    model = build_model(image_positions="patch")
    model.set_attn_implementation(attention)
    ids = batch(conversation((2, 2), (3, 3)))
    inputs = {"pixel_values": pixels(2), "pooled_grid_sizes": torch.tensor([[2, 2], [3, 3]])}
    with torch.no_grad():
        logits = [
            model(input_ids=ids["input_ids"], **inputs, use_cache=False).logits,
            model(input_ids=ids["input_ids"], **inputs, use_cache=True).logits,
            model(**ids, **inputs, use_cache=False).logits,
        ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-5)


def test_flash_attention_gets_one_sequence(model, monkeypatch):
    """At batch 1 it would read positions that jump as packed sequences, whatever the mask, up to transformers 5.20."""
    calls = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        calls.append([None if kwargs.get(name) is None else torch.as_tensor(kwargs[name]).tolist() for name in names])
        return query.transpose(1, 2), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_of_this_test", flash)
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation_internal", "flash_of_this_test")
    ids = batch(conversation((2, 2)))
    inputs = {"pixel_values": pixels(1), "pooled_grid_sizes": torch.tensor([[2, 2]])}
    length = ids["input_ids"].shape[1]
    model(**ids, **inputs)
    assert calls == [[[0, length], [0, length], length, length]] * 2  # of two layers
    calls.clear()
    model.generate(**ids, **inputs, max_new_tokens=2, min_new_tokens=2)
    assert calls == [[[0, length], [0, length], length, length]] * 2 + [[None] * 4] * 2


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_positions", ["patch", "sequence"])
def test_an_engine_is_given_the_positions_of_generate(image_positions):
    """vLLM asks the model for the positions of a prompt, from the fields that its Transformers backend passes on."""
    model, processor = build_model(image_positions=image_positions), build_processor()
    pictures = [picture(seed) for seed in range(3)]
    for grids in ([[2, 2], [3, 3], [1, 6]], [[6, 6]] * 3, [[4, 2]] * 3):
        call = {"images": pictures, "pooled_grid_size": grids, "size": {"height": 32, "width": 24}}
        call |= {"text": "what <image> <image> is this <image> ?", "return_tensors": "pt"}
        inputs, for_engine = processor(**call), processor(**call, return_text_replacement_offsets=True)
        with seen_positions(model) as seen:
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        is_image = for_engine["input_ids"] == IMAGE_TOKEN_ID
        positions, delta = model.model.get_rope_index(
            for_engine["input_ids"], for_engine["image_grid_thw"], mm_token_type_ids=is_image.int()
        )
        assert positions.shape == (3, *inputs["input_ids"].shape)
        length = inputs["input_ids"].shape[1]
        generated = [length + step + delta for step in range(2)]
        for expected, row in zip(seen, [positions, *(step.expand(3, 1, 1) for step in generated)], strict=True):
            assert (row == expected).all()
        with torch.no_grad():
            logits = model(**inputs, position_ids=positions).logits
            torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-5)
    text = torch.tensor([prompt("what is this ?")])
    positions, delta = model.model.get_rope_index(text)
    assert positions.tolist() == [[list(range(text.shape[1]))]] * 3
    assert delta.item() == 0


def test_an_engine_that_numbers_tokens_itself_is_refused(model, monkeypatch):
    inputs = {**batch(conversation((3, 3))), "pixel_values": pixels(1)}
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "vllm")
    with pytest.raises(ValueError, match=r"asks the model for positions.*'vllm' numbers tokens.*'sequence'"):
        model(**inputs, position_ids=positions)


def test_only_the_config_of_kept_places_asks_vllm_for_positions(tmp_path):
    for image_positions in ("patch", "sequence"):
        config = build_config(image_positions=image_positions)
        assert isinstance(config.mrope_section, list) == (image_positions == "patch")
        config.save_pretrained(tmp_path)
        assert "mrope" not in (tmp_path / "config.json").read_text()
    config.image_positions = "patch"  # as by vLLM's hf_overrides
    assert config.mrope_section


# --- configuration ---------------------------------------------------------------------------------------------------


def test_a_config_without_the_field_means_sequence(tmp_path):
    config = build_config(image_positions="patch")
    config.save_pretrained(tmp_path)
    assert DecoConfig.from_pretrained(tmp_path).image_positions == "patch"
    assert DecoConfig.from_pretrained(tmp_path, image_positions="sequence").image_positions == "sequence"
    fields = config.to_dict()
    del fields["image_positions"]
    assert DecoConfig(**fields).image_positions == "sequence"


_SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
_SIZES |= {"hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
# learned embeddings, one of which has an offset; a window that is shorter than the image; recurrent layers
OTHER_KINDS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 128},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "gemma3_text": {**_SIZES, "head_dim": 16, "sliding_window": 8},
    "recurrent_gemma": {**_SIZES, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
}


def of_kind(model_type, sizes, image_positions="patch"):
    text = {"model_type": model_type, **sizes}
    config = DecoConfig(
        vision_config=VISION_CONFIGS["clip"],
        text_config=text,
        image_token_id=IMAGE_TOKEN_ID,
        pooled_grid_size=3,
        image_positions=image_positions,
    )
    return randomize(DecoForConditionalGeneration(config))


@pytest.mark.parametrize("model_type", OTHER_KINDS)
def test_other_kinds_of_language_models_have_these_positions(model_type):
    model = of_kind(model_type, OTHER_KINDS[model_type])
    images = [[(2, 4), (3, 3)]]
    inputs = prompt_inputs(images)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    generated = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(generated, reference(model, inputs, images, 3))
    with torch.no_grad():
        logits = [model(**inputs, image_positions=name).logits for name in ("patch", "sequence")]
    assert not torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("jamba", {**_SIZES, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}),
        ("granitemoehybrid", {**_SIZES, **_MAMBA, "layer_types": ["mamba", "attention"]}),
        ("falcon", {**_SIZES, "alibi": True}),
    ],
)
def test_a_language_model_that_ignores_positions_is_refused(model_type, sizes):
    of_kind(model_type, sizes, "sequence")
    with pytest.raises(ValueError, match=rf"has embeddings of them.*'{model_type}'.*'sequence'"):
        of_kind(model_type, sizes)


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="image_positions must be 'patch' or 'sequence', got 'patches'"):
        build_config(image_positions="patches")
    with pytest.raises(ValueError, match=r"needs tokens that have a place in the picture.*'resampler'.*'sequence'"):
        build_config(
            projector_type="resampler",
            projector_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            image_positions="patch",
        )
    bloom = {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    config = DecoConfig(vision_config=VISION_CONFIGS["clip"], text_config=bloom, image_token_id=5, pooled_grid_size=3)
    model = DecoForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.tensor([[1, *[5] * 9, 2]]), "pixel_values": pixels(1)}
    model(**inputs)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"takes position_ids.*'bloom'.*'sequence'"):
            call(**inputs, image_positions="patch")
    config.image_positions = "patch"
    with pytest.raises(ValueError, match=r"takes position_ids.*'bloom'.*'sequence'"):
        DecoForConditionalGeneration(config)
    with pytest.raises(ValueError, match="image_positions must be 'patch' or 'sequence', got 'grid'"):
        model(**inputs, image_positions="grid")
