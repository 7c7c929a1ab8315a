# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Read the frames of videos of every kind, one at a time.

Video files are decoded by PyAV (`pip install "modeling-deco[video]"`), animated pictures by Pillow. Read untrusted
videos with `inference.picture_reader`, in a process that can be killed: a decoder may take any time for one frame.

This file is saved with every checkpoint for `trust_remote_code=True`. Without PyAV it needs only Pillow and NumPy.
"""

import os
import re
import tempfile
import time
import urllib.request
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .pixels import channels_first, local, read_image, to_8_bit, to_numpy, to_rgb

MAX_BYTES = 2**30  # of a download, a pipe or any other source that cannot seek
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192
_MOST_TIMES = 2**22  # at which frames are looked up, however high the rate is
MAX_PACKETS = 10_000_000  # a packet is an encoded frame: 46 hours at 60 frames per second

_TEXT = "it is a file that was opened as text: open it in binary mode"
_CONNECTION_TIMEOUT = 15.0  # seconds, for each step of a download
_ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
_PICTURES = (*_ANIMATIONS, "JPEG", "BMP", "TIFF", "PPM", "JPEG2000")
# FFmpeg's names of the containers that are read. It has 300 more: playlists and lists of files, which would make it
# open other files and addresses, and formats of one game each. Files without pictures are named to say what they lack.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,flv,asf,ogg,mjpeg,mxf,rm,dv,"
    "wav,mp3,flac,aac,w64,aiff,amr,ac3"
)
# MP4 and QuickTime, Matroska and WebM, AVI, FLV, ASF, Ogg, MPEG streams, H.264 and H.265
_VIDEO_BEGINNING = re.compile(
    rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|0&\xb2u\x8ef\xcf\x11|OggS"
    rb"|\0\0\x01[\xb3\xba\xb0]|G.{187}G.{187}G|\0\0(?:\0)?\x01[\x06\x09\x27\x67\x40\x46]",
    re.DOTALL,
)
_PICTURE_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"}
_WORTH_A_SEEK = 30  # frames: fewer are decoded, and not skipped


class PreparedVideo:
    """A video that was read and prepared for the model, or encoded by it. The processor takes it as a video.

    It is no dataclass, because transformers' chat templates make dicts of those.

    Args:
        size: its row of `pooled_video_sizes`.
        frame_size: `(height, width)` of its prepared frames.
        seconds: when each frame is shown.
        pixels: `(num_frames, 3, height, width)`; None if the video is encoded.
        features: `(num_tokens, text_hidden_size)` from `get_video_features`; None if it is not encoded.
    """

    def __init__(
        self,
        size: list[int],
        frame_size: tuple[int, int],
        seconds: list[float],
        pixels: Any = None,
        features: Any = None,
    ):
        self.size, self.frame_size, self.seconds = size, frame_size, seconds
        self.pixels, self.features = pixels, features


def looks_like_video(beginning: bytes) -> bool:
    """Whether a file that begins like this, with 512 bytes or more, is a video and not a picture."""
    brands = {beginning[8:12], *(beginning[place : place + 4] for place in range(16, 64, 4))}
    return bool(_VIDEO_BEGINNING.match(beginning)) and not brands & _PICTURE_BRANDS


def in_chunks(frames: Iterable, length: int) -> Iterator[list]:
    """Lists of so many frames; the last one may be shorter."""
    remaining = iter(frames)
    while chunk := list(islice(remaining, length)):
        yield chunk


def read_video(
    source,
    fps: float = 1.0,
    max_frames: int = 64,
    *,
    channels: str | None = None,
    timeout: float = 600.0,
    max_pixels: int = MAX_PIXELS,
    num_threads: int = 0,
) -> Iterator[tuple[float, Image.Image]]:
    """Read a video and yield frames of it, one at a time, so that memory does not depend on its length.

    The frames are those on the screen at 0, 1 / fps, 2 / fps, ... seconds, and none is given twice. If they are more
    than `max_frames`, the frames are spread evenly from the first to the last.

    Args:
        source: a path, `http:`, `https:`, `file:` or `data:` URL, an encoded video as bytes, a binary file, or an
            undecoded video of `datasets` (`{"bytes": ..., "path": ...}`): a video file or an animated picture; another
            picture is a video of one frame. Or frames: a list of what `read_image` takes, an array or tensor
            `(frames, height, width, 3)` or `(frames, 3, height, width)`. Frames are taken as they are, `fps` of them a
            second, or spread evenly if they are more than `max_frames`.
        fps: frames per second.
        max_frames: the largest number of frames.
        channels: `"first"` or `"last"`, the position of an array's channels if the shape is ambiguous.
        timeout: seconds of reading. The time that the caller takes between frames does not count.
        max_pixels: width times height of a frame.
        num_threads: threads of the decoder. Default: as many as there are cores.

    Yields:
        Seconds from the first frame to this one, and the frame as `to_rgb` makes it, upright.

    Raises:
        ImportError: PyAV is not installed, and the source is a video file.
        ValueError: the source is not a video, is broken, too large, or takes too long.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps!r} must be a positive number")
    if isinstance(max_frames, bool) or max_frames != int(max_frames) or max_frames < 1:
        raise ValueError(f"max_frames={max_frames!r} must be a positive integer")
    if isinstance(source, (list, tuple)) or hasattr(source, "shape") and hasattr(source, "dtype"):
        yield from _given_frames(source, fps, max_frames, channels)
        return
    timer = _Timer(timeout)
    try:
        with _opened(source, timer) as file:
            picture = _picture(file, max_pixels)
            clip = _Film(file, timer, max_pixels, num_threads) if picture is None else _Animation(picture, timer)
            for seconds, frame in clip.frames(_sampled(clip.starts, clip.end, fps, max_frames)):
                with timer.paused():
                    yield seconds, frame
    except (OSError, HTTPException) as error:
        raise ValueError(_one_line(error)) from error


