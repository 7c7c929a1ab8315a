# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""One picture, one set of pixels: however it is stored and given, the image processor gets the same RGB image."""

import base64
import builtins
import io
import re
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from modeling_deco import DecoProcessor
from modeling_deco.pixels import image_from_array, read_image, to_8_bit, to_rgb
from modeling_deco.processing_deco import read_images

PIXELS = np.asarray(tiny.picture(0))  # (30, 40, 3)
GREY = PIXELS[..., 0]
SIX = np.array([[[250, 0, 10], [0, 200, 30]], [[0, 0, 0], [255, 255, 255]], [[9, 99, 199], [70, 60, 50]]], np.uint8)
FLIPS = {
    1: lambda grid: grid,
    2: lambda grid: grid[:, ::-1],
    3: lambda grid: grid[::-1, ::-1],
    4: lambda grid: grid[::-1],
    5: lambda grid: grid.swapaxes(0, 1),
    6: lambda grid: grid.swapaxes(0, 1)[:, ::-1],
    7: lambda grid: grid[::-1, ::-1].swapaxes(0, 1),
    8: lambda grid: grid.swapaxes(0, 1)[::-1],
}


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(width, height, depth, colour_type, rows: bytes, transparency: bytes) -> bytes:
    """A PNG of any bit depth with a tRNS chunk, which Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    lines = len(rows) // height
    data = b"".join(b"\x00" + rows[start : start + lines] for start in range(0, len(rows), lines))
    chunks = ((b"IHDR", header), (b"tRNS", transparency), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def with_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(SIX), exif=exif)


def on_white(colours, alpha) -> np.ndarray:
    alpha = np.asarray(alpha)[..., None] / 255
    return (colours * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def grey(values) -> np.ndarray:
    return np.stack([np.asarray(values, np.uint8)] * 3, axis=-1)


def stored_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """By name: a file, and the pixels that a person sees in it."""
    alpha = np.where(GREY > 128, 255, 51).astype(np.uint8)
    mask = Image.fromarray(np.where(GREY > 128, 255, 0).astype(np.uint8))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    half = Image.fromarray(PIXELS)
    half.putalpha(Image.fromarray(alpha))
    hidden = Image.fromarray(PIXELS)
    hidden.putalpha(mask)
    frames = [Image.fromarray(grey(np.full((4, 5), value))) for value in (10, 200)]
    return {
        "RGB": (encode(Image.fromarray(PIXELS)), PIXELS),
        "alpha": (encode(half), on_white(PIXELS, alpha)),
        "alpha, WebP": (encode(hidden, "WEBP", lossless=True), on_white(PIXELS, np.asarray(mask))),
        "grey and alpha": (
            encode(Image.merge("LA", (Image.fromarray(GREY), mask))),
            on_white(grey(GREY), np.asarray(mask)),
        ),
        "palette": (encode(palette), np.array([[[255, 0, 0], [0, 0, 255]]])),
        "palette with a transparent colour": (encode(palette, transparency=1), np.array([[[255, 0, 0], [255] * 3]])),
        "palette with half-transparent colours": (
            encode(palette, transparency=b"\xff\x33"),
            np.array([[[255, 0, 0], [204, 204, 255]]]),
        ),
        "1 bit": (encode(Image.fromarray(GREY > 128)), grey(np.where(GREY > 128, 255, 0))),
        "grey": (encode(Image.fromarray(GREY)), grey(GREY)),
        "grey with a transparent grey": (png(2, 1, 8, 0, b"\x07\x09", b"\x00\x07"), grey([[255, 9]])),
        "16-bit grey": (encode(Image.fromarray(GREY.astype(np.uint16) * 257)), grey(GREY)),
        "16-bit grey, dark": (encode(Image.fromarray(np.array([[0, 200, 255]], np.uint16))), grey([[0, 0, 0]])),
        "16-bit grey with a transparent grey": (
            png(2, 1, 16, 0, b"\x01\x01\x07\x07", b"\x01\x01"),
            grey([[255, 7]]),
        ),
        "16-bit RGB": (
            png(2, 1, 16, 2, b"\x01\x01\x02\x02\x03\x03\x09\x09" * 1 + b"\x08\x08\x07\x07", b"\xff" * 6),
            np.array([[[1, 2, 3], [9, 8, 7]]]),
        ),
        "16-bit RGB with a transparent colour": (
            png(2, 1, 16, 2, b"\x01\x01\x02\x02\x03\x03\x09\x12\x08\x08\x07\x07", b"\x09\x12\x08\x08\x07\x07"),
            np.array([[[1, 2, 3], [255, 255, 255]]]),
        ),
        "16-bit grey, big endian TIFF": (
            encode(Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")), "TIFF"),
            grey(GREY),
        ),
        "32-bit grey, TIFF": (encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"), grey(GREY)),
        "float from 0 to 1, TIFF": (encode(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), grey(GREY)),
        "float from 0 to 255, TIFF": (encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"), grey(GREY)),
        "CMYK, TIFF": (
            encode(Image.fromarray(np.dstack([255 - PIXELS, np.zeros_like(GREY)]), "CMYK"), "TIFF"),
            PIXELS,
        ),
        "the first frame, GIF": (
            encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            np.asarray(frames[0]),
        ),
        **{f"EXIF orientation {number}": (with_exif(number), flip(SIX)) for number, flip in FLIPS.items()},
    }


STORED = stored_pictures()


@pytest.mark.parametrize("name", STORED)
def test_a_stored_picture_is_what_a_person_sees(name):
    encoded, expected = STORED[name]
    image = read_image(encoded)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)  # twice is once


def test_a_cmyk_jpeg_of_adobe_is_not_inverted():
    colour = np.broadcast_to(np.array([200, 60, 20], np.uint8), (16, 16, 3))
    cmyk = Image.fromarray(np.dstack([255 - colour, np.zeros((16, 16), np.uint8)]), "CMYK")
    encoded = encode(cmyk, "JPEG", quality=100)
    assert b"Adobe" in encoded
    np.testing.assert_allclose(np.asarray(read_image(encoded)).astype(int), colour, atol=3)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_is_put_on_white(mode):
    image = Image.new(mode[:-1] + "A", (1, 1), (100, 51) if mode == "La" else (100, 0, 0, 51)).convert(mode)
    expected = (224, 224, 224) if mode == "La" else (224, 204, 204)  # 0.2 * 100 + 0.8 * 255
    np.testing.assert_allclose(to_rgb(image).getpixel((0, 0)), expected, atol=1)


def test_a_palette_whose_own_colours_have_alpha_is_put_on_white():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([255, 0, 0, 255, 0, 0, 255, 51], rawmode="RGBA")
    image.putpixel((0, 0), 0)
    assert [to_rgb(image).getpixel((column, 0)) for column in (0, 1)] == [(255, 0, 0), (204, 204, 255)]


def test_a_picture_given_stays_as_it_is():
    image = Image.open(io.BytesIO(with_exif(6)))
    image.load()
    size, pixels = image.size, image.tobytes()
    assert to_rgb(image).size == size[::-1]
    assert (image.size, image.tobytes(), image.getexif()[0x0112]) == (size, pixels, 6)


# --- arrays and tensors ----------------------------------------------------------------------------------------------


def as_array(kind: str, pixels: np.ndarray):
    return {
        "uint8": lambda: pixels,
        "int64": lambda: pixels.astype(np.int64),
        "uint16": lambda: pixels.astype(np.uint16) * 257,
        "int32 of 16 bit": lambda: pixels.astype(np.int32) * 257,
        "float from 0 to 1": lambda: pixels / 255,
        "float from 0 to 1, interpolated beyond": lambda: np.where(
            pixels == pixels.max(), 1.04, pixels / pixels.max()
        ),
        "float16": lambda: (pixels / 255).astype(np.float16),
        "float from 0 to 255": lambda: pixels.astype(np.float32),
        "float from 0 to 65535": lambda: pixels.astype(np.float64) * 257,
        "tensor": lambda: torch.tensor(pixels),
        "tensor from 0 to 1": lambda: torch.tensor(pixels) / 255,
        "tensor that requires a gradient": lambda: (torch.tensor(pixels) / 255).requires_grad_(),
        "uint16 tensor": lambda: torch.tensor(pixels.astype(np.uint16) * 257),
    }[kind]()


KINDS = [
    "uint8", "int64", "uint16", "int32 of 16 bit", "float from 0 to 1", "float16", "float from 0 to 255",
    "float from 0 to 65535", "tensor", "tensor from 0 to 1", "tensor that requires a gradient", "uint16 tensor",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["height, width", "h, w, 1", "1, h, w", "h, w, 3", "3, h, w", "h, w, 4", "4, h, w"])
def test_an_array_or_tensor_has_the_pixels_of_the_picture(layout, kind):
    pixels, expected = (PIXELS, PIXELS) if "3" in layout else (GREY, grey(GREY))
    if "1" in layout:
        pixels = GREY[..., None]
    if "4" in layout:
        alpha = np.where(GREY > 128, 255, 0).astype(np.uint8)
        pixels, expected = np.dstack([PIXELS, alpha]), on_white(PIXELS, alpha)
    if layout.endswith("h, w"):
        pixels = pixels.transpose(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(read_image(as_array(kind, pixels))), expected)


def test_truth_values_are_black_and_white():
    np.testing.assert_array_equal(np.asarray(read_image(GREY > 128)), grey(np.where(GREY > 128, 255, 0)))


def test_bfloat16_is_read():
    expected = np.full((5, 6, 3), 128)
    np.testing.assert_array_equal(np.asarray(read_image(torch.full((3, 5, 6), 0.5, dtype=torch.bfloat16))), expected)


def test_interpolation_beyond_the_range_changes_only_what_lies_beyond():
    values = np.array([[-0.03, 0.5, 1.04]], np.float32)
    assert to_8_bit(values).tolist() == [[0, 128, 255]]
    assert to_8_bit(values * 255).tolist() == [[0, 128, 255]]


def test_16_bit_is_scaled_by_its_own_largest_value():
    assert to_8_bit(np.array([0, 256, 257, 65278, 65535], np.uint16)).tolist() == [0, 0, 1, 254, 255]


def test_what_is_no_number_is_black_or_white():
    assert to_8_bit(np.array([np.nan, np.inf, -np.inf, 0.2])).tolist() == [0, 255, 0, 51]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 40, 3), np.uint8), r"channels may be first or last in the shape \(3, 40, 3\): say input_data"),
        (np.zeros((30, 40, 5), np.uint8), r"its shape \(30, 40, 5\) is not a picture's: it needs 1 to 4 channels"),
        (np.zeros(30, np.uint8), r"its shape \(30,\) is not a picture's"),
        (np.zeros((0, 40, 3), np.uint8), r"its shape \(0, 40, 3\) has no pixels"),
        (np.full((4, 5), -1.0), "its values from -1 to 0 are not pixels"),
        (
            torch.linspace(-2.1, 2.6, 60).reshape(3, 4, 5)[:, :, :5].reshape(3, 20, 1)[..., 0],
            "from -2.1 to 2.6 are not",
        ),
        (np.full((5, 6), 70000), "its values from 0 to 70000 are not pixels from 0 to 1, 255 or 65535"),
        (np.full((5, 6), 1e6), r"its values from 0 to 1e\+06 are not pixels"),
        (np.full((5, 6), 1j), "its type complex128 is not one of pixels"),
    ],
    ids=str,
)
def test_an_array_that_may_be_anything_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        read_image(array)


def test_a_place_of_channels_that_is_said_is_believed():
    array = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(np.asarray(image_from_array(array, "last")), array)
    np.testing.assert_array_equal(np.asarray(image_from_array(array, "first")), array.transpose(1, 2, 0))


# --- through the processor -------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path, loopback):
    """The address of a server that answers with what lies in `tmp_path`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file = tmp_path / self.path.strip("/")
            self.send_response(200 if file.exists() else 404)
            self.end_headers()
            self.wfile.write(file.read_bytes() if file.exists() else b"")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["alpha", "EXIF orientation 6", "16-bit grey", "palette with a transparent colour"])
