# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The server, asked by OpenAI's own client over real sockets, and by what does worse than that."""

import asyncio
import base64
import errno
import http.client
import importlib
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import SimpleNamespace

import openai
import pytest
import pytest_socket
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_picture_reader import progressive_bomb
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.cli import app
from modeling_deco.inference import images
from modeling_deco.inference.generation import encode, load, stream
from modeling_deco.inference.images import ImageLimits
from modeling_deco.serving.app import Server, ServerOptions, _Answer, build_app, serve
from modeling_deco.worlds.digits.scenes import render

NAME = "deco-digits"


@pytest.fixture(scope="module")
def shipped():
    return load(str(SHIPPED_CHECKPOINT))


def allow_loopback():
    pytest_socket.enable_socket()
    pytest_socket.socket_allow_hosts(["127.0.0.1", "127.0.0.2"], allow_unix_socket=True)


@pytest.fixture(autouse=True)
def loopback():
    allow_loopback()
    yield
    pytest_socket._remove_restrictions()


@contextmanager
def running(application, options=ServerOptions()):  # noqa: B008  frozen
    """The application's port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(application, options)
        server.config.timeout_graceful_shutdown = 1
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def start(shipped):
    """`start(option=...)` is the port of a server with that option."""
    with ExitStack() as stack:
        yield lambda hosts=None, **options: stack.enter_context(
            running(build_app(*shipped, NAME, ServerOptions(**options), hosts), ServerOptions(**options))
        )


@pytest.fixture(scope="module")
def port(shipped):
    """Of a server as it is by default."""
    allow_loopback()
    with running(build_app(*shipped, NAME)) as number:
        yield number


@pytest.fixture
def steps(shipped, monkeypatch):
    """The model never ends an answer by itself and takes its time; the list grows by one for each step, by the length
    of the text that goes into the model there."""
    lengths = []

    def note(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        time.sleep(0.02)

    model = shipped[0]
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [model.generation_config.eos_token_id])
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield lengths
    hook.remove()


def client(port: int, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", **{"api_key": "-", "max_retries": 0, **options})


def ask(port: int, messages: list[dict] | str, timeout: float = 60, **fields):
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    with client(port) as asking:
        result = asking.chat.completions.create(model=NAME, messages=messages, timeout=timeout, **fields)
        return list(result) if fields.get("stream") else result


def answer(port: int, messages, **fields) -> str:
    return ask(port, messages, **fields).choices[0].message.content


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def about(*urls: str, question: str = "How many digits are there?") -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def post(port: int, body, method="POST", path="/v1/chat/completions", **headers):
    """Status, headers and JSON of an answer, without OpenAI's client."""
    headers = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, json.loads(content)


def sent(port: int, messages: list[dict], **fields) -> socket.socket:
    """The connection over which a request was sent, and nothing is read."""
    body = json.dumps({"messages": messages, **fields})
    head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}{body}".encode())
    return connection


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_it_stands_still(steps: list[int]) -> None:
    number = None
    while number != len(steps):
        number = len(steps)
        time.sleep(0.2)  # ten steps


SCENE = render("test", index=10, seed=2026, min_digits=4)
PICTURE = data_url(SCENE.image)
DIGIT = SCENE.digits[0]
COLOUR_QUESTION = f"What colour is the {DIGIT.value}?"
COLOUR_ANSWER = f"{DIGIT.value} {DIGIT.colour}."


# --- answers ---------------------------------------------------------------------------------------------------------


def test_a_picture_in_a_data_url_is_answered_about(port):
    result = ask(port, about(PICTURE, question=COLOUR_QUESTION))
    assert result.choices[0].message.content == COLOUR_ANSWER
    assert (result.model, result.choices[0].finish_reason) == (NAME, "stop")


@pytest.mark.newest
def test_text_alone_is_answered_as_by_the_model_itself(port, shipped):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Is there a 7?"}]}]
    assert answer(port, "Is there a 7?", max_tokens=8) == "".join(stream(*shipped, messages, max_new_tokens=8))


@pytest.mark.parametrize(
    "extra_body",
    [
        {"pooled_grid_size": [3, 4]},
        {"mm_processor_kwargs": {"pooled_grid_size": [3, 4]}},
        {"pooled_grid_size": [3, 4], "mm_processor_kwargs": {"pooled_grid_size": [3, 4]}},
        {"pooled_grid_size": [3, 4], "mm_processor_kwargs": {}},
    ],
)
def test_a_request_chooses_its_grid(port, extra_body):
    messages = about(PICTURE, question=COLOUR_QUESTION)
    default, chosen = ask(port, messages), ask(port, messages, extra_body=extra_body)
    assert chosen.choices[0].message.content == COLOUR_ANSWER
    assert default.usage.prompt_tokens - chosen.usage.prompt_tokens == 36 - 12


def test_usage_counts_what_went_into_the_model_and_came_out(start, steps):
    usage = ask(start(prompt_cache_bytes=0), about(PICTURE), max_tokens=5).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (steps[0], len(steps))
    assert usage.total_tokens == steps[0] + 5


@pytest.mark.newest
def test_a_stream_is_the_answer_in_pieces(port):
    messages = about(PICTURE, question=COLOUR_QUESTION)
    first, *pieces, last = ask(port, messages, stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces) == COLOUR_ANSWER
    assert len(pieces) > 1
    assert last.choices[0].finish_reason == "stop"


def test_a_stream_ends_with_usage_where_that_is_asked_for(port):
    messages = about(PICTURE)
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


def test_eight_at_once_are_all_answered_right(port):
    scenes = [render("test", index=index, seed=2026, min_digits=4) for index in range(8)]

    def ask_about(scene):
        digit = scene.digits[-1]
        return answer(port, about(data_url(scene.image), question=f"What colour is the {digit.value}?"))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask_about, scenes))
    assert answers == [f"{scene.digits[-1].value} {scene.digits[-1].colour}." for scene in scenes]


def test_a_conversation_goes_on(port):
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


@pytest.fixture
def looks(shipped):
    """Grows by one each time that the vision tower runs."""
    calls = []
    hook = shipped[0].model.vision_tower.register_forward_pre_hook(lambda module, args: calls.append(1))
    yield calls
    hook.remove()


@pytest.mark.newest
def test_the_next_request_of_a_conversation_does_not_look_again(start, steps, looks):
    port = start()
    messages = about(PICTURE, question=COLOUR_QUESTION)
    first = ask(port, messages, max_tokens=4)
    messages += [first.choices[0].message, {"role": "user", "content": "Is there a 7?"}]
    del steps[:], looks[:]
    second = ask(port, messages, max_tokens=4)
    assert (looks, steps[0]) == ([], second.usage.prompt_tokens - (first.usage.total_tokens - 1))
    assert second.choices == ask(start(prompt_cache_bytes=0), messages, max_tokens=4).choices


