# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Colours of the emoji world, read from pixels."""

import numpy as np
import pytest
from PIL import Image

from modeling_deco.worlds.emoji.colours import COLOURS, main_colour, recoloured

PIXELS = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 170, 60),
    "blue": (40, 90, 230),
    "purple": (130, 50, 200),
    "pink": (250, 120, 190),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "grey": (130, 130, 132),
    "white": (250, 250, 250),
}


def painted(*shares: tuple[tuple[int, int, int], float]) -> Image.Image:
    """An image of 64 x 64 pixels with a horizontal stripe of each colour; the rest is transparent."""
    pixels, row = np.zeros((64, 64, 4), np.uint8), 0
    for colour, share in shares:
        pixels[row : row + round(64 * share)] = (*colour, 255)
        row += round(64 * share)
    return Image.fromarray(pixels)


def test_every_colour_has_a_pixel_that_shows_it():
    assert set(PIXELS) == set(COLOURS)


@pytest.mark.parametrize("name", PIXELS)
def test_a_thing_of_one_colour_has_its_name(name):
    assert main_colour(painted((PIXELS[name], 0.5))) == name


def test_two_colours_of_equal_share_are_no_main_colour():
    assert main_colour(painted((PIXELS["red"], 0.5), (PIXELS["blue"], 0.5))) is None


def test_a_small_part_in_another_colour_changes_nothing():
    assert main_colour(painted((PIXELS["green"], 0.85), (PIXELS["red"], 0.15))) == "green"


def test_a_colour_between_two_names_has_none():
    assert main_colour(painted(((250, 188, 20), 1.0))) is None  # between orange and yellow


def test_an_empty_image_has_no_colour():
    assert main_colour(painted()) is None


def test_turned_hues_change_the_colour_and_keep_the_shape():
    image = painted((PIXELS["red"], 0.5))
    turned = recoloured(image, 1 / 3)
    assert main_colour(turned) == "green"
    assert turned.getchannel("A").tobytes() == image.getchannel("A").tobytes()
