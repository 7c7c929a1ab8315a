# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The names of colours, as read from pixels: a thing has a colour if most of its ink clearly has it."""

import numpy as np
from PIL import Image

# hue in degrees, without the steps between two names: a pixel there has no clear name
_HUES = {
    "red": ((348, 360), (0, 12)),
    "orange": ((22, 38),),
    "yellow": ((46, 66),),
    "green": ((80, 165),),
    "blue": ((185, 250),),
    "purple": ((262, 292),),
    "pink": ((305, 340),),
}
COLOURS = (*_HUES, "brown", "black", "grey", "white")
MAIN_SHARE = 0.55  # of the ink that the main colour covers at least
OTHER_SHARE = 0.2  # and that another may cover at most


def recoloured(image: Image.Image, hue: float) -> Image.Image:
    """The image with its hues turned by `hue`, 0 to 1 of a full turn."""
    if hue == 0:
        return image
    h, s, v = image.convert("RGB").convert("HSV").split()
    h = h.point([(level + round(hue * 256)) % 256 for level in range(256)])
    turned = Image.merge("HSV", (h, s, v)).convert("RGB")
    turned.putalpha(image.getchannel("A"))
    return turned


def main_colour(image: Image.Image) -> str | None:
    """The name of the colour of most of the ink of an RGBA image, or None if there is no such colour."""
    small = image.resize((32, 32), Image.Resampling.BOX)
    alpha = np.asarray(small.getchannel("A")) > 128
    if not alpha.any():
        return None
    hsv = np.asarray(small.convert("RGB").convert("HSV"), dtype=np.float32)[alpha]
    hue, saturation, value = hsv[:, 0] * 360 / 256, hsv[:, 1] / 255, hsv[:, 2] / 255
    is_black, is_plain = value < 0.22, saturation < 0.13
    masks = {
        "black": is_black,
        "white": is_plain & (value > 0.88),
        "grey": is_plain & ~is_black & (value < 0.8),
    }
    is_coloured = (saturation > 0.25) & ~is_black
    for name, ranges in _HUES.items():
        within = np.zeros_like(is_coloured)
        for low, high in ranges:
            within |= (hue >= low) & (hue < high)
        masks[name] = is_coloured & within & (value > 0.4)
    is_warm = is_coloured & (hue >= 8) & (hue < 45)
    masks["brown"] = is_warm & (value < 0.62) & (saturation > 0.3)
    masks["red"] &= (value > 0.55) & (saturation > 0.5)
    masks["orange"] &= (value > 0.75) & (saturation > 0.5)
    masks["pink"] |= is_coloured & ((hue > 330) | (hue < 12)) & (value > 0.8) & (saturation < 0.45)
    shares = {name: float(mask.mean()) for name, mask in masks.items()}
    (name, share), (_, other) = sorted(shares.items(), key=lambda item: -item[1])[:2]
    return name if share >= MAIN_SHARE and other <= OTHER_SHARE else None
