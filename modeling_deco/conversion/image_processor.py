# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The image processor of a converted checkpoint. Only files are read: never the network, never a checkpoint's own
code."""

from pathlib import Path

from ..configuration_deco import DecoConfig
from ..llava import build_image_processor, image_processor_settings
from ..utils.errors import InputError, one_line
from ..utils.files import read_settings
from ..utils.image_processors import cut_into_views, pad_to_square


def load_image_processor(folder, image_aspect_ratio=None, config: DecoConfig | None = None):
    """The image processor of a vision tower, with or without torchvision.

    Args:
        folder: with a `preprocessor_config.json`, or a `processor_config.json` that has an image processor in it.
        image_aspect_ratio: the setting of the original LLaVA. `"pad"` turns it into LLaVA's image processor, which
            first pads an image to a square with the mean colour; `"anyres"` and `"anyres_max_N"` into that of
            LLaVA-NeXT or LLaVA-OneVision, which cuts an image into views; `"square"` and None change nothing.
        config: the model's, which has the views.

    Raises:
        InputError: there is no image processor, it cannot be built, or the aspect ratio has another value.
    """
    folder = Path(folder)
    if image_aspect_ratio not in (None, "square", "pad") and (config is None or config.image_grid_pinpoints is None):
        raise InputError(f"image_aspect_ratio must be 'pad' or 'square', got {image_aspect_ratio!r}.")
    kind, settings = image_processor_settings(folder, read_settings)
    if kind is None:
        raise InputError(
            f"{folder} names no image processor: neither preprocessor_config.json nor processor_config.json has an "
            f"image_processor_type; pass the folder of the vision tower."
        )
    try:
        processor = build_image_processor(kind, settings)
        if image_aspect_ratio == "pad":
            processor = pad_to_square(processor)
        elif image_aspect_ratio not in (None, "square"):
            processor = cut_into_views(processor, config)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{folder}: the image processor {kind!r} cannot be built: {one_line(error)}") from error
    return processor