def test_conversations_in_turn_keep_each_their_picture(start, looks):
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


def test_what_a_client_that_hung_up_had_begun_is_gone_on_with(start, steps, looks):
    port = start()
    with sent(port, about(PICTURE)):
        wait_until(lambda: len(steps) > 3)
    wait_until_it_stands_still(steps)
    num_steps = len(steps)
    again = ask(port, about(PICTURE), max_tokens=5)
    assert (looks, steps[num_steps]) == ([1], 1)
    assert again.choices == ask(start(prompt_cache_bytes=0), about(PICTURE), max_tokens=5).choices


def test_an_answer_that_a_stop_text_ended_is_gone_on_with(start, looks):
    port = start()
    messages = about(PICTURE, question=COLOUR_QUESTION)
    messages += [
        {"role": "assistant", "content": answer(port, messages, stop=".")},
        {"role": "user", "content": COLOUR_QUESTION},
    ]
    assert (answer(port, messages), looks) == (COLOUR_ANSWER, [1])


def test_without_room_for_earlier_prompts_each_request_looks_for_itself(start, looks):
    port = start(prompt_cache_bytes=0)
    for _ in range(2):
        assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER
    assert len(looks) == 2


def test_a_system_prompt_comes_before_the_question(port, shipped):
    conversation = [{"role": "system", "content": "Read the digits."}, {"role": "user", "content": "Is there a 7?"}]
    expected = shipped[1].tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert ask(port, conversation).usage.prompt_tokens == len(expected)


def test_a_developer_is_to_chat_templates_the_system(port, monkeypatch):
    roles = []

    def note(processor, messages, grid):
        roles.extend(message["role"] for message in messages)
        return encode(processor, messages, grid)

    monkeypatch.setattr("modeling_deco.serving.app.encode", note)
    ask(port, [{"role": "developer", "content": "Read the digits."}, {"role": "user", "content": "Is there a 7?"}])
    assert roles == ["system", "user"]


def test_several_images_have_each_their_grid(port):
    one = ask(port, about(PICTURE)).usage.prompt_tokens
    assert ask(port, about(PICTURE, PICTURE)).usage.prompt_tokens == one + 36
    grids = {"pooled_grid_size": [[3, 3], [4, 5]]}
    assert ask(port, about(PICTURE, PICTURE), extra_body=grids).usage.prompt_tokens == one - 36 + 9 + 20


def test_max_tokens_ends_an_answer_for_its_length(port):
    result = ask(port, about(PICTURE), max_tokens=2)
    assert (result.choices[0].finish_reason, result.usage.completion_tokens) == ("length", 2)


def test_an_answer_without_max_tokens_ends_with_the_context(port, steps):
    result = ask(port, "why " * 1000)
    assert (result.choices[0].finish_reason, result.usage.total_tokens) == ("length", 1024)


def test_max_tokens_may_be_what_the_prompt_leaves_of_the_context(port, shipped):
    room = shipped[0].config.text_config.max_position_embeddings
    room -= ask(port, "Is there a 7?", max_tokens=1).usage.prompt_tokens
    assert ask(port, "Is there a 7?", max_tokens=room).usage.completion_tokens < room
    with pytest.raises(openai.BadRequestError, match=f"and {room + 1} of the answer do not fit .* 1024 tokens"):
        ask(port, "Is there a 7?", max_tokens=room + 1)


def test_an_answer_that_ends_at_max_tokens_is_whole(port):
    whole = ask(port, about(PICTURE))
    bounded = ask(port, about(PICTURE), max_completion_tokens=whole.usage.completion_tokens)
    assert bounded.choices == whole.choices


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (".", "7 white"),
        (["zz", "hit"], "7 w"),
        ("e.", "7 whit"),
        ("te. ", "7 white."),
        ("7", ""),
        (["hit", "w"], "7 "),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(port, stop, expected, streamed):
    assert COLOUR_ANSWER == "7 white."
    messages = about(PICTURE, question=COLOUR_QUESTION)
    if streamed:
        chunks = ask(port, messages, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    else:
        assert answer(port, messages, stop=stop) == expected


@pytest.mark.parametrize("how", [{"temperature": 1.5}, {"top_p": 0.999}])
def test_sampling_draws_and_a_seed_repeats(port, how):
    def draw(**seed):
        return answer(port, "Where?", max_tokens=20, **how, **seed)

    assert draw(seed=1) == draw(seed=1)
    assert len({draw(seed=seed) for seed in range(4)}) > 1


def test_top_p_leaves_out_the_unlikely(port):
    likeliest = answer(port, "Where?", max_tokens=20, temperature=0)
    for seed in range(3):
        assert answer(port, "Where?", max_tokens=20, temperature=1.5, top_p=1e-6, seed=seed) == likeliest


def test_a_seed_of_0_is_a_seed_and_counts_before_the_servers(port, start):
    drawn = {
        answer(number, "Is there a 7?", seed=0, temperature=2.0, max_tokens=8)
        for number in (port, port, port, start(seed=1))
    }
    assert len(drawn) == 1


def test_what_a_seed_draws_is_not_what_comes_after_it(port):
    drawn = set()
    for _ in range(4):
        answer(port, "Where?", temperature=1.5, max_tokens=20, seed=1)
        drawn.add(answer(port, "Where?", temperature=1.5, max_tokens=20))
    assert len(drawn) > 1


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_next_to_no_temperature_is_greedy(port, temperature):
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION), temperature=temperature) == COLOUR_ANSWER


def test_fields_that_change_nothing_are_accepted(port):
    fields = {"n": 1, "user": "me", "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}}
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION), **fields) == COLOUR_ANSWER


def test_models_lists_the_one(port):
    with client(port) as asking:
        assert [model.id for model in asking.models.list()] == [NAME]
        assert asking.models.retrieve(NAME).id == NAME
        with pytest.raises(openai.NotFoundError, match='"gpt" is not served here; "deco-digits" is'):
            asking.models.retrieve("gpt")


def test_health(port):
    assert post(port, None, "GET", "/health")[::2] == (200, {"status": "ok"})


@pytest.mark.parametrize(("first", "second", "length"), [(2, 5, 2), (5, 2, 5)])
def test_max_completion_tokens_counts_before_max_tokens(port, steps, first, second, length):
    result = ask(port, about(PICTURE), max_completion_tokens=first, max_tokens=second)
    assert (result.usage.completion_tokens, result.choices[0].finish_reason) == (length, "length")


def test_max_new_tokens_is_the_length_of_an_answer_whose_request_says_none(start, steps):
    result = ask(start(max_new_tokens=3), about(PICTURE))
    assert (result.usage.completion_tokens, result.choices[0].finish_reason) == (3, "length")


