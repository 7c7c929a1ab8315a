# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Frames of videos: which ones, at which seconds, and upright; and one line for what is not a video."""

import base64
import builtins
import gc
import io
import itertools
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pytest
import tiny
import tiny_videos
import torch
from PIL import Image

from modeling_deco import videos
from modeling_deco.videos import read_video

VIDEO = tiny_videos.video(20)  # two seconds


def seconds(found) -> list[float]:
    return [round(start, 3) for start, _ in found]


# --- which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 10]),
        ({"fps": 2.5}, [0, 4, 8, 12, 16]),
        ({"fps": 100}, list(range(20))),  # no frame is given twice
        ({"fps": 1e9, "max_frames": 10**12}, list(range(20))),
        ({"fps": 0.1}, [0]),
        ({"fps": 10, "max_frames": 20}, list(range(20))),
        ({"fps": 10, "max_frames": 3}, [0, 9, 19]),
        ({"max_frames": 1}, [0]),
    ],
    ids=str,
)
def test_frames_are_sampled_by_the_second_or_spread_evenly(options, expected):
    found = list(read_video(VIDEO, **options))
    assert [round(10 * start) for start, _ in found] == expected
    assert tiny_videos.numbers(found) == [frame % 13 for frame in expected]
    assert {(picture.mode, picture.size) for _, picture in found} == {("RGB", (32, 32))}


@pytest.mark.parametrize(
    "options",
    [
        {"container": "matroska", "codec": "mpeg4"},  # has no duration where it cannot seek back to write it
        {"container": "webm", "codec": "libvpx-vp9"},  # times are rounded to milliseconds
        {"container": "mpegts"},
        {"container": "avi", "codec": "libx264"},
        {"container": "flv"},
        {"container": "h264"},  # a stream without times
        {"container": "mp4", "pixels": "yuv420p10le"},
        {"container": "mp4", "pixels": "yuv444p"},
    ],
    ids=str,
)
def test_every_container_gives_the_same_frames(options):
    encoded = tiny_videos.encode(tiny_videos.frames(12, size=(34, 30)), rate=30, **options)
    found = list(read_video(encoded, fps=10))
    assert tiny_videos.numbers(found) == [0, 3, 6, 9]
    assert seconds(found) == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-3)
    assert tiny_videos.numbers(read_video(encoded, fps=30)) == list(range(12))


@pytest.mark.parametrize(
    "options",
    [{"container": "mp4"}, {"container": "matroska"}, {"container": "mpegts"}, {"container": "flv"}],
    ids=str,
)
def test_a_jump_to_a_key_frame_gives_the_frames_that_decoding_all_gives(options, monkeypatch):
    encoded = tiny_videos.encode(tiny_videos.frames(60), rate=30, g=10, bf=2, **options)
    expected = [(start, picture.tobytes()) for start, picture in read_video(encoded, fps=30, max_frames=7)]
    jumps = []
    monkeypatch.setattr(videos, "_WORTH_A_SEEK", 0)
    decoded = videos._Film._decoded
    monkeypatch.setattr(videos._Film, "_decoded", lambda *args: jumps.append(1) or decoded(*args))
    assert [(start, picture.tobytes()) for start, picture in read_video(encoded, fps=30, max_frames=7)] == expected
    assert len(jumps) > 4


def test_a_frame_that_stays_on_the_screen_is_given_once():
    encoded = tiny_videos.encode(tiny_videos.frames(4), times=[0, 0.1, 3.9, 4])
    found = list(read_video(encoded))
    assert tiny_videos.numbers(found) == [0, 1, 3]
    assert seconds(found) == [0, 0.1, 4]


def test_a_video_of_one_frame():
    (found,) = read_video(tiny_videos.video(1))
    assert (found[0], found[1].size) == (0, (32, 32))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animated_picture_is_a_video(file_format):
    found = list(read_video(tiny_videos.animation(12, file_format), fps=5))
    assert tiny_videos.numbers(found) == [0, 2, 4, 6, 8, 10]
    assert seconds(found) == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_a_picture_is_a_video_of_one_frame():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    tiny.picture(0).save(file, "JPEG", exif=exif)
    (found,) = read_video(file.getvalue())
    assert (found[0], found[1].size) == (0, (30, 40))


# --- upright RGB -----------------------------------------------------------------------------------------------------

CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), CORNERS),
        ((0, 1, -1, 0), np.rot90(CORNERS, -1)),  # a phone held upright
        ((-1, 0, 0, -1), np.rot90(CORNERS, 2)),
        ((0, -1, 1, 0), np.rot90(CORNERS)),
        ((-1, 0, 0, 1), CORNERS[:, ::-1]),
        ((0, 1, 1, 0), CORNERS.swapaxes(0, 1)),
    ],
    ids=str,
)
def test_a_turned_video_is_upright(matrix, expected):
    encoded = tiny_videos.encode([CORNERS], codec="libx264rgb", pixels="rgb24", crf=0)
    (found,) = read_video(tiny_videos.turned(encoded, matrix))
    np.testing.assert_array_equal(np.asarray(found[1]), expected)


