# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`PromptCache`: what was computed before is not computed again, and answers are those of `generate`."""

from threading import Thread
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, Siglip2ImageProcessorPil
from transformers.generation.streamers import BaseStreamer

from modeling_deco import DecoConfig, DecoForConditionalGeneration, DecoProcessor
from modeling_deco.inference import PromptCache, encode, stream
from modeling_deco.modeling_deco import CACHE_NAME


def build(text="llama", vision="clip", **text_config):
    """A model that answers in words, and what it has run: rows of images, and tokens at each step."""
    config = tiny.build_config(vision, text)
    config.text_config.update(text_config)
    model = tiny.randomize(DecoForConditionalGeneration(config))
    words = range(len(tiny.SPECIAL_TOKENS), tiny.IMAGE_TOKEN_ID)
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCAB_SIZE) if token not in words]
    model.generation_config.max_new_tokens = 6
    return model, watch(model)


def watch(model):
    ran = SimpleNamespace(images=[], tokens=[])
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: ran.images.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.tokens.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return ran


@pytest.fixture(scope="module")
def built():
    return build()


@pytest.fixture
def model(built):
    return built[0]


@pytest.fixture
def ran(built):
    built[1].images, built[1].tokens = [], []
    return built[1]


def user(*content) -> dict:
    """A turn of pictures and texts."""
    kinds = [("text" if isinstance(part, str) else "image", part) for part in content]
    return {"role": "user", "content": [{"type": kind, kind: part} for kind, part in kinds]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def inputs_of(*messages, grid=None, processor=None):
    processor = processor or tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE, patch_size=None)
    return encode(processor, list(messages), grid)


def same(prompts: PromptCache, inputs, **kwargs) -> list[int]:
    """The answer's tokens. They and their scores are those without a cache; only the call with it is counted."""
    expected, expected_scores = with_scores(prompts.model, inputs, **kwargs)
    prompts.ran.images, prompts.ran.tokens = [], []
    found, scores = with_scores(prompts, inputs, **kwargs)
    assert found == expected
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)
    return found[inputs["input_ids"].shape[1] :]


def with_scores(model, inputs, **kwargs):
    scores = []

    def note(input_ids, next_scores):
        scores.append(next_scores)
        return next_scores

    (sequence,) = model.generate(**inputs, **kwargs, logits_processor=LogitsProcessorList([note])).tolist()
    return sequence, torch.stack(scores)


def cache_of(model, ran, *arguments) -> PromptCache:
    prompts = PromptCache(model, *arguments)
    prompts.ran = ran
    return prompts


def say(tokens: list[int]) -> str:
    return " ".join(tiny.WORDS[token - len(tiny.SPECIAL_TOKENS)] for token in tokens)


CAT, DOG = tiny.picture(0), tiny.picture(1)
QUESTION = user(CAT, "what is this ?")


def second_turn(prompts, first=QUESTION, grid=None) -> list[dict]:
    """The conversation up to its second question, after the first answer."""
    answer = same(prompts, inputs_of(first, grid=grid))
    return [first, assistant(say(answer)), user("is this a cat ?")]


# --- what is not run again -------------------------------------------------------------------------------------------


@pytest.mark.newest
@pytest.mark.parametrize(("grid", "num_image_tokens"), [(None, 9), (1, 1), ([2, 4], 8)])
def test_the_next_turn_runs_its_own_tokens_alone_and_no_image(model, ran, grid, num_image_tokens):
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts, grid=grid)
    assert (ran.images, ran.tokens[0]) == ([1], 9 + num_image_tokens)
    same(prompts, inputs_of(*conversation, grid=grid))
    assert (ran.images, ran.tokens[0]) == ([], 10)  # the answer's last token, and nine


@pytest.mark.newest
@pytest.mark.parametrize("text", list(tiny.TEXT_CONFIGS))
def test_a_conversation_of_three_turns_is_the_one_without_a_cache(text):
    model, ran = build(text)
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    answer = same(prompts, inputs_of(*conversation))
    same(prompts, inputs_of(*conversation, assistant(say(answer)), user("what")))
    assert (ran.images, ran.tokens[0]) == ([], 6)


@pytest.mark.parametrize("vision", list(tiny.VISION_CONFIGS))
def test_of_two_images_only_the_new_one_is_encoded(vision):
    model, ran = build(vision=vision)
    prompts = cache_of(model, ran)
    first = user(CAT, "what")
    answer = same(prompts, inputs_of(first, grid=[[2, 3]]))
    same(prompts, inputs_of(first, assistant(say(answer)), user(DOG, "what"), grid=[[2, 3], [3, 2]]))
    assert (ran.images, ran.tokens[0]) == ([1], 1 + 2 + 6 + 1 + 2)


