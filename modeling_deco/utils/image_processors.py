# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA's padding of images to a square, and LLaVA-NeXT's and LLaVA-OneVision's views, for any image processor."""

import json

from ..llava import build_image_processor

# Settings that LLaVA's image processor takes over. It only adds padding.
_IMAGE_SETTINGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


_COLOUR_SETTINGS = (
    "do_convert_rgb",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def _settings(image_processor, names) -> dict:
    settings = json.loads(image_processor.to_json_string())
    return {name: settings[name] for name in names if settings.get(name) is not None}


def cut_into_views(image_processor, config):
    """Build the image processor that cuts an image into the views of a `DecoConfig`, with these colours: that of
    LLaVA-OneVision if the config has a cap, otherwise that of LLaVA-NeXT."""
    height, width = config.view_size
    settings = _settings(image_processor, _COLOUR_SETTINGS)
    settings |= {"image_grid_pinpoints": config.image_grid_pinpoints, "do_pad": True, "do_resize": True}
    if config.vision_aspect_ratio != "anyres":
        settings |= {"size": {"height": height, "width": width}, "do_center_crop": False}
        return build_image_processor("LlavaOnevisionImageProcessor", settings)
    crop_size = {"height": height, "width": width}
    settings |= {"size": {"shortest_edge": height}, "crop_size": crop_size, "do_center_crop": True}
    return build_image_processor("LlavaNextImageProcessor", settings)


def pad_to_square(image_processor):
    """Build LLaVA's image processor, which first pads images to a square in the mean colour, with these settings."""
    kept = _settings(image_processor, _IMAGE_SETTINGS)
    kept = {"do_center_crop": False, **kept, "do_pad": True}  # unset means false here, but true in LLaVA's
    return build_image_processor("LlavaImageProcessor", kept)