def test_the_servers_budget_is_that_of_requests_that_name_none(start, port):
    limited = start(pooled_grid_size=[3, 4])
    of_the_checkpoint = ask(port, about(PICTURE)).usage.prompt_tokens
    assert of_the_checkpoint - ask(limited, about(PICTURE)).usage.prompt_tokens == 36 - 12
    own = ask(limited, about(PICTURE), extra_body={"pooled_grid_size": 5}).usage.prompt_tokens
    assert of_the_checkpoint - own == 36 - 25


@pytest.mark.parametrize(("grid", "message"), [(13, "13 x 13.*12 x 12"), ("6", "positive int"), (0, "positive int")])
def test_a_budget_that_does_not_fit_the_model_is_refused_at_start(shipped, grid, message):
    with pytest.raises(ValueError, match=message):
        build_app(*shipped, NAME, ServerOptions(pooled_grid_size=grid))


def test_the_servers_sampling_is_that_of_requests_that_say_nothing(start, port):
    drawing, how = start(temperature=1.5, seed=3), {"max_tokens": 20}
    assert answer(drawing, "Where?", **how) == answer(port, "Where?", temperature=1.5, seed=3, **how)
    assert answer(drawing, "Where?", seed=4, **how) == answer(port, "Where?", temperature=1.5, seed=4, **how)
    assert answer(drawing, "Where?", temperature=0, **how) == answer(port, "Where?", temperature=0, **how)
    assert len({answer(drawing, "Where?", seed=seed, **how) for seed in range(4)}) > 1


def test_the_servers_system_message_is_that_of_conversations_without_one(start, port):
    def num_tokens(port, *contents):
        roles = ["user", "system"]
        conversation = [{"role": roles.pop(), "content": content} for content in contents]
        return ask(port, conversation, max_tokens=1).usage.prompt_tokens

    instructed = start(system="Read the digits.")
    assert ask(instructed, "Is there a 7?").usage.prompt_tokens == num_tokens(
        port, "Read the digits.", "Is there a 7?"
    )
    assert num_tokens(instructed, "?", "Is there a 7?") == num_tokens(port, "?", "Is there a 7?")


@pytest.mark.parametrize("prompt_cache_bytes", [0, 2**30])
def test_each_picture_is_encoded_once(start, looks, prompt_cache_bytes):
    port = start(prompt_cache_bytes=prompt_cache_bytes)
    for index, fields in enumerate(({}, {"stream": True}, {"stop": "e."}, {"temperature": 1.0, "seed": 1})):
        pictures = [data_url(render("test", index=2 * index + k, seed=2026).image) for k in range(2)]
        del looks[:]
        ask(port, about(*pictures), **fields)
        assert len(looks) == 1  # for both together