def test_every_way_in_gives_the_same_pixels(name, served, tmp_path, processor):
    encoded, expected = STORED[name]
    path = tmp_path / "picture"
    path.write_bytes(encoded)
    base64_text = base64.b64encode(encoded).decode()
    ways = [
        str(path), path, path.as_uri(), f"{served}/picture", encoded, bytearray(encoded), io.BytesIO(encoded),
        base64_text, f"data:image/png;base64,{base64_text}", Image.open(path), {"bytes": encoded, "path": None},
        {"bytes": None, "path": str(path)}, expected, torch.tensor(np.array(expected)).permute(2, 0, 1) / 255,
    ]  # fmt: skip
    reference = processor(images=Image.fromarray(expected.astype(np.uint8)), return_tensors="pt")["pixel_values"]
    for way in ways:
        options = {"input_data_format": "channels_last"} if way is expected else {}
        options |= {"input_data_format": "channels_first"} if isinstance(way, torch.Tensor) else {}
        found = processor(images=way, return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(found, reference), type(way)


@pytest.mark.parametrize("do_convert_rgb", [None, False])
def test_an_image_processor_that_converts_nothing_gets_rgb(do_convert_rgb):
    image_processor = tiny.build_image_processor()
    image_processor.do_convert_rgb = do_convert_rgb
    processor = DecoProcessor(image_processor, tiny.build_tokenizer(), pooled_grid_size=3)
    for name in ("alpha", "grey", "palette", "CMYK, TIFF", "1 bit"):
        encoded, expected = STORED[name]
        found = processor(images=Image.open(io.BytesIO(encoded)), return_tensors="pt")["pixel_values"]
        reference = tiny.build_processor()(images=Image.fromarray(expected.astype(np.uint8)), return_tensors="pt")
        assert torch.equal(found, reference["pixel_values"]), name


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_a_batch_of_arrays_is_a_list_of_pictures(kind, processor):
    batch = kind(np.stack([np.asarray(tiny.picture(seed)) for seed in (0, 1)]))
    expected = processor(images=[tiny.picture(0), tiny.picture(1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=batch, return_tensors="pt")["pixel_values"], expected)
    nested = processor(images=[batch[:1], batch[1:]], text=["<image>", "<image>"], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], expected)


@pytest.mark.parametrize("options", [{"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}], ids=str)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_values_that_are_not_to_be_scaled_stay_as_they_are(options, layout, processor):
    values = torch.linspace(-2, 2, 3 * 24 * 24).reshape(3, 24, 24)
    given = values if layout == "channels_first" else values.permute(1, 2, 0)
    for array in (given, given.numpy()):
        options = {**options, "do_resize": False, "do_normalize": False}
        found = processor(images=array, return_tensors="pt", **options)["pixel_values"]
        torch.testing.assert_close(found, values[None])


def test_values_that_are_not_to_be_scaled_have_three_channels(processor):
    with pytest.raises(
        ValueError, match=r"its shape \(24, 24\) is not \(3, height, width\), as do_rescale=False needs"
    ):
        processor(images=torch.zeros(24, 24), do_rescale=False)


# --- HEIC ------------------------------------------------------------------------------------------------------------


def test_heic_is_read_where_pillow_heif_is_installed():
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    image = Image.new("RGB", (32, 16), (200, 60, 20))
    pillow_heif.from_pillow(image).save(file, quality=100)
    found = read_image(file.getvalue())
    assert found.size == (32, 16)
    np.testing.assert_allclose(np.asarray(found).astype(int), np.asarray(image), atol=6)


def test_without_pillow_heif_heic_says_what_to_install(monkeypatch, processor):
    def without(name, *args, _import=builtins.__import__, **kwargs):
        if name.partition(".")[0] == "pillow_heif":
            raise ImportError(name)
        return _import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    heic = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(100)
    message = "Image 1 ('bytes') cannot be read: HEIC is read with pillow-heif: pip install pillow-heif"
    with pytest.raises(ValueError, match=re.escape(message)):
        processor(images=heic)


def test_avif_needs_no_pillow_heif():
    image = read_image(encode(Image.new("RGB", (32, 16), (200, 60, 20)), "AVIF", quality=100))
    np.testing.assert_allclose(image.getpixel((5, 5)), (200, 60, 20), atol=6)


def test_nested_pictures_keep_their_nesting():
    found = read_images([[PIXELS], [], [GREY, tiny.picture(1)]])
    assert [len(entry) for entry in found] == [1, 0, 2]
    np.testing.assert_array_equal(np.asarray(found[2][0]), grey(GREY))
