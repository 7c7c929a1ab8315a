# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
# The public names of modeling_deco.inference.

from .costs import describe as describe
from .costs import kv_cache_bytes as kv_cache_bytes
from .generation import encode as encode
from .generation import sampling as sampling
from .generation import stream as stream
from .generation import stream_call as stream_call
from .generation import with_system as with_system
from .images import ImageError as ImageError
from .images import read_image as read_image
from .limits import ImageLimits as ImageLimits
from .loading import load as load
from .loading import load_config as load_config
from .loading import load_model as load_model
from .loading import load_processor as load_processor
from .picture_reader import PictureReader as PictureReader
from .picture_reader import VideoReader as VideoReader
from .prompt_cache import PromptCache as PromptCache
from .quantization import quantize_to_int8 as quantize_to_int8
from .videos import encode_video as encode_video