def test_images_of_siglip_2_with_their_own_shapes():
    model, ran = build(vision="siglip2")
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 3, tiny.CHAT_TEMPLATE)
    prompts = cache_of(model, ran)
    first, wide = user(CAT, "what"), tiny.picture(2, 30, 80)
    answer = same(prompts, inputs_of(first, processor=processor))
    inputs = inputs_of(first, assistant(say(answer)), user(wide, "what"), processor=processor)
    assert inputs["spatial_shapes"].tolist()[0] != inputs["spatial_shapes"].tolist()[1]
    same(prompts, inputs)
    assert ran.images == [1]


@pytest.mark.parametrize("name", ["pixel_values", "pixel_attention_mask", "spatial_shapes"])
def test_a_picture_is_the_same_where_each_of_its_tensors_is(name):
    model, ran = build(vision="siglip2")
    image_processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=36)
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), 2, tiny.CHAT_TEMPLATE)
    model.config.pooled_grid_size = 2
    prompts = cache_of(model, ran)
    inputs = inputs_of(user(tiny.picture(2, 30, 80), "what"), processor=processor)
    same(prompts, inputs)
    changed = {
        "pixel_values": inputs["pixel_values"] + 1,
        "pixel_attention_mask": inputs["pixel_attention_mask"] * (torch.arange(36) < 30),
        "spatial_shapes": inputs["spatial_shapes"].flip(1),
    }
    assert not torch.equal(changed[name], inputs[name])
    same(prompts, {**inputs, name: changed[name]})
    assert ran.images == [1]


def test_another_question_about_the_same_picture_runs_no_tower(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(QUESTION))
    same(prompts, inputs_of(user(CAT, "is this the red dog ?")))
    assert (ran.images, ran.tokens[0]) == ([], 8)


def test_the_same_prompt_again_runs_its_last_token_alone(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(QUESTION))
    same(prompts, inputs_of(QUESTION))
    assert (ran.images, ran.tokens[0]) == ([], 1)
    assert prompts.num_bytes == ANSWERED


def test_the_config_s_grid_is_the_same_said_or_not(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(QUESTION))
    same(prompts, inputs_of(QUESTION, grid=3))
    assert ran.images == []


def test_interleaved_conversations_go_on_each_by_itself(model, ran):
    prompts = cache_of(model, ran)
    conversations = [second_turn(prompts, user(picture, "what is this ?")) for picture in (CAT, DOG)]
    for conversation in conversations:
        same(prompts, inputs_of(*conversation))
        assert (ran.images, ran.tokens[0]) == ([], 10)


def test_conversations_that_begin_alike_go_on_each_by_itself(model, ran):
    prompts = cache_of(model, ran)
    start = second_turn(prompts)
    ends = [[*start[:2], user(question)] for question in ("a red cat", "the blue dog")]
    turns = [[*end, assistant(say(same(prompts, inputs_of(*end)))), user("what")] for end in ends]
    for turn in turns:
        same(prompts, inputs_of(*turn))
        assert (ran.images, ran.tokens[0]) == ([], 6)


# --- what is run again -----------------------------------------------------------------------------------------------


def test_another_picture_under_the_same_words_is_encoded(model, ran):
    prompts = cache_of(model, ran)
    seen = same(prompts, inputs_of(QUESTION))
    assert same(prompts, inputs_of(user(DOG, "what is this ?"))) != seen
    assert (ran.images, ran.tokens[0]) == ([1], 18 - 3)


def test_one_pixel_makes_another_picture(model, ran):
    prompts = cache_of(model, ran)
    inputs = inputs_of(QUESTION)
    same(prompts, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][0, 2, -1, -1] += 1e-3
    same(prompts, inputs)
    assert ran.images == [1]


def test_the_same_numbers_in_another_shape_are_another_picture(model, ran):
    prompts = cache_of(model, ran)
    inputs = inputs_of(QUESTION)
    for height, width in ((24, 24), (12, 48)):
        inputs["pixel_values"] = torch.full((1, 3, height, width), 0.5)
        same(prompts, inputs)
        assert ran.images == [1]


def test_another_grid_of_as_many_tokens_is_encoded(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(QUESTION, grid=[2, 4]))
    same(prompts, inputs_of(QUESTION, grid=[4, 2]))
    assert ran.images == [1]


