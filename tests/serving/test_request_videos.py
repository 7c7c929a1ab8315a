# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Videos of requests, and budgets of images of several views."""

import base64

import openai
import pytest
import tiny
import tiny_videos
from asking import NAME, ask, data_url, running

from modeling_deco.inference import encode, encode_video
from modeling_deco.serving import ServerOptions, build_app

VIDEO = "data:video/mp4;base64," + base64.b64encode(tiny_videos.video(40)).decode()


@pytest.fixture(scope="module")
def made():
    model = tiny.build_family("llava_next_video", pooled_grid_size=2)
    model.generation_config.suppress_tokens = [*range(4), *range(tiny.IMAGE_TOKEN_ID, tiny.VOCAB_SIZE)]
    return model, tiny.build_family_processor(model.config)


@pytest.fixture
def start_tiny(made):
    def start(**options):
        options = ServerOptions(max_new_tokens=4, temperature=0, **options)
        return running(build_app(*made, NAME, options), options)

    return start


def parts(*urls) -> list[dict]:
    content = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what ?"}]}]


def test_a_video_is_answered_as_by_the_model(made, start_tiny):
    model, processor = made
    options = {"fps": 2, "pooled_video_grid_size": [1, 2], "frames_per_token_grid": 2, "add_timestamps": True}
    video = encode_video(
        model, processor, tiny_videos.video(40), fps=2, pooled_video_grid_size=[1, 2], frames_per_token_grid=2
    )
    content = [{"type": "video", "video": video}, {"type": "text", "text": "what ?"}]
    inputs = encode(processor, [{"role": "user", "content": content}], add_timestamps=True)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    with start_tiny() as port:
        for body in options, {"mm_processor_kwargs": options}:
            found = ask(port, parts(VIDEO), extra_body=body)
            assert found.choices[0].message.content == processor.decode(expected, skip_special_tokens=True)
            assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]
        both = parts(VIDEO)
        both[0]["content"].insert(0, {"type": "image_url", "image_url": {"url": data_url(tiny.picture(0))}})
        assert ask(port, both).usage.prompt_tokens > 4 * 9


def test_budgets_of_images(start_tiny):
    message = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(tiny.picture(0))}}]}]
    with start_tiny(max_image_tokens=40) as port:
        own = ask(port, message).usage.prompt_tokens
        small = ask(port, message, extra_body={"max_image_tokens": 15}).usage.prompt_tokens
        grid = ask(port, message, extra_body={"pooled_grid_size": 1}).usage.prompt_tokens
        assert grid <= small < own <= 44


@pytest.mark.parametrize(
    ("urls", "body", "message"),
    [
        ([VIDEO] * 3, {}, r"3 videos are more than the 2 allowed in a request"),
        ([VIDEO], {"max_frames": 65}, r"max_frames is 65; it must be an integer from 1 to 64"),
        ([7], {}, r"messages\[0\].content\[0\].video_url.url is 7; it must be a string"),
        ([VIDEO], {"fps": 0}, r"fps is 0; it must be a number above 0"),
        ([VIDEO], {"pooled_video_grid_size": 7}, r"pooled_video_grid_size=7: 7 x 7 is larger than the 6 x 6 patches"),
        (["data:video/mp4;base64,AAAA"], {}, r"The video cannot be read: its content is not a video"),
        (
            ["http://127.0.0.1/a.mp4"],
            {},
            r"'http://127.0.0.1/a.mp4' cannot be read: '127.0.0.1' is not a pub",
        ),
        (["/etc/passwd"], {}, r"only http, https and data URLs are read"),
    ],
    ids=lambda value: str(value)[:40],  # not whole videos
)
def test_a_video_that_is_not_read_is_one_line(urls, body, message, start_tiny):
    with start_tiny() as port:
        with pytest.raises(openai.BadRequestError, match=message):
            ask(port, parts(*urls), extra_body=body)
        assert ask(port, parts(VIDEO)).usage.prompt_tokens > 4 * 9


def test_too_many_requests_with_videos_are_refused(start_tiny):
    with start_tiny(max_video_requests=0) as port, pytest.raises(openai.RateLimitError):
        ask(port, parts(VIDEO))
