# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Build image processors from settings, also with LLaVA's padding to a square."""

import json
import tempfile
from pathlib import Path

from transformers import AutoImageProcessor

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


def build_image_processor(kind: str, settings: dict):
    """Build an image processor with the auto class of transformers, which chooses the backend but only reads files."""
    settings = {name: value for name, value in settings.items() if name not in ("auto_map", "feature_extractor_type")}
    with tempfile.TemporaryDirectory() as folder:
        content = json.dumps({**settings, "image_processor_type": kind})
        Path(folder, "preprocessor_config.json").write_text(content, encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