def test_a_picture_after_a_changed_one_is_encoded_too(model, ran):
    prompts = cache_of(model, ran)
    other = tiny.picture(2)
    same(prompts, inputs_of(user(CAT, DOG, "what")))
    same(prompts, inputs_of(user(other, DOG, "what")))
    assert ran.images == [2]
    same(prompts, inputs_of(user(CAT, other, "what")))
    assert (ran.images, ran.tokens[0]) == ([1], 9 + 3)


def test_swapped_pictures_are_not_taken_for_each_other(model, ran):
    prompts = cache_of(model, ran)
    seen = same(prompts, inputs_of(user(CAT, DOG, "what")))
    assert same(prompts, inputs_of(user(DOG, CAT, "what"))) != seen
    assert ran.images == [2]


def test_an_image_at_the_end_of_a_prompt_counts_whole_or_not_at_all(model, ran):
    prompts = cache_of(model, ran)
    inputs = {**tiny.batch(tiny.prompt("what is", 9)), "pixel_values": tiny.pixels(1)}
    same(prompts, inputs)
    same(prompts, inputs)
    assert (ran.images, ran.tokens[0]) == ([1], 9)


def test_an_edited_history_is_run_from_where_it_differs(model, ran):
    prompts = cache_of(model, ran)
    first, _, question = second_turn(prompts)
    same(prompts, inputs_of(first, assistant("a red cat"), question))
    assert ran.images == []
    same(prompts, inputs_of(user(CAT, "what is the dog ?"), assistant("a red cat"), question))
    assert (ran.images, ran.tokens[0]) == ([], 3 + 2 + 3 + 2 + 5 + 2)


def test_texts_without_pictures_are_kept_apart_from_those_with(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(user("what is this ?")))
    same(prompts, inputs_of(QUESTION))
    assert ran.images == [1]
    same(prompts, inputs_of(user("what is a cat")))
    assert (ran.images, ran.tokens[0]) == ([], 4)


def test_a_cleared_cache_has_forgotten(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(QUESTION))
    prompts.clear()
    assert prompts.num_bytes == 0
    same(prompts, inputs_of(QUESTION))
    assert ran.images == [1]


# --- memory ----------------------------------------------------------------------------------------------------------

TOKEN = 2 * 2 * 16 * 4  # bytes: keys and values, 2 layers, 1 head of 16, float32
ANSWERED = (18 + 5) * TOKEN  # QUESTION and its answer, whose last token is not run


def test_bytes_are_those_of_the_keys_and_values(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(QUESTION))
    assert prompts.num_bytes == ANSWERED


def test_a_conversation_that_goes_on_is_kept_once(model, ran):
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    same(prompts, inputs_of(*conversation))
    assert prompts.num_bytes == (33 + 5) * TOKEN


def test_the_longest_unused_conversation_is_forgotten_first(model, ran):
    prompts = cache_of(model, ran, 2 * ANSWERED)
    for seed in (0, 1, 0, 2):
        same(prompts, inputs_of(user(tiny.picture(seed), "what is this ?")))
        assert prompts.num_bytes <= 2 * ANSWERED
    same(prompts, inputs_of(user(tiny.picture(0), "what is this ?")))
    assert ran.images == []
    same(prompts, inputs_of(user(tiny.picture(1), "what is this ?")))
    assert ran.images == [1]


def test_what_is_too_large_to_keep_does_not_push_out_the_others(model, ran):
    prompts = cache_of(model, ran, ANSWERED)
    same(prompts, inputs_of(QUESTION))
    same(prompts, inputs_of(user(DOG, "what is this ? " * 2)))
    same(prompts, inputs_of(QUESTION))
    assert ran.images == []


def test_without_room_nothing_is_kept(model, ran):
    prompts = cache_of(model, ran, 0)
    for _ in range(2):
        same(prompts, inputs_of(QUESTION))
        assert (ran.images, prompts.num_bytes) == ([1], 0)


def test_a_cache_that_generate_leaves_as_views_counts_their_whole_storages(model, monkeypatch):
    generate = type(model).generate

    def leave_views(self, past_key_values=None, cache=None, **inputs):  # as transformers 5.24 does on CUDA
        given = {name: value for name, value in (("past_key_values", past_key_values), ("cache", cache)) if value}
        sequences = generate(self, **inputs, **given)
        next(iter(given.values())).crop(-3)
        return sequences[:, :-3]

    monkeypatch.setattr(type(model), "generate", leave_views)
    prompts = PromptCache(model)
    prompts.generate(**inputs_of(QUESTION))
    assert prompts.num_bytes == ANSWERED  # and not three tokens less


