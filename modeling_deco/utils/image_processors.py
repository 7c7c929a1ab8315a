# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaVA's padding of images to a square."""

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


def pad_to_square(image_processor):
    """Build LLaVA's image processor, which first pads images to a square in the mean colour, with these settings."""
    settings = json.loads(image_processor.to_json_string())
    kept = {name: settings[name] for name in _IMAGE_SETTINGS if settings.get(name) is not None}
    kept = {"do_center_crop": False, **kept, "do_pad": True}  # unset means false here, but true in LLaVA's
    return build_image_processor("LlavaImageProcessor", kept)
