# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of several views, and videos: with the prompt cache, at several grids, and encoded in chunks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_videos
import torch
from PIL import Image
from test_prompt_cache import assistant, same, say, user, watch

from modeling_deco.inference import ImageError, PromptCache, encode, encode_video, videos
from modeling_deco.inference.grid_answers import GridAnswers

LARGE, WIDE = tiny.picture(0, 60, 65), tiny.picture(1, 30, 100)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    """A model of each family, its processor, and what it has run."""
    model = tiny.build_family(request.param, image_positions="patch", pooled_grid_size=2)
    words = range(len(tiny.SPECIAL_TOKENS), tiny.IMAGE_TOKEN_ID)
    model.generation_config.suppress_tokens = [token for token in range(tiny.VOCAB_SIZE) if token not in words]
    model.generation_config.max_new_tokens = 4
    return model, tiny.build_family_processor(model.config), watch(model)


@pytest.fixture(scope="module")
def onevision():
    model = tiny.build_family("llava_onevision", image_positions="patch", pooled_grid_size=2)
    return model, tiny.build_family_processor(model.config)


def clip(number: int, seed: int = 0) -> list[Image.Image]:
    return [tiny.picture(seed + index, 25, 30) for index in range(number)]


# --- the prompt cache ------------------------------------------------------------------------------------------------


def test_pictures_of_views_in_a_conversation(family):
    model, processor, ran = family
    prompts = PromptCache(model)
    prompts.ran = ran
    messages = [user(WIDE, "what is this ?")]
    answer = same(prompts, encode(processor, messages))
    messages += [assistant(say(answer)), user("is this a cat ?")]
    answer = same(prompts, encode(processor, messages))
    assert ran.images == []  # the picture was in the cache
    messages += [assistant(say(answer)), user(LARGE, "what is this ?")]  # its views are padded together with those
    same(prompts, encode(processor, messages))
    if model.config.video_newline:  # OneVision tiles neither of two pictures, so both are new
        assert ran.images == [2]
    else:
        assert ran.images == [5 if model.config.image_overview else 4]