def _given_frames(frames, fps, max_frames, channels) -> Iterator[tuple[float, Image.Image]]:
    if len(frames) == 0:
        raise ValueError("it has no frames")
    indices = np.linspace(0, len(frames) - 1, min(len(frames), int(max_frames))).round().astype(int).tolist()
    if isinstance(frames, (list, tuple)):
        for index in indices:
            try:
                yield index / fps, read_image(frames[index], channels)
            except (ValueError, OSError) as error:
                raise ValueError(f"its frame {index + 1} cannot be read: {_one_line(error)}") from error
        return
    if len(frames.shape) != 4:
        raise ValueError(
            f"its shape {tuple(frames.shape)} is not a video's: it needs (frames, height, width, channels) or "
            f"(frames, channels, height, width)"
        )
    sampled = to_8_bit(to_numpy(frames[indices]))  # together, since the largest value of all determines the scale
    layout = "first" if channels_first(sampled.shape[1:], channels) else "last"
    for index, frame in zip(indices, sampled, strict=True):
        yield index / fps, read_image(frame, layout)


def _sampled(starts, end: float, fps: float, max_frames: int) -> list[int]:
    """The indices of the frames to give, from the seconds at which each frame starts and the last one ends."""
    most = min(int(max_frames), _MOST_TIMES)
    if end * fps <= most:
        times = np.arange(max(1, np.ceil(end * fps - 1e-6))) / fps
    else:
        times = np.linspace(0, starts[-1], most)
    # many containers round times to milliseconds: a frame that starts so little later is meant
    shown = np.searchsorted(starts, times + 1e-3, side="right") - 1
    return np.unique(shown).tolist()


# --- animated pictures -----------------------------------------------------------------------------------------------


def _picture(file: BinaryIO, max_pixels: int) -> Image.Image | None:
    """The file as a picture that Pillow reads, or None."""
    try:
        picture = Image.open(file, formats=_PICTURES)
    except (Image.UnidentifiedImageError, OverflowError):
        file.seek(0)
        return None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"it has more than the {max_pixels:,} pixels allowed") from None
    _check_size(picture.width, picture.height, max_pixels)
    return picture


class _Animation:
    """The frames of a picture. Of formats with several unrelated pictures in a file, it is the first."""

    def __init__(self, picture: Image.Image, timer: "_Timer"):
        self.picture = picture
        self.timer = timer
        self.starts, self.end = array("d"), 0.0
        while picture.format in _ANIMATIONS or not self.starts:
            timer.check()
            try:
                self._go_to(len(self.starts))
            except EOFError:
                break
            except ValueError:
                if not self.starts:
                    raise
                break
            self.starts.append(self.end)
            self.end += (picture.info.get("duration") or 100) / 1000  # browsers show a frame without duration so long

    def _go_to(self, index: int) -> None:
        try:
            self.picture.seek(index)
            self.picture.load()  # for WebP and AVIF, this finds the duration
        except EOFError:
            raise
        except Exception as error:  # decoders raise many kinds of errors on broken files
            raise ValueError(f"it is broken ({_one_line(error)})") from error

    def frames(self, indices: list[int]) -> Iterator[tuple[float, Image.Image]]:
        for index in indices:
            self.timer.check()
            self._go_to(index)
            yield self.starts[index], to_rgb(self.picture)