# --- what cannot be continued exactly --------------------------------------------------------------------------------


def test_a_sliding_window_is_continued_until_it_is_filled():
    model, ran = build("mistral", sliding_window=30)
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    answer = same(prompts, inputs_of(*conversation))  # 33 tokens and 6
    assert (ran.images, ran.tokens[0]) == ([], 10)
    same(prompts, inputs_of(*conversation, assistant(say(answer)), user("what")))
    assert (ran.images, ran.tokens[0]) == ([1], 33 + 6 + 5)


def test_a_sliding_window_that_a_prompt_fills_is_not_continued():
    model, ran = build("mistral", sliding_window=8)
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    assert prompts.num_bytes == 0
    same(prompts, inputs_of(*conversation))
    assert ran.images == [1]


def test_sliding_layers_among_others_are_not_continued_beyond_their_window():
    kinds = ["sliding_attention", "full_attention"]
    model, ran = build("qwen2", use_sliding_window=True, sliding_window=12, layer_types=kinds)
    assert [layer.is_sliding for layer in prefilled(model).layers] == [True, False]
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(*second_turn(prompts)))
    assert ran.images == [1]


def prefilled(model):
    return model(**inputs_of(QUESTION), use_cache=True)[CACHE_NAME]


SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {"model_type": "falcon_h1", "head_dim": 16, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_state": 8},
    ],
    ids=lambda text: text["model_type"],
)
def test_layers_with_a_state_are_not_continued(text):
    text = {**{name: tiny.TEXT_CONFIGS["qwen2"][name] for name in SHARED}, "num_key_value_heads": 1, **text}
    config = DecoConfig(
        vision_config=tiny.VISION_CONFIGS["clip"],
        text_config=text,
        image_token_id=tiny.IMAGE_TOKEN_ID,
        pooled_grid_size=3,
    )
    model = tiny.randomize(DecoForConditionalGeneration(config))
    prompts = cache_of(model, watch(model))
    for _ in range(2):
        same(prompts, inputs_of(QUESTION), max_new_tokens=5)
        assert (prompts.ran.images, prompts.num_bytes) == ([1], 0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 24,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_that_depend_on_the_length_are_not_continued(rope):
    model, _ = build("llama", rope_parameters=rope, max_position_embeddings=24)
    prompts = PromptCache(model)
    prompts.generate(**inputs_of(QUESTION))
    assert prompts.num_bytes == 0


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": True},
    ],
    ids=lambda how: next(iter(how)),
)
@pytest.mark.parametrize("is_default", [False, True])
def test_other_ways_to_generate_are_left_alone(built, how, is_default, monkeypatch):
    model, _ = built
    config = GenerationConfig(**{**model.generation_config.to_diff_dict(), **how})
    if is_default:
        monkeypatch.setattr(model, "generation_config", config)
    prompts = PromptCache(model)
    kwargs = {} if is_default else {"generation_config": config}
    inputs = inputs_of(QUESTION)
    for _ in range(2):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **kwargs)
        torch.manual_seed(0)
        found = prompts.generate(**inputs, **kwargs)
        if "return_dict_in_generate" in how:
            expected, found = expected.sequences, found.sequences
        assert (found.tolist(), prompts.num_bytes) == (expected.tolist(), 0)


def test_a_way_to_generate_that_is_an_argument_is_left_alone(model, ran):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(QUESTION), num_beams=2)
    assert prompts.num_bytes == 0


def test_a_batch_is_left_alone(model):
    prompts = PromptCache(model)
    inputs = tiny.batch(tiny.prompt("what"), tiny.prompt("is this"))
    expected = model.generate(**inputs)
    assert (prompts.generate(**inputs).tolist(), prompts.num_bytes) == (expected.tolist(), 0)


@pytest.mark.newest
@pytest.mark.parametrize(
    "how", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=lambda how: next(iter(how))
)
def test_the_models_own_way_to_generate_counts_where_a_request_does_not_say(built, how, monkeypatch):
    model, _ = built
    config = GenerationConfig(**{**model.generation_config.to_diff_dict(), **how})
    monkeypatch.setattr(model, "generation_config", config)
    asked = GenerationConfig(max_new_tokens=4)
    prompts, inputs = PromptCache(model), inputs_of(QUESTION)
    expected = model.generate(**inputs, generation_config=asked)
    assert prompts.generate(**inputs, generation_config=asked).tolist() == expected.tolist()
    assert prompts.num_bytes == 0


