# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Requests that are refused: fields, bodies, paths, hosts and keys; and errors of the model."""

import base64
import http.client
import json
import re
import socket

import openai
import pytest
import torch
from asking import COLOUR_ANSWER, COLOUR_QUESTION, NAME, PICTURE, about, answer, ask, client, post

BROKEN = "data:image/png;base64," + base64.b64encode(base64.b64decode(PICTURE.partition(",")[2])[:500]).decode()


def one(*parts, **message) -> list[dict]:
    return [{"role": "user", "content": list(parts), **message}]


# Fields of a request, the beginning of their message, and the field that `param` names.
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
            f'messages[0].content[1].type is "{kind}"; it must be "text" or "image_url", because this model reads',
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
        "messages[0].content[0].text has half of a surrogate pair (\\ud800 to \\udfff), which is not a character",
        "messages[0].content[0].text",
    ),
    ({"max_tokens": 1025}, "max_tokens is 1025; it must be an integer from 1 to 1024", "max_tokens"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be a positive integer.", "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be a positive integer.", "max_tokens"),
    ({"max_tokens": True}, "max_tokens is true; it must be a positive integer", "max_tokens"),
    ({"max_tokens": "5"}, 'max_tokens is "5"; it must be a positive integer', "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens is a huge number; it must be a positive integer", "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens is 9223372036854775808; it must be a positive integer", "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens is -1; it must be a", "max_completion_tokens"),
    ({"temperature": -1}, "temperature is -1; it must be a number from 0 to 2.", "temperature"),
    ({"temperature": 2.5}, "temperature is 2.5; it must be a number from 0 to 2.", "temperature"),
    ({"temperature": "hot"}, 'temperature is "hot"; it must be a number from 0 to 2.', "temperature"),
    ({"top_p": 0}, "top_p is 0; it must be a number above 0 and up to 1.", "top_p"),
    ({"top_p": 1.01}, "top_p is 1.01; it must be a number above 0 and up to 1.", "top_p"),
    ({"seed": 2**63}, "seed is 9223372036854775808; it must be an integer of 64 bits", "seed"),
    ({"seed": -(2**63) - 1}, "seed is -9223372036854775809; it must be an integer of 64 bits", "seed"),
    ({"stop": ""}, 'stop is ""; it must be a string of 1 to 1000 characters, or a list of up to 4 of them.', "stop"),
    ({"stop": ["a", "b" * 1001]}, "stop is a list of 2; it must be a string of 1 to 1000 characters", "stop"),
    ({"stop": ["a"] * 5}, "stop is a list of 5; it must be a string of 1 to 1000 characters, or a list of up", "stop"),
    ({"stop": [1]}, "stop is a list of 1; it must be a string of 1 to 1000 characters", "stop"),
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
    (
        {"modalities": ["text", "audio"]},
        "modalities is a list of 2, but this model answers only",
        "modalities",
    ),
    ({"audio": {"voice": "ash"}}, "audio is an object, but this model answers only in text", "audio"),
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
        "pooled_grid_size and mm_processor_kwargs.pooled_grid_size differ; send one of them.",
        "pooled_grid_size",
    ),
    ({"model": 7}, "model is 7; it must be a string.", "model"),
]


def test_a_refused_field_is_named_with_its_value_and_what_to_do(port):
    for fields, message, param in REFUSED:
        status, _, content = post(port, json.dumps({"messages": one({"type": "text", "text": "?"}), **fields}))
        error = content["error"]
        assert error["message"].startswith(message)
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), message
        assert error["code"] in {
            "invalid_value",
            "missing_required_parameter",
            "unknown_parameter",
            "unsupported_parameter",
        }