def test_transparent_parts_are_white():
    pixels = np.full((32, 32, 4), (250, 0, 0, 255), np.uint8)
    pixels[:16, :, 3] = 0
    encoded = tiny_videos.encode([pixels], container="matroska", codec="ffv1", pixels="bgra", source_format="rgba")
    (found,) = read_video(encoded)
    assert (found[1].getpixel((5, 5)), found[1].getpixel((5, 25))) == ((255, 255, 255), (250, 0, 0))


# --- sources ---------------------------------------------------------------------------------------------------------


class Pipe(io.RawIOBase):
    """A binary file that cannot seek, and never ends if it has no content."""

    def __init__(self, content: bytes | None):
        self.file = None if content is None else io.BytesIO(content)

    def seek(self, *args):
        raise OSError("Illegal seek")

    def read(self, size=-1):
        return bytes(size) if self.file is None else self.file.read(size)


@pytest.fixture
def served(loopback):
    """A server of videos, whose `/endless` sends one that never ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/clip.mp4", "/endless") else 404)
            self.end_headers()
            pieces = itertools.repeat(bytes(2**16)) if self.path == "/endless" else [VIDEO]
            try:
                for piece in pieces:
                    self.wfile.write(piece)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_way_in_gives_the_same_frames(served, tmp_path):
    path = tmp_path / "clip"
    path.write_bytes(VIDEO)
    expected = [(start, picture.tobytes()) for start, picture in read_video(VIDEO)]
    data_url = "data:video/mp4;base64," + base64.b64encode(VIDEO).decode()
    ways = [
        path, str(path), path.as_uri(), f"{served}/clip.mp4", data_url,
        bytearray(VIDEO), io.BytesIO(VIDEO), Pipe(VIDEO), {"bytes": VIDEO, "path": None}, {"path": str(path)},
    ]  # fmt: skip
    for way in ways:
        assert [(start, picture.tobytes()) for start, picture in read_video(way)] == expected, type(way)


def test_frames_are_taken_as_they_are():
    pictures = tiny_videos.frames(10)
    array = np.stack(pictures)
    ways = [pictures, [Image.fromarray(frame) for frame in pictures], array, torch.tensor(array)]
    ways += [array.transpose(0, 3, 1, 2), torch.tensor(array).permute(0, 3, 1, 2) / 255]
    for way in ways:
        assert tiny_videos.numbers(read_video(way, fps=2, max_frames=10)) == list(range(10))
        found = list(read_video(way, fps=2, max_frames=4))
        assert tiny_videos.numbers(found) == [0, 3, 6, 9]
        assert seconds(found) == [0, 1.5, 3, 4.5]


# --- what is refused -------------------------------------------------------------------------------------------------


def files() -> dict[str, tuple[bytes, str]]:
    whole = tiny_videos.encode(tiny_videos.frames(20), movflags="faststart")
    no_pictures = tiny_videos.encode(tiny_videos.frames(20), container="matroska")
    return {
        "empty": (b"", r"it is empty"),
        "text": (b"once upon a time\n" * 100, r"its content is not a video that can be read"),
        "noise": (np.random.default_rng(0).bytes(5000), r"its content is not a video that can be read"),
        "sound": (tiny_videos.sound(), r"it is not a video: it has only sound"),
        "MP4 without its index": (VIDEO[: len(VIDEO) // 2], r"its content is not a video that can be read"),
        "MP4 of an index alone": (whole[: whole.index(b"mdat") + 4], r"its content is not a video that can be read"),
        "broken packets": (
            no_pictures[:600] + bytes(len(no_pictures) - 600),
            r"it is broken \((it has no frames|none of its frames can be decoded)\)",
        ),
        "broken picture": (
            tiny_videos.animation(3, "WEBP")[:120],
            r"could not create decoder object",
        ),
    }


FILES = files()


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_video_is_refused_with_the_reason(name):
    encoded, reason = FILES[name]
    with pytest.raises(ValueError, match=reason) as error:
        list(read_video(encoded))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no-such-file.mp4", "there is no such file"),
        ([], "it has no frames"),
        (np.zeros((0, 8, 8, 3)), "it has no frames"),
        (np.zeros((8, 8, 3)), r"its shape \(8, 8, 3\) is not a video's"),
        ([np.zeros((8, 8, 3)), np.zeros(8)], r"its frame 2 cannot be read: its shape \(8,\) is not a picture's"),
        (3, "it is not a path, URL, bytes, binary file, list of frames, array or tensor"),
        (io.StringIO("text"), "it is a file that was opened as text: open it in binary mode"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_source_that_is_no_video_is_refused(source, reason):
    with pytest.raises(ValueError, match=reason):
        list(read_video(source))


def test_a_folder_is_refused(tmp_path):
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match="it is a folder"):
            list(read_video(folder))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fps": 0}, "fps=0 must be a positive number"),
        ({"fps": float("nan")}, "fps=nan must be a positive number"),
        ({"max_frames": 0}, "max_frames=0 must be a positive integer"),
        ({"max_frames": 2.5}, "max_frames=2.5 must be a positive integer"),
    ],
)
def test_options_are_checked(options, reason):
    with pytest.raises(ValueError, match=reason):
        next(read_video(VIDEO, **options))


def test_a_truncated_video_gives_the_frames_that_it_has():
    encoded = tiny_videos.encode(
        tiny_videos.frames(20), container="matroska", codec="mjpeg", pixels="yuvj420p", qscale=2
    )
    found = tiny_videos.numbers(read_video(encoded[: len(encoded) // 2], fps=10))
    assert found == list(range(len(found)))
    assert 5 < len(found) < 15


def test_an_absurd_duration_in_the_header_changes_nothing():
    encoded = tiny_videos.encode(tiny_videos.frames(20), container="matroska")
    place = encoded.index(b"\x44\x89\x88") + 3
    absurd = encoded[:place] + struct.pack(">d", 1e15) + encoded[place + 8 :]
    with av.open(io.BytesIO(absurd)) as container:
        assert container.duration > 1e15
    assert tiny_videos.numbers(read_video(absurd, fps=5, max_frames=10)) == [0, 2, 4, 6, 8, 10, 12, 1, 3, 5]


def test_absurd_times_take_no_time():
    encoded = tiny_videos.encode(tiny_videos.frames(3), container="matroska", codec="mpeg4", times=[0, 1, 10_000_000])
    assert seconds(read_video(encoded)) == [0, 1, 10_000_000]


def test_a_video_that_was_read_leaves_no_decoder_behind():
    """Otherwise its threads remain until garbage is collected, and a process that reads many videos gets no more."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            list(read_video(VIDEO))
        assert not [kind for kind in map(type, gc.get_objects()) if kind is av.VideoFrame]
    finally:
        gc.enable()