@pytest.mark.parametrize(
    "argument",
    [
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        {"position_ids": torch.arange(3, 9)[None]},
        {"inputs_embeds": torch.ones(1, 6, 32)},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_what_changes_a_prompt_beside_its_ids_and_images_is_left_alone(model, ran, argument):
    prompts = cache_of(model, ran)
    plain = {"input_ids": torch.tensor([[1, 1, 5, 6, 7, 8]])}
    same(prompts, plain)
    num_bytes = prompts.num_bytes
    same(prompts, {**plain, **argument})
    assert (prompts.num_bytes, ran.tokens[0]) == (num_bytes, 6)
    same(prompts, plain)
    assert ran.tokens[0] == 1


def test_a_prompt_of_embeddings_alone_is_left_alone(model):
    inputs = {"inputs_embeds": torch.ones(1, 4, 32)}
    assert PromptCache(model).generate(**inputs).tolist() == model.generate(**inputs).tolist()


def test_a_cache_of_the_caller_is_left_alone(model):
    inputs = inputs_of(QUESTION)
    found = PromptCache(model).generate(**inputs, **{CACHE_NAME: DynamicCache()})
    assert found.tolist() == model.generate(**inputs).tolist()


def test_an_assistant_model_is_left_alone(model):
    inputs, prompts = inputs_of(user("what is this ?")), PromptCache(model)
    expected = model.generate(**inputs, assistant_model=model)
    assert (prompts.generate(**inputs, assistant_model=model).tolist(), prompts.num_bytes) == (expected.tolist(), 0)


def test_sampling_draws_as_it_does_without_a_cache(model, ran):
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    inputs, drawn = inputs_of(*conversation), set()
    for seed in range(5):
        torch.manual_seed(seed)
        expected = model.generate(**inputs, do_sample=True)
        torch.manual_seed(seed)
        assert prompts.generate(**inputs, do_sample=True).tolist() == expected.tolist()
        drawn.add(tuple(expected[0].tolist()))
    assert len(drawn) > 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


class Leaves(BaseStreamer):
    """A client that hangs up after so many pieces, of which the first is the prompt."""

    def __init__(self, after: int):
        self.left = after

    def put(self, value):
        if self.left == 0:
            raise ConnectionError("left")
        self.left -= 1

    def end(self):
        pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_answer_that_is_broken_off_leaves_its_prompt(model, ran, after):
    prompts = cache_of(model, ran)
    conversation = [QUESTION, assistant("a cat"), user("what is this ?")]
    with pytest.raises(ConnectionError, match="left"):
        prompts.generate(**inputs_of(QUESTION), streamer=Leaves(after))
    same(prompts, inputs_of(*conversation))
    assert ran.images == ([1] if after == 0 else [])


def test_a_broken_answer_leaves_the_conversation_as_it_was(model, ran):
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    with pytest.raises(ConnectionError, match="left"):
        prompts.generate(**inputs_of(*conversation), streamer=Leaves(0))
    same(prompts, inputs_of(*conversation))
    assert (ran.images, ran.tokens[0]) == ([], 10)
    assert prompts.num_bytes == (33 + 5) * TOKEN


@pytest.mark.parametrize("where", ["layers.0.mlp", "layers.1.self_attn.o_proj", "layers.1.mlp", "norm"])
@pytest.mark.parametrize("step", [0, 2])
def test_an_error_in_the_middle_of_a_step_leaves_nothing_half_done(model, ran, where, step):
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    steps = []

    def fail(module, args):
        steps.append(module)
        if len(steps) == step + 1:
            raise RuntimeError("broken")

    hook = model.model.language_model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        prompts.generate(**inputs_of(*conversation))
    hook.remove()
    same(prompts, inputs_of(*conversation))
    same(prompts, inputs_of(QUESTION))


def test_values_that_are_missing_under_their_keys_are_not_kept(model, ran, monkeypatch):
    prompts = cache_of(model, ran)
    cat, num_calls = torch.cat, [0]

    def fail(tensors, dim=0):
        num_calls[0] += dim == -2
        if num_calls[0] == 4:  # keys and values of two layers: the very last
            raise RuntimeError("broken")
        return cat(tensors, dim)

    monkeypatch.setattr(torch, "cat", fail)
    with pytest.raises(RuntimeError, match="broken"):
        prompts.generate(**inputs_of(QUESTION))
    monkeypatch.undo()
    assert prompts.num_bytes == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory: 1 byte")])
def test_a_lack_of_memory_frees_what_was_kept(model, ran, error):
    prompts = cache_of(model, ran)
    same(prompts, inputs_of(user(DOG, "what")))
    conversation = second_turn(prompts)

    def fail(module, args):
        raise error

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        prompts.generate(**inputs_of(*conversation))
    hook.remove()
    assert prompts.num_bytes == 0
    same(prompts, inputs_of(*conversation))


@pytest.mark.parametrize("num_placeholders", [0, 8])
def test_placeholders_that_do_not_fit_are_the_model_s_error(model, num_placeholders):
    inputs = {**tiny.batch(tiny.prompt("what", num_placeholders)), "pixel_values": tiny.pixels(1)}
    with pytest.raises(ValueError, match=rf"9 features .* but the text has {num_placeholders} placeholders"):
        PromptCache(model).generate(**inputs)


def test_grids_that_are_not_one_per_image_are_the_model_s_error(model):
    inputs = {**tiny.batch(tiny.prompt("what", 9)), "pixel_values": tiny.pixels(1)}
    inputs["pooled_grid_sizes"] = torch.tensor([[2, 2], [1, 5]])
    with pytest.raises(ValueError, match="pooled_grid_sizes has 2 grids for 1 images"):
        PromptCache(model).generate(**inputs)


def test_a_grid_that_is_too_large_is_the_model_s_error_and_the_conversation_goes_on(model, ran):
    prompts = cache_of(model, ran)
    conversation = second_turn(prompts)
    with pytest.raises(ValueError, match=r"7 x 7 is larger than the 6 x 6"):
        prompts.generate(**inputs_of(*conversation, user(DOG, "what"), grid=[[3, 3], [7, 7]]))
    same(prompts, inputs_of(*conversation))
    assert ran.images == []


def test_threads_may_share_it(model):
    prompts = PromptCache(model, 2 * ANSWERED)
    questions = [inputs_of(user(tiny.picture(seed), "what is this ?")) for seed in range(4)]
    expected = [model.generate(**inputs).tolist() for inputs in questions]
    found = {}

    def ask(number):
        for repeat in range(5):
            index = (number + repeat) % 4
            found[number, index] = prompts.generate(**questions[index]).tolist()

    threads = [Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert all(answer == expected[index] for (_, index), answer in found.items())


def test_entries_change_under_the_lock_alone(model):
    prompts, unlocked = PromptCache(model, 2 * ANSWERED), []

    class Entries(list):
        def change(self, method, *arguments):
            if not prompts._lock.locked():
                unlocked.append(method)
            return getattr(list, method)(self, *arguments)

        def append(self, entry):
            return self.change("append", entry)

        def remove(self, entry):
            return self.change("remove", entry)

        def __delitem__(self, index):
            return self.change("__delitem__", index)

    prompts._entries = Entries()
    for picture in (CAT, DOG, tiny.picture(2), tiny.picture(2)):  # the third evicts, the fourth replaces
        prompts.generate(**inputs_of(user(picture, "what is this ?")))
    assert (len(prompts._entries), unlocked) == (2, [])

    class Watched(PromptCache):
        def __setattr__(self, name, value):
            if not self._lock.locked():
                unlocked.append(name)
            super().__setattr__(name, value)

    prompts.__class__ = Watched
    prompts.clear()
    assert (prompts.num_bytes, unlocked) == (0, [])


def test_a_stream_takes_a_cache(model, ran):
    processor = tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)
    prompts = cache_of(model, ran)
    plain = list(stream(model, processor, [QUESTION], max_new_tokens=5))
    assert list(stream(model, processor, [QUESTION], max_new_tokens=5, prompt_cache=prompts)) == plain
    ran.images = []
    assert list(stream(model, processor, [QUESTION], max_new_tokens=5, prompt_cache=prompts)) == plain
    assert ran.images == []


def test_a_stream_that_is_closed_leaves_what_it_has_run(model, ran):
    processor = tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE)
    prompts = cache_of(model, ran)
    pieces = stream(model, processor, [QUESTION], max_new_tokens=10_000, prompt_cache=prompts)
    said = next(pieces)
    pieces.close()
    same(prompts, inputs_of(QUESTION, assistant(said.strip()), user("what")))
    assert (ran.images, ran.tokens[0]) == ([], 5)