def byte_tokenizer():
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_tokenizer():
    words = ["<unk>", "▁one", "▁two", "\n", "▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


async def pieces_of(tokenizer, ids: list[int], stop=()) -> tuple[list[str], _Answer]:
    """What an answer makes of a model that generates these tokens."""

    class Model:
        def generate(self, input_ids, generation_config, streamer, logits_processor, tokenizer):
            streamer.put(input_ids)
            for token in ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
            return torch.tensor([[0, *ids]])

    written = _Answer(tokenizer, list(stop))
    config = GenerationConfig(max_new_tokens=len(ids) + 1)
    written.generate(Model(), {"input_ids": torch.tensor([[0]])}, config, None)
    pieces = []
    while (piece := await written.pieces.get()) is not None:
        if isinstance(piece, Exception):
            raise piece
        pieces.append(piece)
    return pieces, written


@pytest.mark.parametrize(
    ("tokenizer", "ids", "expected"),
    [
        (byte_tokenizer(), "a naïve 🙂\n สวัสดี", list("a naïve 🙂\n สวัสดี")),
        (sentencepiece_tokenizer(), [1, 3, 2, 1, 5, 6, 7, 8, 4, 2], ["one", "\n", " two", " one", "🙂", " ", " two"]),
    ],
)
def test_a_piece_is_what_a_token_adds_and_holds_no_half_character(tokenizer, ids, expected):
    if isinstance(ids, str):
        ids = tokenizer(ids)["input_ids"]
    pieces, written = asyncio.run(pieces_of(tokenizer, ids))
    assert pieces == expected
    assert (written.num_tokens, written.finish_reason) == (len(ids), "stop")


def test_bytes_that_are_no_character_come_at_the_end():
    pieces, _ = asyncio.run(pieces_of(sentencepiece_tokenizer(), [1, 5, 6]))
    assert "".join(pieces) == sentencepiece_tokenizer().decode([1, 5, 6])


@pytest.mark.parametrize(
    ("text", "stop", "expected", "num_tokens"),
    [
        ("abcdef", ["bcd"], "a", 4),
        ("abcdef", ["abd", "cde"], "ab", 5),
        ("abcdef", ["bce", "bcf"], "abcdef", 6),
        ("abcdef", ["f"], "abcde", 6),
        ("abcdef", ["de", "cd"], "ab", 4),
        ("baaab", ["aab"], "ba", 5),  # of what is held back a later part begins it, too
    ],
)
def test_a_stop_text_may_lie_over_several_pieces(text, stop, expected, num_tokens):
    tokenizer = byte_tokenizer()
    pieces, written = asyncio.run(pieces_of(tokenizer, tokenizer(text)["input_ids"], stop))
    assert ("".join(pieces), written.num_tokens, written.finish_reason) == (expected, num_tokens, "stop")


# --- what is refused -------------------------------------------------------------------------------------------------

BROKEN = "data:image/png;base64," + base64.b64encode(base64.b64decode(PICTURE.partition(",")[2])[:500]).decode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": about(BROKEN)}, r"^Image 1: The image cannot be read: it is broken"),
        (
            {"messages": about(PICTURE, "data:image/png;base64,aGk=")},
            r"^Image 2: The image cannot be read: its content",
        ),
        ({"messages": about(*[PICTURE] * 9)}, r"^9 images are more than the 8 allowed"),
        (
            {"messages": [{"role": "user", "content": "<image> ?"}]},
            r"The text holds .<image>., which stands for an image",
        ),
        (
            {"messages": [{"role": "user", "content": "why " * 1100}]},
            r"\d{4} tokens .* 1 of the answer .* of 1024 tok",
        ),
        ({"messages": [{"role": "user", "content": "why " * 20_000}]}, r"80000 characters .* context of 1024 tokens"),
        ({"pooled_grid_size": 13}, r"13 x 13 is larger than the 12 x 12 patches of image 1"),
        ({"pooled_grid_size": 0}, r"pooled_grid_size must be a positive int .* got 0"),
        ({"pooled_grid_size": "6"}, r"pooled_grid_size must be a positive int .* got '6'"),
        ({"pooled_grid_size": {"rows": 6}}, r"pooled_grid_size must be a positive int .* got {'rows': 6}"),
        ({"pooled_grid_size": [10**6, 10**6]}, r"1000000000000 tokens of images .* context of 1024 tokens"),
        ({"pooled_grid_size": [[3] * 9999]}, r"must be a positive int .*\.\.\.$"),
        ({"pooled_grid_size": [[3, 3]] * 2}, r"has 2 grids for 1 images"),
        ({"max_tokens": 1024}, r"^\d+ tokens of the prompt and 1024 of the answer do not fit"),
    ],
)
def test_what_does_not_fit_the_model_is_400_and_one_line(port, fields, message):
    status, _, content = post(port, json.dumps({"messages": about(PICTURE), **fields}))
    error = content["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert re.search(message, error["message"])
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 400


def one(*parts, **message) -> list[dict]:
    return [{"role": "user", "content": list(parts), **message}]


# Fields of a request, the beginning of what is said about them, and the field that is named in `param`.
REFUSED = [
    ({"messages": None}, "messages is missing; it must be a list of 1 to 1024 messages", "messages"),
    ({"messages": []}, "messages is a list of 0; it must be a list of 1 to 1024 messages", "messages"),
    ({"messages": one() * 1025}, "messages is a list of 1025; it must be", "messages"),
    ({"messages": "hello"}, 'messages is "hello"; it must be a list', "messages"),
    ({"messages": ["hello"]}, 'messages[0] is "hello"; it must be an object like', "messages[0]"),
    ({"messages": one(role="robot")}, 'messages[0].role is "robot"; it must be system, dev', "messages[0].role"),
    ({"messages": one(role="tool")}, 'messages[0].role is "tool", but tools are not supp', "messages[0].role"),
    ({"messages": [{"content": ""}]}, "messages[0].role is missing; it must be", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing; it must be a str", "messages[0].content"),
    ({"messages": one(content=7)}, "messages[0].content is 7; it must be a string, or a", "messages[0].content"),
    ({"messages": one(*["hi"] * 1025)}, "messages[0].content is a list of 1025; it mus", "messages[0].content"),
    ({"messages": one("hi")}, 'messages[0].content[0] is "hi"; it must be an object', "messages[0].content[0]"),
    (
        {"messages": one(tool_calls=[{}])},
        "messages[0].tool_calls is a list of 1, but tools are not supported by this model; leave it out.",
        "messages[0].tool_calls",
    ),
    *(
        (
            {"messages": one({"type": "text", "text": "Listen."}, {"type": kind, kind: {"data": "AAAA"}})},
            f'messages[0].content[1].type is "{kind}"; it must be "text" or "image_url", for this model reads',
            "messages[0].content[1].type",
        )
        for kind in ("input_audio", "file", "video_url", "image", "input_text")
    ),
    ({"messages": one({})}, "messages[0].content[0].type is missing; it must be", "messages[0].content[0].type"),
    (
        {"messages": one({"type": "text", "text": ["a"]})},
        "messages[0].content[0].text is a list of 1; it must be a string.",
        "messages[0].content[0].text",
    ),
    (
        {"messages": one({"type": "image_url", "image_url": "https://example.org/a.png"})},
        'messages[0].content[0].image_url is "https://example.org/a.png"; it must be an object like {"url": "https',
        "messages[0].content[0].image_url",
    ),
    (
        {"messages": one({"type": "image_url", "image_url": {}})},
        "messages[0].content[0].image_url.url is missing; it must be a string.",
        "messages[0].content[0].image_url.url",
    ),
    (
        {"messages": one({"type": "text", "text": "\ud800"})},
        "messages[0].content[0].text has half of a surrogate pair (\\ud800 to \\udfff), which is no character",
        "messages[0].content[0].text",
    ),
    ({"max_tokens": 1025}, "max_tokens is 1025; it must be an integer from 1 to 1024", "max_tokens"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be an integer from 1 on.", "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be an integer from 1 on.", "max_tokens"),
    ({"max_tokens": True}, "max_tokens is true; it must be an integer", "max_tokens"),
    ({"max_tokens": "5"}, 'max_tokens is "5"; it must be an integer', "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens is a huge number; it must be an integer", "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens is 9223372036854775808; it must be an integer", "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens is -1; it must be an", "max_completion_tokens"),
    ({"temperature": -1}, "temperature is -1; it must be a number from 0 to 2.", "temperature"),
    ({"temperature": 2.5}, "temperature is 2.5; it must be a number from 0 to 2.", "temperature"),
    ({"temperature": "hot"}, 'temperature is "hot"; it must be a number from 0 to 2.', "temperature"),
    ({"top_p": 0}, "top_p is 0; it must be a number above 0 and up to 1.", "top_p"),
    ({"top_p": 1.01}, "top_p is 1.01; it must be a number above 0 and up to 1.", "top_p"),
    ({"seed": 2**63}, "seed is 9223372036854775808; it must be an integer of 64 bits", "seed"),
    ({"seed": -(2**63) - 1}, "seed is -9223372036854775809; it must be an integer of 64 bits", "seed"),
    ({"stop": ""}, 'stop is ""; it must be a text of 1 to 1000 characters, or a list of up to 4 of them.', "stop"),
    ({"stop": ["a", "b" * 1001]}, "stop is a list of 2; it must be a text of 1 to 1000 characters", "stop"),
    ({"stop": ["a"] * 5}, "stop is a list of 5; it must be a text of 1 to 1000 characters, or a list of up", "stop"),
    ({"stop": [1]}, "stop is a list of 1; it must be a text of 1 to 1000 characters", "stop"),
    ({"stream": "yes"}, 'stream is "yes"; it must be true or false.', "stream"),
    ({"stream_options": True}, "stream_options is true; it must be an object", "stream_options"),
    (
        {"stream_options": {"include_usage": 1}},
        "stream_options.include_usage is 1; it must be true or false.",
        "stream_options.include_usage",
    ),
    ({"n": 2}, "n is 2, but a request gets one answer; leave it out.", "n"),
    ({"logprobs": True}, "logprobs is true, but probabilities are not returned by this server; leave", "logprobs"),
    ({"top_logprobs": 5}, "top_logprobs is 5, but probabilities are not returned", "top_logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty is 0.5, but penalties and biases are not", "presence_penalty"),
    ({"frequency_penalty": 1}, "frequency_penalty is 1, but penalties and biases are not", "frequency_penalty"),
    ({"logit_bias": {"1": 100}}, "logit_bias is an object, but penalties and biases are not", "logit_bias"),
    ({"tools": [{}]}, "tools is a list of 1, but tools are not supported by this model; leave it out.", "tools"),
    ({"tool_choice": "required"}, 'tool_choice is "required", but tools are not supported', "tool_choice"),
    ({"functions": [{}]}, "functions is a list of 1, but tools are not supported by this model", "functions"),
    (
        {"response_format": {"type": "json_object"}},
        'response_format.type is "json_object", but answers are plain text; leave it out.',
        "response_format.type",
    ),
    ({"response_format": "json"}, 'response_format is "json", but answers are plain text', "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities is a list of 2, but this model answers in text", "modalities"),
    ({"audio": {"voice": "ash"}}, "audio is an object, but this model answers in text alone", "audio"),
    ({"reasoning_effort": "high"}, 'reasoning_effort is "high", but this model does not', "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options is an object, but this server does", "web_search_options"),
    ({"top_k": 5}, 'This server does not know the field "top_k"; did you mean top_p?', "top_k"),
    ({"maxtokens": 5}, 'This server does not know the field "maxtokens"; did you mean max_tokens?', "maxtokens"),
    ({"guided_json": {}}, 'This server does not know the field "guided_json"; leave it out.', "guided_json"),
    ({"\ud800": 1}, 'This server does not know the field "\\ud800"; leave it out.', "?"),
    ({"mm_processor_kwargs": 3}, "mm_processor_kwargs is 3; it must be an object with pool", "mm_processor_kwargs"),
    (
        {"mm_processor_kwargs": {"size": 9}},
        'mm_processor_kwargs has the field "size", which this server does not know; leave it out.',
        "mm_processor_kwargs.size",
    ),
    (
        {"pooled_grid_size": 3, "mm_processor_kwargs": {"pooled_grid_size": 4}},
        "pooled_grid_size and mm_processor_kwargs.pooled_grid_size are not the same; send one of them.",
        "pooled_grid_size",
    ),
    ({"model": 7}, "model is 7; it must be a string.", "model"),
]


@pytest.mark.parametrize(("fields", "message", "param"), REFUSED, ids=[refused[1][:40] for refused in REFUSED])
def test_a_field_that_cannot_be_is_named_with_its_value_and_what_to_do(port, fields, message, param):
    status, _, content = post(port, json.dumps({"messages": one({"type": "text", "text": "?"}), **fields}))
    error = content["error"]
    assert error["message"].startswith(message)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["code"] in {
        "invalid_value",
        "missing_required_parameter",
        "unknown_parameter",
        "unsupported_parameter",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is not JSON: it breaks off or goes wrong at line 1, column 1."),
        (b'{"messages": [}', "The body is not JSON: it breaks off or goes wrong at line 1, column 15."),
        (b"\xff{}", "The body is not JSON: it is not UTF-8."),
        (b"[" * 100_000, "The body is not JSON: it is nested too deeply."),
        (b'{"temperature": NaN}', "The body is not JSON: it has a number that JSON does not have, or one that is too"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "The body is not JSON: it has a number that JSON does not have, or one t"),
        (b"[" + b"0," * 1_000_001 + b"0]", "The body has more than 1,000,000 values; send a shorter conversation."),
        (b"[]", 'The body is a list of 0; it must be an object like {"messages": [...]}.'),
        (b"null", 'The body is null; it must be an object like {"messages": [...]}.'),
        (
            b'{"max_tokens": 1e999, "messages": [{"role": "user", "content": ""}]}',
            "max_tokens is Infinity; it must be",
        ),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": ""}]}', "temperature is Infinity; it must"),
    ],
)
def test_a_body_that_is_no_request_is_400_and_says_why(port, body, message):
    status, _, content = post(port, body)
    assert status == 400
    assert content["error"]["message"].startswith(message)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_grid_that_only_the_model_can_judge_is_400_too(port, shipped, monkeypatch, streamed):
    monkeypatch.setattr(shipped[1], "patch_size", None)  # as in folders of before it was there
    with pytest.raises(openai.BadRequestError, match="13 x 13 is larger than the 12 x 12 patches"):
        ask(port, about(PICTURE), stream=streamed, extra_body={"pooled_grid_size": 13})


def test_the_clients_exception_holds_the_reason_and_the_server_goes_on(port):
    with pytest.raises(openai.BadRequestError, match="Image 1: The image cannot be read: it is broken"):
        ask(port, about(BROKEN))
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER


def test_another_model_is_not_found(port):
    with pytest.raises(openai.NotFoundError, match='"gpt-4o" is not served here; "deco-digits" is'):
        ask(port, "Is there a 7?", extra_body={"model": "gpt-4o"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/completions", 404),
        ("POST", "/load_model", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/health/", 404),
        ("PUT", "/health", 405),
    ],
)
def test_nothing_else_is_served(port, method, path, status):
    found, _, content = post(port, b"{}", method, path)
    assert found == status
    assert content["error"]["message"]


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(port):
    bomb = data_url(Image.new("1", (8000, 8000)))
    with pytest.raises(openai.BadRequestError, match="Image 1: .* more than the 50,000,000 pixels allowed"):
        ask(port, about(bomb))


def test_the_pixels_of_a_request_are_counted_over_its_images(start):
    port = start(image_limits=ImageLimits(max_pixels=3 * 96 * 96))
    assert ask(port, about(*[PICTURE] * 3))
    with pytest.raises(
        openai.BadRequestError, match="Images 1 to 4 have 36,864 pixels together, more than the 27,648 "
    ):
        ask(port, about(*[PICTURE] * 5))


def test_image_limits_are_the_operators(start):
    with pytest.raises(openai.BadRequestError, match="Image 1: .* more than the 1,000 pixels allowed"):
        ask(start(image_limits=ImageLimits(max_pixels=1000)), about(PICTURE))


def test_a_body_over_the_limit_is_413_by_its_announcement(start):
    port = start(max_body_bytes=1000)
    with pytest.raises(openai.APIStatusError, match="more than 1,000 bytes") as refused:
        ask(port, "a" * 10_000_000)
    assert refused.value.status_code == 413
    assert ask(port, "Is there a 7?")


def test_a_body_over_the_limit_is_413_without_announcement(start):
    port = start(max_body_bytes=10_000)
    status, _, content = post(port, (b" " * 1000 for _ in range(50)))  # in chunks, since it has no length
    assert (status, content["error"]["message"]) == (
        413,
        "The request has more than 10,000 bytes; send fewer or smaller pictures.",
    )
    assert ask(port, "Is there a 7?")


def test_a_body_that_does_not_arrive_is_408(start):
    port = start(body_timeout=0.2, max_queue=0)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
        assert slow.makefile().readline() == "HTTP/1.1 408 Request Timeout\n"
    assert ask(port, "Is there a 7?")


def test_only_json_is_read_so_that_a_browser_asks_first(port):
    status, headers, content = post(port, json.dumps({"messages": about(PICTURE)}), Content_Type="text/plain")
    assert (status, content["error"]["message"]) == (415, "The Content-Type header must be application/json.")
    status, headers, _ = post(port, None, "OPTIONS", Origin="http://evil.example")
    assert (status, [name for name in headers if "access-control" in name.lower()]) == (405, [])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("evil.example", 400),
        ("evil-localhost", 400),
        ("localhost.evil.example", 400),
    ],
)
def test_a_page_whose_name_was_bound_to_this_machine_is_refused(start, host, status):
    port = start(hosts=["localhost", "127.0.0.1"])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/v1/models", headers={"Host": host})
    assert connection.getresponse().status == status
    connection.close()


def test_an_api_key_is_asked_for(start):
    port = start(api_key="sesame")
    with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
        ask(port, "Is there a 7?")
    for wrong in ("Bearer sesame2", "Bearer s\xe9same", "sesame"):
        assert post(port, None, "GET", "/v1/models", Authorization=wrong)[0] == 401
    with client(port, api_key="sesame") as asking:
        assert asking.models.list().data
    assert post(port, None, "GET", "/health")[0] == 200


def test_an_api_key_may_be_of_any_letters(start):
    port = start(api_key="s\xe9same")
    assert post(port, None, "GET", "/v1/models", Authorization="Bearer s\xe9same".encode())[0] == 200


def test_errors_of_the_model_are_500_and_the_server_goes_on(port, shipped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shipped[0], "generate", lambda **kwargs: torch.zeros(1, device="meta").item())
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            ask(port, about(PICTURE))
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER


def test_a_model_whose_logits_are_no_numbers_is_a_servers_error(port, shipped):
    def spoil(module, args, outputs):
        outputs.logits = outputs.logits * float("nan")
        return outputs

    hook = shipped[0].register_forward_hook(spoil)
    with pytest.raises(openai.InternalServerError, match="logits are NaN"):
        ask(port, about(PICTURE))
    hook.remove()


def test_an_error_within_a_stream_is_told(port, shipped, steps):
    class Break(Exception):
        pass

    def fail(module, args):
        if len(steps) == 4:
            raise Break

    hook = shipped[0].register_forward_pre_hook(fail)
    pieces = []
    with client(port) as asking, pytest.raises(openai.APIError, match="cut short by an error"):
        pieces.extend(asking.chat.completions.create(model=NAME, messages=about(PICTURE), stream=True))
    hook.remove()
    assert len(pieces) == 4  # the role, and a piece for each step
    assert ask(port, about(PICTURE), max_tokens=1)


# --- image URLs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures():
    """A server of the picture, at `/picture.png` and, by a redirect to another address, at `/elsewhere`; what it was
    asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            picture = base64.b64decode(PICTURE.partition(",")[2])
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.2:{server.server_port}/picture.png")
                self.end_headers()
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(picture)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("0.0.0.0", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
        server.shutdown()


def test_a_private_address_is_not_asked(port, pictures):
    with pytest.raises(openai.BadRequestError, match=r"Image 1: .* '127\.0\.0\.1' is not a public address"):
        ask(port, about(pictures.url + "/picture.png"))
    assert pictures.asked == []


def test_a_redirect_to_a_private_address_is_not_followed(port, pictures, monkeypatch):
    monkeypatch.setattr(images, "_is_public", lambda ip: ip == "127.0.0.1")
    with pytest.raises(openai.BadRequestError, match=r"Image 1: .* '127\.0\.0\.2' is not a public address"):
        ask(port, about(pictures.url + "/elsewhere"))
    assert pictures.asked == ["/elsewhere"]


def test_private_addresses_can_be_allowed(start, pictures):
    port = start(allow_private=True)
    assert answer(port, about(pictures.url + "/elsewhere", question=COLOUR_QUESTION)) == COLOUR_ANSWER


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_files_are_refused_unless_allowed(port, start, tmp_path, form):
    SCENE.image.save(tmp_path / "picture.png")
    messages = about(form.format(tmp_path / "picture.png"), question=COLOUR_QUESTION)
    with pytest.raises(openai.BadRequestError, match="only http, https and data URLs are read"):
        ask(port, messages)
    assert answer(start(allow_files=True), messages) == COLOUR_ANSWER


def test_files_that_are_allowed_allow_no_private_address(start, pictures):
    port = start(allow_files=True)
    with pytest.raises(openai.BadRequestError, match="is not a public address"):
        ask(port, about(pictures.url + "/picture.png"))
    assert pictures.asked == []


# --- clients that leave, and too many of them ------------------------------------------------------------------------


@pytest.mark.newest
@pytest.mark.parametrize("streamed", [False, True])
def test_generation_stops_when_its_client_hangs_up(port, steps, streamed):
    with sent(port, about(PICTURE), stream=streamed):
        wait_until(lambda: len(steps) > 3)
    wait_until_it_stands_still(steps)
    assert len(steps) < 500
    assert ask(port, about(PICTURE), max_tokens=1)


def test_a_request_that_hangs_up_in_the_queue_never_gets_to_the_model(start, steps, looks, monkeypatch):
    waiting = []

    class Waiting(_Answer):
        def __init__(self, *args):
            super().__init__(*args)
            waiting.append(self)

    monkeypatch.setattr("modeling_deco.serving._Answer", Waiting)
    port = start(max_queue=1, prompt_cache_bytes=0)
    with sent(port, about(PICTURE)):
        wait_until(lambda: steps)
        with sent(port, about(PICTURE, PICTURE)):
            wait_until(lambda: len(waiting) == 2)
        wait_until(lambda: waiting[1]._is_cancelled)
    assert ask(port, about(PICTURE), max_tokens=1)
    assert len(looks) == len([length for length in steps if length > 1]) == 2


def test_too_many_requests_are_429_until_there_is_room(start, steps):
    port = start(max_queue=1)
    with ThreadPoolExecutor(1) as pool:
        with sent(port, about(PICTURE)):
            wait_until(lambda: steps)
            waiting = pool.submit(ask, port, about(PICTURE), max_tokens=1)
            time.sleep(0.5)
            with pytest.raises(openai.RateLimitError, match="Too many requests are waiting") as refused:
                ask(port, about(PICTURE))
            assert refused.value.response.headers["Retry-After"] == "1"
            assert post(port, None, "GET", "/health")[0] == 200
        assert waiting.result().choices
    assert ask(port, about(PICTURE), max_tokens=1)


@contextmanager
def arriving(port: int, num_bytes: int):
    """A request of one more byte than that, of which these have been sent."""
    head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {num_bytes + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}{' ' * num_bytes}".encode())
        time.sleep(0.2)
        yield connection


def test_requests_that_trickle_in_leave_the_queue_to_others(start):
    port = start(max_queue=0)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(arriving(port, 1))
        assert ask(port, "Is there a 7?", max_tokens=1)


def test_requests_that_trickle_in_are_bounded_by_their_bytes(start):
    port = start(max_queue=1, max_body_bytes=1000)
    with arriving(port, 900), arriving(port, 900), arriving(port, 201) as third:
        assert third.makefile().readline() == "HTTP/1.1 429 Too Many Requests\n"
    wait_until(lambda: post(port, b" " * 201)[0] == 400)


def test_the_bytes_of_requests_that_are_over_make_room(start):
    port = start(max_queue=0, max_body_bytes=500)
    bodies = [{"messages": about("data:,x")}, {"messages": about("data:,x"), "model": "another"}, {"messages": []}]
    statuses = [post(port, json.dumps(bodies[number % 3]))[0] for number in range(12)]
    assert statuses == [400, 404, 400] * 4


def test_the_bytes_of_requests_whose_pictures_are_being_read_count(start, silent_host):
    port = start(max_queue=1, max_body_bytes=1000, allow_private=True)
    with (
        sent(port, about(silent_host.url, question="a" * 700)),
        sent(port, about(silent_host.url, question="b" * 700)),
    ):
        wait_until(lambda: len(silent_host.accepted) == 2)
        assert post(port, b" " * 500)[0] == 429
    wait_until(lambda: post(port, b" " * 500)[0] == 400)


def test_a_request_that_arrives_when_the_queue_has_filled_is_429(start, steps):
    port = start(max_queue=0)
    with arriving(port, 1) as late, sent(port, about(PICTURE)):
        wait_until(lambda: steps)
        late.sendall(b" ")
        assert late.makefile().readline() == "HTTP/1.1 429 Too Many Requests\n"


# --- pictures that take their time -----------------------------------------------------------------------------------


@pytest.fixture
def silent_host():
    """A host that accepts connections and says nothing: its address, and the connections."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:

        def accept():
            with suppress(OSError):
                while True:
                    accepted.append(stack.enter_context(listener.accept()[0]))

        Thread(target=accept, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", accepted=accepted)
        listener.shutdown(socket.SHUT_RDWR)


def test_hosts_that_do_not_answer_hold_up_nobody_and_are_left_with_the_client(start, silent_host):
    port = start(allow_private=True, max_queue=1)
    with sent(port, about(silent_host.url)), sent(port, about(silent_host.url)):
        wait_until(lambda: len(silent_host.accepted) == 2)
        for _ in range(3):
            assert ask(port, "Is there a 7?", max_tokens=1, timeout=10)
        with pytest.raises(openai.RateLimitError):  # for pictures alone
            ask(port, about(PICTURE))
    for connection in silent_host.accepted:
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"GET /a.png")
        assert connection.recv(1000) == b""
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER


def test_pictures_that_take_minutes_hold_up_nobody_and_are_left_with_the_client(start, monkeypatch):
    asked, ask_decoder = [], images._Decoder._ask

    def note(decoder, encoded):
        asked.append(decoder)
        return ask_decoder(decoder, encoded)

    monkeypatch.setattr(images._Decoder, "_ask", note)
    bomb = "data:image/jpeg;base64," + base64.b64encode(progressive_bomb(4096, 2000)).decode()
    port = start(image_limits=ImageLimits(max_pixels=50_000_000, decode_timeout=300))
    with sent(port, about(bomb)), sent(port, about(bomb)):
        wait_until(lambda: len(asked) == 2, 60)
        assert ask(port, "Is there a 7?", max_tokens=1, timeout=30)
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION), timeout=60) == COLOUR_ANSWER