def test_an_endless_source_is_refused(served, monkeypatch):
    monkeypatch.setattr(videos, "MAX_BYTES", 2**22)
    for source in (Pipe(None), f"{served}/endless"):
        with pytest.raises(ValueError, match="it has more than the 4 MiB allowed"):
            list(read_video(source))
    with pytest.raises(ValueError, match="HTTP Error 404"):
        list(read_video(f"{served}/other"))


def test_limits_on_frames_pixels_and_time(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(videos, "MAX_PACKETS", 5)
        with pytest.raises(ValueError, match="it has more than the 5 frames allowed"):
            list(read_video(VIDEO))
    for encoded in (VIDEO, tiny_videos.animation(2, "GIF")):
        with pytest.raises(ValueError, match="its 32 x 32 pixels are more than the 1,000 allowed"):
            list(read_video(encoded, max_pixels=1000))
    with pytest.raises(ValueError, match="reading it takes longer than 0 seconds"):
        list(read_video(VIDEO, timeout=0))


def test_the_time_of_the_caller_does_not_count():
    reading = read_video(VIDEO, fps=10, timeout=0.5)
    next(reading)
    time.sleep(0.6)
    assert len(list(reading)) == 19


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "content", "playlist_format"),
    [
        ("list.m3u8", PLAYLIST, "hls"),
        ("list.ffconcat", "ffconcat version 1.0\nfile '{path}'\n", "concat"),
        ("list.mp4", PLAYLIST, "hls"),
    ],
)
def test_a_playlist_cannot_read_other_files(name, content, playlist_format, tmp_path):
    secret = tmp_path / "secret.ts"
    secret.write_bytes(tiny_videos.video(5, container="mpegts"))
    path = tmp_path / name
    path.write_text(content.format(path=secret))
    options = {"safe": "0"} if playlist_format == "concat" else {"extension_picky": "0"}
    with av.open(str(path), format=playlist_format, options=options) as container:  # FFmpeg itself would read it
        assert next(container.decode(video=0)).width == 32
    for source in (path, path.read_bytes(), path.as_uri()):
        with pytest.raises(ValueError, match="its content is not a video that can be read"):
            list(read_video(source))


def test_without_pyav_a_video_says_what_to_install(monkeypatch):
    def without(name, *args, _import=builtins.__import__, **kwargs):
        if name.partition(".")[0] == "av":
            raise ModuleNotFoundError(name)
        return _import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'^Videos are read with PyAV: pip install "modeling-deco\[video\]"$'):
        list(read_video(VIDEO))
    assert len(list(read_video(tiny_videos.animation(3, "GIF"), fps=10))) == 3
