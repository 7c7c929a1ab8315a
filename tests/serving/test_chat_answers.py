# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers over HTTP: their text, length, sampling, and what a request can choose."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from asking import (
    COLOUR_ANSWER,
    COLOUR_QUESTION,
    NAME,
    PICTURE,
    SCENE,
    about,
    answer,
    ask,
    client,
    data_url,
    post,
    sent,
    wait_until,
    wait_until_still,
)

from modeling_deco.inference.generation import encode, stream
from modeling_deco.serving import ServerOptions, build_app
from modeling_deco.worlds.digits.scenes import render


def test_a_question_about_a_data_url_is_answered(port):
    result = ask(port, about(PICTURE, question=COLOUR_QUESTION))
    assert result.choices[0].message.content == COLOUR_ANSWER
    assert (result.model, result.choices[0].finish_reason) == (NAME, "stop")
    fields = {"n": 1, "user": "me", "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert ask(port, about(PICTURE, question=COLOUR_QUESTION), **fields).choices == result.choices


@pytest.mark.newest
def test_text_alone_is_answered_as_by_the_model_itself(port, shipped):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Is there a 7?"}]}]
    assert answer(port, "Is there a 7?", max_tokens=8) == "".join(stream(*shipped, messages, max_new_tokens=8))


def test_models_and_health(port):
    with client(port) as asking:
        assert [model.id for model in asking.models.list()] == [NAME]
        assert asking.models.retrieve(NAME).id == NAME
        with pytest.raises(openai.NotFoundError, match='"gpt" is not served here; use "deco-digits"'):
            asking.models.retrieve("gpt")
    assert post(port, None, "GET", "/health")[::2] == (200, {"status": "ok"})


# --- token budgets ---------------------------------------------------------------------------------------------------


def num_prompt_tokens(port, messages, **fields) -> int:
    return ask(port, messages, max_tokens=1, **fields).usage.prompt_tokens


def test_a_request_chooses_its_grids(port):
    default = num_prompt_tokens(port, about(PICTURE))
    for extra_body in (
        {"pooled_grid_size": [3, 4]},
        {"mm_processor_kwargs": {"pooled_grid_size": [3, 4]}},
        {"pooled_grid_size": [3, 4], "mm_processor_kwargs": {"pooled_grid_size": [3, 4]}},
        {"pooled_grid_size": [3, 4], "mm_processor_kwargs": {}},
    ):
        assert default - num_prompt_tokens(port, about(PICTURE), extra_body=extra_body) == 36 - 12
    assert num_prompt_tokens(port, about(PICTURE, PICTURE)) == default + 36
    grids = {"pooled_grid_size": [[3, 3], [4, 5]]}
    assert num_prompt_tokens(port, about(PICTURE, PICTURE), extra_body=grids) == default - 36 + 9 + 20
    chosen = answer(port, about(PICTURE, question=COLOUR_QUESTION), extra_body={"pooled_grid_size": [3, 4]})
    assert chosen == COLOUR_ANSWER


def test_the_servers_grid_is_the_default(start, port):
    limited = start(pooled_grid_size=[3, 4])
    of_the_checkpoint = num_prompt_tokens(port, about(PICTURE))
    assert of_the_checkpoint - num_prompt_tokens(limited, about(PICTURE)) == 36 - 12
    own = num_prompt_tokens(limited, about(PICTURE), extra_body={"pooled_grid_size": 5})
    assert of_the_checkpoint - own == 36 - 25


@pytest.mark.parametrize(("grid", "message"), [(13, "13 x 13.*12 x 12"), ("6", "positive int"), (0, "positive int")])
def test_a_grid_that_does_not_fit_the_model_is_refused_at_start(shipped, grid, message):
    with pytest.raises(ValueError, match=message):
        build_app(*shipped, NAME, ServerOptions(pooled_grid_size=grid))


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.newest
def test_a_stream_is_the_answer_in_pieces(port):
    messages = about(PICTURE, question=COLOUR_QUESTION)
    first, *pieces, last = ask(port, messages, stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces) == COLOUR_ANSWER
    assert len(pieces) > 1
    assert last.choices[0].finish_reason == "stop"
    *chunks, last = ask(port, messages, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], ask(port, messages).usage)
    assert {chunk.usage for chunk in chunks} == {None}