def test_pictures_that_wait_to_be_decoded_are_answered_in_the_end(port):
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: answer(port, about(PICTURE, question=COLOUR_QUESTION)), range(5)))
    assert answers == [COLOUR_ANSWER] * 5


# --- connections -----------------------------------------------------------------------------------------------------


def half_open(port: int, beginning: bytes = b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: ") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(beginning)
    return connection


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def drip(connection: socket.socket) -> None:
    """Send a byte again and again, until the other side has closed the connection."""
    while is_open(connection):
        with suppress(ConnectionError):
            connection.send(b"a")
        time.sleep(0.02)


def test_headers_that_do_not_end_end_the_connection(start):
    with half_open(start(header_timeout=0.2)) as connection:
        began = time.monotonic()
        drip(connection)
    assert time.monotonic() - began >= 0.19


def test_a_connection_that_says_nothing_is_ended(start):
    with half_open(start(header_timeout=0.2), b"") as connection:
        assert connection.recv(1) == b""


def test_a_connection_that_begins_another_request_and_does_not_end_it_is_ended(start):
    with half_open(start(header_timeout=0.2), b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nG") as connection:
        wait_until(lambda: b"ok" in connection.recv(1000))
        drip(connection)


def test_more_connections_than_allowed_push_out_the_one_that_has_waited_longest(start, steps):
    port = start(max_connections=4)
    with ExitStack() as stack:
        answered = stack.enter_context(sent(port, about(PICTURE), stream=True))
        wait_until(lambda: steps)
        waiting = [stack.enter_context(half_open(port)) for _ in range(3)]
        assert post(port, None, "GET", "/health")[0] == 200
        wait_until(lambda: not is_open(waiting[0]))
        waiting += [stack.enter_context(half_open(port)) for _ in range(20)]
        wait_until(lambda: not is_open(waiting[-4]))
        assert [is_open(connection) for connection in waiting[-3:]] == [True] * 3
        assert answered.recv(15) == b"HTTP/1.1 200 OK"


def test_a_body_that_is_on_its_way_makes_room_too(start):
    port = start(max_connections=2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
    with half_open(port, head), half_open(port, head), half_open(port, head):
        assert post(port, None, "GET", "/health")[0] == 200


@pytest.mark.parametrize("num_requests", [1, 2])
def test_a_client_that_does_not_read_is_left(num_requests):
    left = Event()

    async def flood(scope, receive, send):
        connection = scope["state"]["connection"]
        with connection.request():
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b" " * 2**24, "more_body": num_requests == 1})
            if num_requests == 1:  # else it is the second request that waits until there is room
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
        if connection.transport.is_closing():
            left.set()

    with running(flood, ServerOptions(body_timeout=0.2, header_timeout=20)) as port:
        with half_open(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * num_requests):
            assert left.wait(10)


def test_by_default_half_of_the_files_that_may_be_open_are_left_for_others(shipped, monkeypatch):
    for files, connections in ((64, 32), (512, 256), (1_000_000, 1000)):
        monkeypatch.setattr("modeling_deco.serving.app.max_open_files", lambda files=files: files)
        server = Server(None)
        assert server.connections.limit == connections
        # accepted before any of them is looked at, and again before those that it replaces are closed
        assert connections + 3 * server.config.backlog < files


def test_connections_that_cannot_be_accepted_are_logged_once(capsys):
    connections = Server(None).connections
    for _ in range(100):
        connections.on_loop_error(None, {"exception": OSError(errno.EMFILE, "Too many open files"), "socket": None})
    assert re.fullmatch(r"WARNING: .* cannot be accepted.*Too many open files\n", capsys.readouterr().err)


def test_what_is_no_http_is_400_in_openais_form(port):
    with half_open(port, b"SSH-2.0-OpenSSH\r\n\r\n") as connection:
        answered = connection.makefile().read()
    assert answered.startswith("HTTP/1.1 400 Bad Request\n")
    assert json.loads(answered.partition("\n\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
def test_half_open_connections_beyond_what_a_process_may_open_keep_nobody_out():
    with serving(max_open_files=96) as (process, port, log):
        with ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(half_open(port))
                if _ % 100 == 99:
                    start = time.monotonic()
                    assert post(port, None, "GET", "/health")[0] == 200
                    assert time.monotonic() - start < 5
            assert ask(port, "Is there a 7?", max_tokens=1)
        process.terminate()
    assert "Traceback" not in "".join(log)
    assert len("".join(log)) < 10_000


# --- the whole of it -------------------------------------------------------------------------------------------------


@contextmanager
def serving(*arguments, max_open_files: int = 1024):
    """`deco serve` in a process of its own: the process, its port, and a list of what is in its stderr at the end."""
    limit = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, [{max_open_files}] * 2); "
    command = [sys.executable, "-m", "modeling_deco.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{limit} os.execv(sys.executable, {command})"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = []
    try:
        for line in process.stderr:
            log.append(line)
            if announced := re.search(r"deco-digits is served at http://127\.0\.0\.1:(\d+)/v1$", line):
                break
        yield process, int(announced[1]), log
        stdout, stderr = process.communicate(timeout=60)
        assert stdout == ""
        log.append(stderr)
    finally:
        process.kill()


@pytest.mark.slow
def test_serve_answers_logs_no_content_and_ends_with_ctrl_c():
    with serving() as (process, port, log):
        assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER
        with pytest.raises(openai.BadRequestError), client(port) as asking:
            asking.models.list(extra_headers={"Host": "evil.example"})
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    log = "".join(log)
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in log
    assert "Traceback" not in log
    assert not any(secret in log for secret in (COLOUR_QUESTION, COLOUR_ANSWER, PICTURE[-40:]))


@pytest.mark.slow
def test_serve_ends_on_sigterm():
    with serving() as (process, port, log):
        assert post(port, None, "GET", "/health")[0] == 200
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in "".join(log)


def test_the_commands_options_are_the_servers(monkeypatch):
    given = []
    monkeypatch.setattr("modeling_deco.serving.app.serve", lambda model, *, options, **rest: given.append(options))
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    assert given == [ServerOptions()]


def test_the_commands_options_have_the_names_that_ask_has(monkeypatch):
    given = []
    monkeypatch.setattr("modeling_deco.serving.app.serve", lambda model, **arguments: given.append((model, arguments)))
    options = "--revision main --pooled-grid-size 3x4 --max-new-tokens 9 --temperature 0.5 --seed 7 --system Be.brief"
    places = "--device cpu --dtype float32 --4bit --int8 --host 0.0.0.0 --port 9 --api-key k --max-connections 5"
    result = CliRunner().invoke(app, ["serve", "mine", *options.split(), *places.split()])
    assert result.exit_code == 0, result.stderr
    ((model, arguments),) = given
    assert arguments.pop("options") == ServerOptions(
        api_key="k",
        pooled_grid_size=[3, 4],
        max_new_tokens=9,
        temperature=0.5,
        seed=7,
        system="Be.brief",
        max_connections=5,
    )
    assert (model, arguments) == (
        "mine",
        {
            "revision": "main",
            "device": "cpu",
            "dtype": "float32",
            "in_4bit": True,
            "in_int8": True,
            "host": "0.0.0.0",
            "port": 9,
            "served_model_name": None,
        },
    )


def test_the_command_refuses_a_budget_that_does_not_fit_the_model():
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--pooled-grid-size", "13"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco serve: .*13 x 13.*12 x 12.*\n", result.stderr)


def test_the_command_refuses_a_folder_without_all_weights(tmp_path):
    folder = shutil.copytree(SHIPPED_CHECKPOINT, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "multi_modal_projector" not in name}
    assert len(kept) == len(weights) - 4
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", "0"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"deco serve: .*multi_modal_projector.*\n", result.stderr)


def test_the_command_refuses_in_one_line():
    result = CliRunner().invoke(app, ["serve", "no/such/model", "--port", "65536"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "deco serve: Cannot listen on 127.0.0.1 port 65536: there is no such port.\n"


def test_a_port_in_use_is_refused_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"Cannot listen on 127\.0\.0\.1 port {port}: Address already in use"):
            serve("no/such/model", port=port)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (("192.0.2.1", 0), "Cannot assign requested address"),
        (("127.0.0.1", 65536), "port 65536: there is no such port"),
    ],
)
def test_an_address_that_is_not_ours_is_refused(address, message):
    host, port = address
    with pytest.raises(ValueError, match=message):
        serve("no/such/model", host=host, port=port)


def test_a_model_that_is_not_there_is_an_error_before_the_port_opens():
    with pytest.raises(ValueError, match=r"^There is no folder no/such/model; a Hub id would be owner/name"):
        serve("no/such/model", port=0)


def test_an_empty_api_key_is_no_key():
    with pytest.raises(ValueError, match="The API key is empty"):
        serve("no/such/model", port=0, options=ServerOptions(api_key=""))


def test_a_model_that_is_not_deco_is_refused(shipped):
    llava = SimpleNamespace(config=SimpleNamespace(model_type="llava"))
    with pytest.raises(ValueError, match="mine is a 'llava' model, not a DeCo"):
        build_app(llava, shipped[1], "mine")


def test_a_model_without_a_chat_template_is_refused(shipped):
    with pytest.raises(ValueError, match="'mine' has no chat template"):
        build_app(shipped[0], SimpleNamespace(chat_template=None), "mine")


def test_without_the_extra_the_reason_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "modeling_deco.serving.app")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"^The server needs .*: pip install 'modeling-deco\[serve\]'$"):
        importlib.import_module("modeling_deco.serving.app")