# --- video files -----------------------------------------------------------------------------------------------------


class _Film:
    """The frames of a video file.

    All packets are read once without decoding them, since the number of frames and the duration in a header may be
    missing or wrong. Decoding then skips to the key frames that it needs.
    """

    def __init__(self, file: BinaryIO, timer: "_Timer", max_pixels: int, num_threads: int):
        try:
            import av
        except ModuleNotFoundError:
            raise ImportError('Videos are read with PyAV: pip install "modeling-deco[video]"') from None
        self.av = av
        self.file = file
        self.timer = timer
        self.max_pixels = max_pixels
        self.num_threads = num_threads
        self.times = array("q")  # in units of the stream's time base, sorted; empty if packets have no times
        self.keys: list[tuple[int, int]] = []  # presentation and decoding time of each key frame, sorted
        with self._opened() as (container, stream):
            num_packets, duration = self._index(container, stream)
            rate = stream.guessed_rate or stream.average_rate or 25
            base = float(stream.time_base or 0)
        if num_packets == 0:
            raise ValueError("it is broken (it has no frames)")
        if self.times and base:
            first, last = self.times[0], self.times[-1]
            self.starts = (np.array(self.times) - first) * base
            last_duration = duration or (last - first) / max(1, num_packets - 1)
            self.end = float(self.starts[-1]) + (last_duration * base or 1 / float(rate))
        else:
            self.times = array("q")
            self.starts = np.arange(num_packets) / float(rate)
            self.end = num_packets / float(rate)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        self.file.seek(0)
        # The file itself is read through `file`, so no protocol is needed.
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
        try:
            container = self.av.open(self.file, container_options=options)
        except (self.av.FFmpegError, ValueError, TypeError) as error:
            raise ValueError(f"its content is not a video that can be read ({_one_line(error)})") from error
        with container:
            covers = self.av.stream.Disposition.attached_pic  # pictures in an audio file
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                what = "only sound" if container.streams.audio else "no pictures"
                raise ValueError(f"it is not a video: it has {what}")
            context = streams[0].codec_context
            if context is None:
                raise ValueError("it has a codec that PyAV does not decode")
            _check_size(context.width, context.height, self.max_pixels)
            context.options = {"max_pixels": str(self.max_pixels)}
            context.thread_type = "AUTO"
            context.thread_count = self.num_threads
            yield container, streams[0]

    def _index(self, container, stream) -> tuple[int, int]:
        """Read the packets. Return their number and the duration of the last one."""
        num_packets, duration, has_times = 0, 0, True
        for packet in self._packets(container, stream):
            if packet.size == 0 or packet.is_discard:
                continue
            num_packets += 1
            if num_packets > MAX_PACKETS:
                raise ValueError(f"it has more than the {MAX_PACKETS:,} frames allowed")
            start = packet.dts if packet.pts is None else packet.pts
            if start is None:
                has_times = False
                continue
            if not self.times or start >= self.times[-1]:
                duration = packet.duration or 0
            self.times.append(start)
            if packet.is_keyframe:
                self.keys.append((start, start if packet.dts is None else min(start, packet.dts)))
        self.times = array("q", np.sort(self.times).tolist() if has_times else ())
        self.keys = sorted(self.keys)
        return num_packets, duration

    def _packets(self, container, stream):
        packets = container.demux(stream)
        while True:
            self.timer.check()
            try:
                packet = next(packets)
            except (StopIteration, self.av.FFmpegError):  # an error is where a broken file ends
                return
            yield packet

    def frames(self, indices: list[int]) -> Iterator[tuple[float, Image.Image]]:
        found = self._by_time(indices) if self.times else self._by_number(indices)
        is_empty = True
        for start, frame in found:
            _check_size(frame.width, frame.height, self.max_pixels)
            yield float(self.starts[start]), _to_picture(frame, self.av)
            is_empty = False
        if is_empty:
            raise ValueError("it is broken (none of its frames can be decoded)")

    def _by_number(self, indices: list[int]):
        with self._opened() as (container, stream):
            wanted = set(indices)
            for number, frame in enumerate(self._decoded(container, stream)):
                if number in wanted:
                    yield number, frame
                if number >= indices[-1]:
                    return

    def _by_time(self, indices: list[int]):
        with self._opened() as (container, stream):
            decoded, place, can_seek = self._decoded(container, stream), -1, True
            for index in indices:
                if index <= place:  # the frame before was broken, and this one was given in its stead
                    continue
                key = bisect_right(self.keys, (self.times[index], float("inf"))) - 1
                if can_seek and key >= 0 and bisect_left(self.times, self.keys[key][0]) - place > _WORTH_A_SEEK:
                    try:
                        container.seek(self.keys[key][1], stream=stream)
                        decoded = self._decoded(container, stream)
                    except self.av.FFmpegError:
                        can_seek = False
                for frame in decoded:
                    time_of_frame = frame.dts if frame.pts is None else frame.pts
                    if time_of_frame is not None and time_of_frame >= self.times[index]:
                        place = bisect_right(self.times, time_of_frame) - 1
                        yield place, frame
                        break

    def _decoded(self, container, stream):
        for packet in self._packets(container, stream):
            try:
                yield from packet.decode()
            except self.av.FFmpegError:  # a broken packet
                continue