# Bodies of a request, and the beginning of their message.
BODIES = [
    (b"", "The body is not JSON: it ends early or is malformed at line 1, column 1."),
    (b'{"messages": [}', "The body is not JSON: it ends early or is malformed at line 1, column 15."),
    (b"\xff{}", "The body is not JSON: it is not UTF-8."),
    (b"[" * 100_000, "The body is not JSON: it is nested too deeply."),
    (b'{"temperature": NaN}', "The body is not JSON: it has a number that is not valid in JSON, or one that is too"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "The body is not JSON: it has a number that is not valid in JSON, or"),
    (b"[" + b"0," * 1_000_001 + b"0]", "The body has more than 1,000,000 values; send a shorter conversation."),
    (b"[]", 'The body is a list of 0; it must be an object like {"messages": [...]}.'),
    (b"null", 'The body is null; it must be an object like {"messages": [...]}.'),
    (
        b'{"max_tokens": 1e999, "messages": [{"role": "user", "content": ""}]}',
        "max_tokens is Infinity; it must be",
    ),
    (b'{"temperature": 1e999, "messages": [{"role": "user", "content": ""}]}', "temperature is Infinity; it must"),
]


def test_a_body_that_is_not_a_request_is_refused(port):
    for body, message in BODIES:
        status, _, content = post(port, body)
        assert status == 400
        assert content["error"]["message"].startswith(message)


# Fields that do not fit the model, and a pattern of their message.
UNFIT = [
    ({"messages": about(BROKEN)}, r"^Image 1: The image cannot be read: it is broken"),
    (
        {"messages": about(PICTURE, "data:image/png;base64,aGk=")},
        r"^Image 2: The image cannot be read: its content",
    ),
    ({"messages": about(*[PICTURE] * 9)}, r"^9 images are more than the 8 allowed"),
    ({"messages": about(PICTURE), "tiles": 81}, r"^81 tiles are more than the 64 allowed"),
    (
        {"messages": [{"role": "user", "content": "<image> ?"}]},
        r"The text contains .<image>., which marks an image",
    ),
    (
        {"messages": [{"role": "user", "content": "why " * 1100}]},
        r"\d{4} (tokens|positions) .* 1 of the answer .* of 1024 tok",
    ),
    ({"messages": [{"role": "user", "content": "why " * 20_000}]}, r"80000 characters .* context of 1024 tokens"),
    ({"pooled_grid_size": 13}, r"13 x 13 is larger than the 12 x 12 patches of image 1"),
    ({"pooled_grid_size": 0}, r"pooled_grid_size must be a positive int .* got 0"),
    ({"pooled_grid_size": "6"}, r"pooled_grid_size must be a positive int .* got '6'"),
    ({"pooled_grid_size": {"rows": 6}}, r"pooled_grid_size must be a positive int .* got {'rows': 6}"),
    ({"pooled_grid_size": [10**6, 10**6]}, r"1000000 x 1000000 is larger than the 12 x 12 patches of image 1"),
    ({"pooled_grid_size": [[3] * 9999]}, r"must be a positive int .*\.\.\.$"),
    ({"pooled_grid_size": [[3, 3]] * 2}, r"has 2 grids for 1 images"),
    ({"max_tokens": 1024}, r"^\d+ (tokens|positions) of the prompt and 1024 of the answer do not fit"),
]


def test_a_request_that_does_not_fit_the_model_is_refused_in_one_line(port):
    for fields, message in UNFIT:
        status, _, content = post(port, json.dumps({"messages": about(PICTURE), **fields}))
        error = content["error"]
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert re.search(message, error["message"])
        assert "\n" not in error["message"]
        assert len(error["message"]) <= 400


@pytest.mark.parametrize("streamed", [False, True])
def test_a_grid_that_only_the_model_can_check_is_refused_too(port, shipped, monkeypatch, streamed):
    monkeypatch.setattr(shipped[1], "patch_size", None)  # as in old checkpoints
    with pytest.raises(openai.BadRequestError, match="13 x 13 is larger than the 12 x 12 patches"):
        ask(port, about(PICTURE), stream=streamed, extra_body={"pooled_grid_size": 13})


def test_the_clients_exception_has_the_reason_and_the_server_continues(port):
    with pytest.raises(openai.BadRequestError, match="Image 1: The image cannot be read: it is broken"):
        ask(port, about(BROKEN))
    with pytest.raises(openai.NotFoundError, match='"gpt-4o" is not served here; use "deco-digits"'):
        ask(port, "Is there a 7?", extra_body={"model": "gpt-4o"})
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER


