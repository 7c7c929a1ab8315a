# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""`VideoReader`: videos that others send are decoded in a process that can be killed."""

import asyncio
import base64
import sys

import pytest
import tiny_videos

from modeling_deco.inference import ImageError, VideoReader
from modeling_deco.inference.limits import ImageLimits
from modeling_deco.videos import read_video

VIDEO = tiny_videos.video(20)


@pytest.fixture(scope="module")
def reader():
    reader = VideoReader(num_decoders=1)
    yield reader
    reader.close()


def frames(found) -> list[tuple[float, bytes]]:
    return [(seconds, picture.tobytes()) for seconds, picture in found]


def test_the_other_process_gives_the_frames_that_this_one_gives(reader):
    expected = frames(read_video(VIDEO, 5, 4))
    assert reader.read_frames_sync(VIDEO, 5, 4, frames) == expected
    data_url = "data:video/mp4;base64," + base64.b64encode(VIDEO).decode()
    assert asyncio.run(reader.read_frames(data_url, 5, 4, frames)) == expected
    assert len(reader.read_frames_sync(tiny_videos.animation(6, "GIF"), 10, 64, frames)) == 6


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"no video", "its content is not a video that can be read"),
        (tiny_videos.sound(), "it is not a video: it has only sound"),
        (b"", "it is empty"),
        (b"#EXTM3U\n#EXTINF:2,\n/etc/passwd\n", "its content is not a video"),
        ("http://127.0.0.1:1/clip.mp4", r"'127.0.0.1' is not a public address"),
        ("/etc/passwd", "only http, https and data URLs are read"),
    ],
    ids=str,
)
def test_what_is_no_video_is_refused_and_the_next_one_is_read(source, reason, reader, loopback):
    with pytest.raises(ImageError, match=f"^The video.* cannot be read: {reason}"):
        reader.read_frames_sync(source, 1, 64, frames)
    assert len(reader.read_frames_sync(VIDEO, 1, 64, frames)) == 2


def test_a_video_that_takes_too_long_is_refused_and_the_next_one_is_read(reader, monkeypatch):
    slow = tiny_videos.encode(tiny_videos.frames(60, size=(640, 480)), codec="mpeg4")
    with monkeypatch.context() as patch:
        patch.setattr(reader, "limits", ImageLimits(decode_timeout=0.01))
        with pytest.raises(ImageError, match=r"it took longer than .* seconds to decode\.$"):
            reader.read_frames_sync(slow, 30, 60, frames)
    assert len(reader.read_frames_sync(VIDEO, 1, 64, frames)) == 2


def test_a_decoder_that_crashes_is_replaced(reader):
    def kill(decoded):
        next(decoded)
        reader._decoder().process.kill()  # of this thread
        return frames(decoded)

    large = tiny_videos.encode(tiny_videos.frames(12, size=(320, 240)))
    with pytest.raises(ImageError, match=r"it is broken \(the decoder crashed\)"):
        reader.read_frames_sync(large, 10, 64, kill)
    assert len(reader.read_frames_sync(VIDEO, 1, 64, frames)) == 2


def test_an_error_of_the_caller_ends_the_video(reader):
    def fail(decoded):
        next(decoded)
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        reader.read_frames_sync(VIDEO, 5, 64, fail)
    assert len(reader.read_frames_sync(VIDEO, 1, 64, frames)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not limit the memory of a process")
def test_frames_within_the_limits_are_read():
    class Limits(ImageLimits):
        decode_memory = 200 * 2**20

    large = tiny_videos.encode(tiny_videos.frames(2, size=(2048, 2048)), preset="ultrafast")
    for limits, reason in (
        (ImageLimits(max_pixels=2**21), "its 2048 x 2048 pixels are more than the 2,097,152 allowed"),
        (Limits(), "memory|start|decoder|map|video"),
    ):
        reader = VideoReader(limits, num_decoders=1)
        with pytest.raises((ImageError, RuntimeError), match=reason):
            reader.read_frames_sync(large, 10, 64, frames)
        reader.close()