def test_a_stream_ends_with_done(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"messages": about(PICTURE), "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(port, streamed):
    assert COLOUR_ANSWER == "7 white."
    messages = about(PICTURE, question=COLOUR_QUESTION)
    for stop, expected in [
        (".", "7 white"),
        (["zz", "hit"], "7 w"),
        ("e.", "7 whit"),
        ("te. ", "7 white."),
        ("7", ""),
        (["hit", "w"], "7 "),
    ]:
        if streamed:
            chunks = ask(port, messages, stop=stop, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        else:
            assert answer(port, messages, stop=stop) == expected


# --- length ----------------------------------------------------------------------------------------------------------


def test_usage_counts_the_models_tokens(start, steps):
    usage = ask(start(prompt_cache_bytes=0), about(PICTURE), max_tokens=5).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (steps[0], len(steps))
    assert usage.total_tokens == steps[0] + 5


def test_max_tokens_limits_an_answer(start, port, steps):
    for fields, length in [
        ({"max_tokens": 2}, 2),
        ({"max_completion_tokens": 2, "max_tokens": 5}, 2),
        ({"max_completion_tokens": 5, "max_tokens": 2}, 5),
    ]:
        result = ask(port, about(PICTURE), **fields)
        assert (result.usage.completion_tokens, result.choices[0].finish_reason) == (length, "length")
    result = ask(start(max_new_tokens=3), about(PICTURE))
    assert (result.usage.completion_tokens, result.choices[0].finish_reason) == (3, "length")


def test_an_answer_that_ends_at_max_tokens_is_whole(port):
    whole = ask(port, about(PICTURE))
    limited = ask(port, about(PICTURE), max_completion_tokens=whole.usage.completion_tokens)
    assert limited.choices == whole.choices


def test_the_context_limits_prompt_and_answer(port, shipped, steps):
    result = ask(port, "why " * 1012)
    assert (result.choices[0].finish_reason, result.usage.total_tokens) == ("length", 1024)
    room = shipped[0].config.text_config.max_position_embeddings - result.usage.prompt_tokens
    assert ask(port, "why " * 1012, max_tokens=room).usage.completion_tokens == room
    with pytest.raises(openai.BadRequestError, match=f"and {room + 1} of the answer do not fit .* 1024 tokens"):
        ask(port, "why " * 1012, max_tokens=room + 1)


# --- sampling --------------------------------------------------------------------------------------------------------


def sample(port, **fields) -> str:
    return answer(port, "Where?", max_tokens=20, **fields)


@pytest.mark.parametrize("how", [{"temperature": 1.5}, {"top_p": 0.999}])
def test_a_seed_determines_what_is_sampled(port, how):
    assert sample(port, seed=0, **how) == sample(port, seed=0, **how)
    assert len({sample(port, seed=seed, **how) for seed in range(4)}) > 1


def test_a_seed_does_not_determine_later_requests(port):
    samples = set()
    for _ in range(4):
        sample(port, temperature=1.5, seed=1)
        samples.add(sample(port, temperature=1.5))
    assert len(samples) > 1


def test_no_temperature_or_top_p_is_greedy(port):
    likeliest = sample(port, temperature=0)
    assert sample(port, temperature=1e-40) == likeliest
    for seed in range(3):
        assert sample(port, temperature=1.5, top_p=1e-6, seed=seed) == likeliest


def test_the_servers_sampling_is_the_default(start, port):
    sampling = start(temperature=1.5, seed=3)
    assert sample(sampling) == sample(port, temperature=1.5, seed=3)
    for seed in (0, 4):  # 0 is a seed too
        assert sample(sampling, seed=seed) == sample(port, temperature=1.5, seed=seed)
    assert sample(sampling, temperature=0) == sample(port, temperature=0)


# --- conversations ---------------------------------------------------------------------------------------------------


def test_the_servers_system_message_is_the_default(start, port, shipped):
    def conversation(*contents):
        roles = ["user", "system"]
        return [{"role": roles.pop(), "content": content} for content in contents]

    instructed = start(system="Read the digits.")
    messages = [{"role": "system", "content": "Read the digits."}, {"role": "user", "content": "Is there a 7?"}]
    expected = shipped[1].tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert num_prompt_tokens(port, messages) == num_prompt_tokens(instructed, "Is there a 7?") == len(expected)
    messages = [{"role": "system", "content": "?"}, {"role": "user", "content": "Is there a 7?"}]
    assert num_prompt_tokens(instructed, messages) == num_prompt_tokens(port, messages)


def test_a_developer_message_becomes_a_system_message(port, monkeypatch):
    roles = []

    def note(processor, messages, grid):
        roles.extend(message["role"] for message in messages)
        return encode(processor, messages, grid)

    monkeypatch.setattr("modeling_deco.serving.chat.encode", note)
    ask(port, [{"role": "developer", "content": "Read the digits."}, {"role": "user", "content": "Is there a 7?"}])
    assert roles == ["system", "user"]


def test_a_conversation_continues(port):
    messages = about(PICTURE, question=COLOUR_QUESTION)
    first = ask(port, messages)
    digit = SCENE.digits[1]
    messages += [
        first.choices[0].message,  # as the client gives it
        {"role": "user", "content": f"What colour is the {digit.value}?"},
    ]
    second = ask(port, messages)
    assert second.choices[0].message.content == f"{digit.value} {digit.colour}."
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_concurrent_requests_get_their_own_answers(port):
    scenes = [render("test", index=index, seed=2026, min_digits=4) for index in range(8)]

    def ask_about(scene):
        digit = scene.digits[-1]
        return answer(port, about(data_url(scene.image), question=f"What colour is the {digit.value}?"))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask_about, scenes))
    assert answers == [f"{scene.digits[-1].value} {scene.digits[-1].colour}." for scene in scenes]