def _to_picture(frame, av) -> Image.Image:
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    picture = Image.fromarray(frame.to_ndarray(format="rgba" if has_alpha else "rgb24"))
    # frame.side_data would refer to the frame, which then keeps its decoder and threads until garbage is collected
    side_data = av.sidedata.sidedata
    matrix = side_data.SideDataContainer(frame).get(side_data.Type.DISPLAYMATRIX)
    if matrix is not None:
        a, b, _, c, d = np.sign(np.frombuffer(bytes(matrix), np.int32)[:5]).tolist()
        turned = _TURNS.get((a, b, c, d))
        picture = picture if turned is None else picture.transpose(turned)
    return to_rgb(picture)


# The display matrix moves a pixel (x, y) to (a x + c y, b x + d y). By the signs of a, b, c, d:
_TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


# --- sources ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source, timer: "_Timer") -> Iterator[BinaryIO]:
    """The source as a binary file that can seek."""
    if isinstance(source, dict) and (source.get("bytes") or source.get("path")):
        source = source.get("bytes") or source["path"]
    if isinstance(source, str) and source.partition(":")[0].lower() in ("http", "https"):
        request = urllib.request.Request(source, headers={"User-Agent": "modeling-deco"})
        with (
            urllib.request.urlopen(request, timeout=_CONNECTION_TIMEOUT) as response,
            _copied(response, timer) as file,
        ):
            yield file
        return
    if isinstance(source, str):
        source = local(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = BytesIO(source)
    if isinstance(source, os.PathLike):
        if os.path.isdir(source):
            raise ValueError("it is a folder")
        with open(source, "rb") as opened, _seekable(opened, timer) as file:
            yield file
    elif hasattr(source, "read"):
        with _seekable(source, timer) as file:
            yield file
    else:
        raise ValueError("it is not a path, URL, bytes, binary file, list of frames, array or tensor")


@contextmanager
def _seekable(source, timer: "_Timer") -> Iterator[BinaryIO]:
    try:
        is_empty = source.seek(0, os.SEEK_END) == 0
        source.seek(0)
        is_text = not isinstance(source.read(0), bytes)
    except (AttributeError, OSError):  # a pipe
        with _copied(source, timer) as file:
            yield file
        return
    if is_text:
        raise ValueError(_TEXT)
    if is_empty:
        raise ValueError("it is empty")
    yield source


@contextmanager
def _copied(source, timer: "_Timer") -> Iterator[BinaryIO]:
    """A temporary file with the content of a download or a pipe."""
    with tempfile.TemporaryFile() as file:
        while piece := source.read(2**20):
            timer.check()
            if not isinstance(piece, bytes):
                raise ValueError(_TEXT)
            if file.write(piece) and file.tell() > MAX_BYTES:
                raise ValueError(f"it has more than the {MAX_BYTES / 2**20:.4g} MiB allowed")
        if file.tell() == 0:
            raise ValueError("it is empty")
        file.seek(0)
        yield file


class _Timer:
    """A limit on the time that reading takes, without the time of the caller between frames."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise ValueError(f"reading it takes longer than {self.seconds:g} seconds")

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.deadline += time.monotonic() - start


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"its {width} x {height} pixels are more than the {max_pixels:,} allowed")


def _one_line(error: Exception) -> str:
    """The reason alone: an OSError would also show its number."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