def test_other_paths_and_methods_are_refused(port):
    for method, path, status, message in [
        ("POST", "/v1/completions", 404, "There is no /v1/completions; the paths are /v1/chat/completions, /v1/mod"),
        ("POST", "/load_model", 404, "There is no /load_model;"),
        ("GET", "/docs", 404, "There is no /docs;"),
        ("POST", "/v1/chat/completions/", 404, "There is no /v1/chat/completions/;"),
        ("GET", "/health/", 404, "There is no /health/;"),
        ("PUT", "/health", 405, "/health does not accept PUT; use GET or HEAD."),
    ]:
        found, _, content = post(port, b"{}", method, path)
        assert (found, content["error"]["message"][: len(message)]) == (status, message)


# --- size, time, origin and key --------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_with_and_without_its_length(start):
    port = start(max_body_bytes=10_000)
    message = "The request has more than 10,000 bytes; send fewer or smaller images."
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        ask(port, "a" * 10_000_000)
    assert refused.value.status_code == 413
    status, _, content = post(port, (b" " * 1000 for _ in range(50)))  # chunks, without a length
    assert (status, content["error"]["message"]) == (413, message)
    assert ask(port, "Is there a 7?")


def test_a_body_that_does_not_arrive_is_408(start):
    port = start(body_timeout=0.1, max_queue=0)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
        assert slow.makefile().readline() == "HTTP/1.1 408 Request Timeout\n"
    assert ask(port, "Is there a 7?")


def test_only_json_is_read_so_that_browsers_send_a_preflight_request(port):
    status, headers, content = post(port, json.dumps({"messages": about(PICTURE)}), Content_Type="text/plain")
    assert (status, content["error"]["message"]) == (415, "The Content-Type header must be application/json.")
    status, headers, _ = post(port, None, "OPTIONS", Origin="http://evil.example")
    assert (status, [name for name in headers if "access-control" in name.lower()]) == (405, [])


def test_other_names_of_this_machine_are_refused(start):
    port = start(hosts=["localhost", "127.0.0.1"])
    for host, status in [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("evil.example", 400),
        ("evil-localhost", 400),
        ("localhost.evil.example", 400),
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/v1/models", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()


def test_an_api_key_is_required(start):
    port = start(api_key="s\xe9same")
    with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
        ask(port, "Is there a 7?")
    for wrong in ("Bearer s\xe9same2", "Bearer sesame", "s\xe9same"):
        assert post(port, None, "GET", "/v1/models", Authorization=wrong.encode())[0] == 401
    assert post(port, None, "GET", "/v1/models", Authorization="Bearer s\xe9same".encode())[0] == 200
    assert post(port, None, "GET", "/health")[0] == 200
    port = start(api_key="sesame")
    with client(port, api_key="sesame") as asking:
        assert asking.models.list().data


# --- errors of the model ---------------------------------------------------------------------------------------------


def test_errors_of_the_model_are_500_and_the_server_continues(port, shipped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shipped[0], "generate", lambda **kwargs: torch.zeros(1, device="meta").item())
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            ask(port, about(PICTURE))
    assert answer(port, about(PICTURE, question=COLOUR_QUESTION)) == COLOUR_ANSWER


def test_nan_logits_are_an_error_of_the_server(port, shipped):
    def spoil(module, args, outputs):
        outputs.logits = outputs.logits * float("nan")
        return outputs

    hook = shipped[0].register_forward_hook(spoil)
    with pytest.raises(openai.InternalServerError, match="logits are NaN"):
        ask(port, about(PICTURE))
    hook.remove()


def test_an_error_ends_a_stream(port, shipped, steps):
    class Break(Exception):
        pass

    def fail(module, args):
        if len(steps) == 4:
            raise Break

    hook = shipped[0].register_forward_pre_hook(fail)
    pieces = []
    with client(port) as asking, pytest.raises(openai.APIError, match="An error ended the answer early"):
        pieces.extend(asking.chat.completions.create(model=NAME, messages=about(PICTURE), stream=True))
    hook.remove()
    assert len(pieces) == 4  # the role, and a piece for each step
    assert ask(port, about(PICTURE), max_tokens=1)