# --- the prompt cache ------------------------------------------------------------------------------------------------


@pytest.mark.newest
def test_the_next_turn_does_not_encode_its_image_again(start, steps, looks):
    port = start()
    messages = about(PICTURE, question=COLOUR_QUESTION)
    first = ask(port, messages, max_tokens=4)
    messages += [first.choices[0].message, {"role": "user", "content": "Is there a 7?"}]
    del steps[:], looks[:]
    second = ask(port, messages, max_tokens=4)
    assert (looks, steps[0]) == ([], second.usage.prompt_tokens - (first.usage.total_tokens - 1))
    assert second.choices == ask(start(prompt_cache_bytes=0), messages, max_tokens=4).choices


def test_alternating_conversations_keep_their_images(start, looks):
    port = start()
    scenes = [render("test", index=index, seed=2026, min_digits=4) for index in range(3)]
    conversations = [about(data_url(scene.image), question="Read the digits.") for scene in scenes]
    for messages in conversations:
        messages += [
            {"role": "assistant", "content": answer(port, messages)},
            {"role": "user", "content": "What colour is the 0?"},
        ]
    for scene, messages in zip(scenes, conversations, strict=True):
        digit = scene.digits[-1]
        messages[-1]["content"] = f"What colour is the {digit.value}?"
        assert answer(port, messages) == f"{digit.value} {digit.colour}."
    assert len(looks) == 3


def test_the_prompt_of_a_disconnected_client_is_kept(start, steps, looks):
    port = start()
    with sent(port, about(PICTURE)):
        wait_until(lambda: len(steps) > 3)
    wait_until_still(steps)
    num_steps = len(steps)
    again = ask(port, about(PICTURE), max_tokens=5)
    assert (looks, steps[num_steps]) == ([1], 1)
    assert again.choices == ask(start(prompt_cache_bytes=0), about(PICTURE), max_tokens=5).choices


def test_an_answer_that_a_stop_string_ended_is_kept(start, looks):
    port = start()
    messages = about(PICTURE, question=COLOUR_QUESTION)
    messages += [
        {"role": "assistant", "content": answer(port, messages, stop=".")},
        {"role": "user", "content": COLOUR_QUESTION},
    ]
    assert (answer(port, messages), looks) == (COLOUR_ANSWER, [1])


@pytest.mark.parametrize("prompt_cache_bytes", [0, 2**30])
def test_the_images_of_a_request_are_encoded_once(start, looks, prompt_cache_bytes):
    port = start(prompt_cache_bytes=prompt_cache_bytes)
    for index, fields in enumerate(({}, {"stream": True}, {"stop": "e."}, {"temperature": 1.0, "seed": 1})):
        pictures = [data_url(render("test", index=2 * index + k, seed=2026).image) for k in range(2)]
        del looks[:]
        ask(port, about(*pictures), **fields)
        assert len(looks) == 1  # for both together
    ask(port, about(*pictures))
    assert len(looks) == (2 if prompt_cache_bytes == 0 else 1)