def test_a_video_in_a_conversation(family):
    model, processor, ran = family
    if model.config.video_token_id is None:
        pytest.skip("the family takes no videos")
    prompts = PromptCache(model)
    prompts.ran = ran
    encoded = encode_video(model, processor, clip(5))
    for seed, video in ((7, clip(5)), (70, encoded)):
        question = {"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "what ?"}]}
        answer = same(prompts, encode(processor, [question], add_timestamps=True))
        messages = [question, assistant(say(answer)), user("a cat ?")]
        same(prompts, encode(processor, messages, add_timestamps=True))
        assert ran.images == []
        assert ran.tokens[0] < 15  # of the second question, and of no frame
        other = {**question, "content": [{"type": "video", "video": clip(5, seed)}, question["content"][1]]}
        same(prompts, encode(processor, [other], add_timestamps=True))
        assert ran.images == [5]


# --- in chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaged", [1, 3])
def test_a_video_encoded_in_chunks_is_as_at_once(averaged, onevision, monkeypatch):
    monkeypatch.setattr(videos, "_FRAMES_PER_CHUNK", 4)
    model, processor = onevision
    options = {"pooled_video_grid_size": 2, "frames_per_token_grid": averaged}
    message = user("what ?")
    message["content"].insert(0, {"type": "video", "video": clip(10)})
    whole = encode(processor, [message], add_timestamps=True, **options)
    message["content"][0]["video"] = encoded = encode_video(model, processor, clip(10), **options)
    assert encoded.pixels is None
    chunked = encode(processor, [message], add_timestamps=True)
    assert "pixel_values_videos" not in chunked
    assert torch.equal(chunked["input_ids"], whole["input_ids"])
    pixels, sizes = whole["pixel_values_videos"], whole["pooled_video_sizes"]
    (expected,) = model.model.get_video_features(pixels, sizes).pooler_output
    torch.testing.assert_close(encoded.features, expected)
    torch.testing.assert_close(model(**chunked).logits, model(**whole).logits, rtol=1e-4, atol=1e-4)


def test_a_file_is_read_by_the_second(onevision):
    model, processor = onevision
    encoded = encode_video(model, processor, tiny_videos.video(30), fps=2, max_frames=4)
    assert encoded.size == [4, 1, 3, 3]
    np.testing.assert_allclose(encoded.seconds, [0, 1, 1.9, 2.9], atol=0.11)
    content = [{"type": "video", "video": encoded}, {"type": "image", "image": WIDE}, {"type": "text", "text": "?"}]
    inputs = encode(processor, [{"role": "user", "content": content}])
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 4 * 9 + 1
    assert torch.isfinite(model(**inputs).logits).all()


def test_videos_that_cannot_be_read_are_named(onevision, tmp_path):
    model, processor = onevision
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(ImageError, match=r"^The video '.*clip.mp4' cannot be read: its content is not a video"):
        encode_video(model, processor, str(path))
    with pytest.raises(ImageError, match=r"^The video 'none.mp4' cannot be read: there is no such file\.$"):
        encode_video(model, processor, "none.mp4")
    with pytest.raises(ValueError, match="pooled_video_grid_size"):
        encode_video(model, processor, clip(2), pooled_video_grid_size=9)
    with pytest.raises(ValueError, match="The model takes no videos"):
        encode_video(tiny.build_model(), tiny.build_processor(), clip(2))


def test_a_text_with_a_placeholder_is_refused(onevision):
    for token in ("<image>", "<video>"):
        with pytest.raises(ValueError, match=f"The text contains '{token}', which marks"):
            encode(onevision[1], [user(f"what {token} ?")])


# --- several grids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family_name", [*tiny.FAMILIES, "tiles of one view"])
def test_answers_at_several_grids_are_those_of_generate(family_name):
    if family_name in tiny.FAMILIES:
        model, options = tiny.build_family(family_name, image_positions="patch"), {}
        processor = tiny.build_family_processor(model.config)
    else:
        model, options = tiny.build_model(image_positions="patch"), {"tiles": 4}
        processor = tiny.build_processor(chat_template=tiny.CHAT_TEMPLATE, patch_size=tiny.PATCH_SIZE)
    model.generation_config.suppress_tokens = [*range(4), *range(tiny.IMAGE_TOKEN_ID, tiny.VOCAB_SIZE)]
    texts = ["what is this ?", "a cat ?"]
    answers = GridAnswers(model, processor, texts, max_new_tokens=4, **options)
    encoded = {name: answers.encode(image, texts[0]) for name, image in (("large", LARGE), ("wide", WIDE))}
    for grid in ((1, 1), (3, 2), (6, 6)):
        given = answers.answer([(encoded["large"], texts[0]), (encoded["wide"], texts[1])], grid)
        for image, name, text, answer in zip((LARGE, WIDE), encoded, texts, given, strict=True):
            inputs = encode(processor, [user(image, text)], list(grid), **options)
            assert answers.num_tokens(encoded[name], grid) == (inputs["input_ids"] == tiny.IMAGE_TOKEN_ID).sum()
            generated = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
            assert answer.text == processor.decode(generated, skip_special_tokens=True).strip()


def test_the_page_encodes_views_and_frames_once(family):
    EncodedImages = pytest.importorskip("modeling_deco.page.encoded_images", exc_type=ImportError).EncodedImages
    model, processor, ran = family
    images, ran.images = EncodedImages(model), []
    message = user(WIDE, "what is this ?")
    if model.config.video_token_id is not None:
        message["content"].insert(0, {"type": "video", "video": clip(3)})
    for grid in (1, 2, 6):
        inputs = encode(processor, [message], grid)
        expected = model.generate(**inputs)
        ran.images = []
        with images.in_use():
            found = model.generate(**inputs)
        assert torch.equal(found, expected)
        assert images.seconds["get_image_features"] > 0
        assert len(ran.images) == (len(images.kept) if grid == 1 else 0)


_MEASURE = """
import io, resource, sys
import av, numpy as np, tiny, tiny_videos, torch
from modeling_deco.inference import encode_video

torch.set_num_threads(1)
model = tiny.build_family("llava_next_video")
processor = tiny.build_family_processor(model.config)
rng = np.random.default_rng(0)
picture = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)

def measured(number):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(number):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, index, 1), "rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    before = peak()
    video = encode_video(model, processor, file.getvalue(), fps=10, max_frames=10**6)
    assert len(video.seconds) == number
    return peak() - before

measured(100)
print(measured(1500))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_video():
    """Encoding 1,500 frames takes little more memory than 100 did. Their pixels would be 330 MiB."""
    command = [sys.executable, "-c", _MEASURE]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(found.stdout.splitlines()[-1]) < 40  # MiB
