# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo's configuration, and the one home of the grid arithmetic."""

import copy
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .feature_maps import FEATURE_MAP_TOWERS, FeatureMap, feature_map, has_feature_map, image_size_of
from .hub import AUTO_MAP, copy_remote_code, upload
from .views import Views, parse_aspect_ratio

if TYPE_CHECKING:
    SubConfig = Any  # a config in every DecoConfig, whatever it was made from
else:
    SubConfig = dict | PreTrainedConfig | None  # what `strict` takes

# Tokens that a vision tower puts before its patch tokens, not counting register tokens.
_NUM_CLS_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
}

# Default sizes of the compressive projectors: the field's standard. The classes in projectors.py name the sources.
_PROJECTOR_SIZES: dict[str, dict[str, int]] = {
    "mlp": {},
    "avg_pool": {},
    "qformer": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "resampler": {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16},
    "c_abstractor": {"hidden_size": 1024, "num_hidden_layers": 3, "mlp_num_layers": 2},
    "d_abstractor": {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16},
}

# The largest sizes that a config may have, far above those of any model. A larger size is a mistake or an attack that
# would fill the memory or run forever.
LARGEST_SIZES = {
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "hidden_size": 2**18,
    "intermediate_size": 2**21,
    "vocab_size": 2**22,
    "image_size": 2**14,
    "patch_size": 2**10,
    "num_patches": 2**20,
    "num_register_tokens": 2**10,
    "depths": 2**10,
    "hidden_sizes": 2**18,
    "num_block_repeats": 2**10,
    "num_stages": 2**10,
}
_MOST_PROJECTOR_LAYERS = 2**6
_MOST_PINPOINTS = 2**10
_MOST_TILES = 2**8  # of a pinpoint
_MOST_FRAMES_PER_TOKEN_GRID = 2**10

IMAGE_POSITIONS = ("patch", "sequence")


_VIDEO_GRID = 7  # default side of a frame's grid


def parse_grid(pooled_grid_size, name: str = "pooled_grid_size") -> tuple[int, int]:
    """Read a grid given as an int (square) or as two ints.

    Args:
        name: for the message, the field, argument or option that has the grid.

    Returns:
        `(rows, cols)`.

    Raises:
        ValueError: the grid is neither a positive int nor two positive ints.
    """
    grid = [pooled_grid_size] * 2 if isinstance(pooled_grid_size, int) else pooled_grid_size
    is_pair = isinstance(grid, (list, tuple)) and len(grid) == 2
    if not is_pair or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in grid):
        raise ValueError(
            f"{name} must be a positive int (a square grid) or two positive ints [rows, cols], "
            f"got {pooled_grid_size!r}."
        )
    return grid[0], grid[1]


def num_image_tokens(pooled_grid_size) -> int:
    """Tokens that one image takes in the language model: `rows * cols` of its pooled grid."""
    rows, cols = parse_grid(pooled_grid_size)
    return rows * cols


def check_grid(
    pooled_grid_size, patch_grid: tuple[int, int], of: str = "the vision tower", name: str = "pooled_grid_size"
) -> tuple[int, int]:
    """Check that a pooled grid is not larger than the patch grid.

    Args:
        pooled_grid_size: an int (square) or `[rows, cols]`.
        patch_grid: `(rows, cols)`.
        of: for the message, what has these patches: `"the vision tower"`, `"image 2"`.
        name: for the message, the field, argument or option that has the grid.

    Returns:
        `(rows, cols)` of the pooled grid.

    Raises:
        ValueError: the grid is malformed, or has more rows or columns than there are patches.
    """
    (rows, cols), (patch_rows, patch_cols) = parse_grid(pooled_grid_size, name), patch_grid
    if rows > patch_rows or cols > patch_cols:
        raise ValueError(
            f"{name}={pooled_grid_size!r}: {rows} x {cols} is larger than the {patch_rows} x {patch_cols} patches of "
            f"{of}; choose at most {patch_rows} x {patch_cols}."
        )
    return rows, cols


def count_patches(size: tuple[int, int], patch_size: int, patch_padding: int = 0) -> tuple[int, int]:
    """`(rows, cols)` of the patches of a picture of `(height, width)` pixels."""
    height, width = size
    return (height + patch_padding) // patch_size, (width + patch_padding) // patch_size


def patch_settings(vision_config) -> dict[str, int]:
    """The arguments of `count_patches` that are a vision tower's."""
    found = feature_map(vision_config)
    if found is not None:
        return {"patch_size": found.stride, "patch_padding": found.padding}
    return {"patch_size": vision_config.patch_size, "patch_padding": 0}


def fit_grid(pooled_grid: tuple[int, int], patch_grid: tuple[int, int]) -> tuple[int, int]:
    """The default grid of an image, cut to the image's own patches."""
    return min(pooled_grid[0], patch_grid[0]), min(pooled_grid[1], patch_grid[1])


def default_video_grid(full_grid: tuple[int, int]) -> tuple[int, int]:
    """The default grid `(rows, cols)` of a video's frame: 7 x 7. Apollo (arXiv 2412.10360) found 8 to 32 tokens a
    frame to be best.

    Args:
        full_grid: of a frame.
    """
    return fit_grid((_VIDEO_GRID, _VIDEO_GRID), full_grid)


@strict
class DecoConfig(PreTrainedConfig):
    """Configuration of a DeCo model: a vision tower, a projector that pools patches, a language model.

    The vision tower is cut to the layers that are used: a `vision_feature_layer` of -2 on a tower of 24 layers is
    stored as 23 layers and -1, which gives the same features bit for bit. The given `vision_config` is not changed.
    The stored one has the number of layers that were cut off (`num_cut_layers`), so that another `DecoConfig` does not
    cut it again. A negative `vision_feature_layer` still counts from the end of the uncut tower.

    Args:
        vision_config: configuration (or its dict) of a vision tower: CLIP, SigLIP, SigLIP 2 or DINOv2, or a
            convolutional network (EfficientNet, ConvNeXt, ConvNeXt V2, MobileNet V1 and V2, ResNet, RegNet,
            `timm_wrapper`), whose last feature map is the patch grid: a patch is as large as the stride. Such a tower
            takes any input size. Its `image_size` is the one to which the processor brings pictures; a config
            without one (ResNet, RegNet) gets 224. A `timm_wrapper` needs `patch_size`, its stride, and `hidden_size`.
            Default: CLIP ViT-L/14 at 336 pixels, the tower of LLaVA-1.5 and of DeCo.
        text_config: configuration (or its dict) of a decoder that `AutoModel` builds. Default: Llama (7B) with
            LLaVA-1.5's vocabulary of 32064.
        image_token_id: id of the placeholder token. Each image takes `num_image_tokens` of them.
        pooled_grid_size: the grid that patches are pooled to, an int (square) or `[rows, cols]`. `forward`, `generate`
            and the processor take another grid per call.
        image_positions: where the language model sees the tokens of an image. `"patch"`: each token has the position
            that the central patch of its window has at the full grid, and the text behind the image has the positions
            that it has there. `"sequence"`: all tokens are numbered one after another, as in the paper, which is right
            for models that were trained so. At the full grid both are the same. `forward` and `generate` take another
            value per call.
        image_grid_pinpoints: sizes `[height, width]` in pixels. A picture is resized to one of them, and cut into
            tiles of the tower's image size (LLaVA-NeXT). The tiles' patches are stitched to one map, which is pooled
            by the same factor as a view: `pooled_grid_size` is the grid of a view. None: an image is one view.
        image_overview: with pinpoints, whether the whole picture is one more view, whose tokens come first.
        image_newline: with pinpoints, whether the parameter `image_newline` ends each row of the map. It is behind an
            image that is not tiled.
        vision_aspect_ratio: with pinpoints, `"anyres"`, or `"anyres_max_N"`, which shrinks maps of more than N views
            to about N at the full grid (LLaVA-OneVision).
        video_token_id: id of the placeholder token of videos. None: the model takes no videos.
        pooled_video_grid_size: the grid that a frame of a video is pooled to. Default: 7 x 7, or the frame's full grid
            if that is smaller. `forward`, `generate` and the processor take another grid per call.
        frames_per_token_grid: neighbouring frames of a video that are averaged.
        spatial_pool_mode, spatial_pool_stride: how the model that a checkpoint was made from shrinks frames: to
            `patches / stride` tokens a side, by `"average"` pooling before the projector (LLaVA-NeXT-Video) or by
            `"bilinear"` interpolation after it (LLaVA-OneVision). That is the full grid of a frame, at which both
            models are equal. Default: a frame's full grid is its patch grid.
        video_newline: whether the parameter `image_newline` is behind a video.
        projector_type: `"avg_pool"`, 2D adaptive average pooling before the MLP (DeCo, arXiv 2405.20985), or a
            projector that DeCo is compared with: `"mlp"` (LLaVA's, without compression: `pooled_grid_size` must be the
            patch grid), `"qformer"`, `"resampler"`, `"c_abstractor"`, `"d_abstractor"`. `"avg_pool"` and
            `"c_abstractor"` take another grid per call.
        projector_num_layers: linear layers in the MLP of `"avg_pool"` and `"mlp"` (`layer_num` in the authors' code).
        projector_hidden_act: activation between these layers.
        multimodal_projector_bias: whether these layers have biases.
        projector_config: sizes of a compressive projector, which are arguments of its class in projectors.py:
            `hidden_size`, `num_hidden_layers`, `num_attention_heads` (`mlp_num_layers` for `"c_abstractor"`). Default:
            the field's standard, see `projector_sizes`.
        vision_feature_layer: index into the tower's hidden states, of which there are `num_hidden_layers + 1`.
            Default: -2, or -1 if the tower was cut for a `DecoConfig`. A convolutional tower has -1 only, its last
            feature map.
        vision_position_embedding: `"sine"` adds DETR's embeddings of places (arXiv 2005.12872) to the feature map of a
            convolutional tower, which hardly says where a thing is. None: the tower's output as it is.
        tie_word_embeddings: whether `lm_head` is the embedding matrix. Also true if `text_config` says so.
        lm_head_bias: whether `lm_head` has a bias, as in Phi, GPT-J and CodeGen.

    Raises:
        ValueError: fields contradict each other. The message names the field, its value and what is allowed.
    """

    model_type = "deco"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]
    attribute_map = {"image_token_index": "image_token_id", "video_token_index": "video_token_id"}
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: SubConfig = None
    text_config: SubConfig = None
    image_token_id: int = 32000
    pooled_grid_size: int | list[int] | tuple[int, ...] = 12
    image_positions: str = "sequence"  # also that of folders written before the field existed
    image_grid_pinpoints: list | None = None
    image_overview: bool = True
    image_newline: bool = False
    vision_aspect_ratio: str = "anyres"
    video_token_id: int | None = None
    pooled_video_grid_size: int | list[int] | tuple[int, ...] | None = None
    frames_per_token_grid: int = 1
    spatial_pool_mode: str = "average"
    spatial_pool_stride: int = 1
    video_newline: bool = False
    projector_type: str = "avg_pool"
    projector_num_layers: int = 2
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    projector_config: dict | None = None
    vision_feature_layer: int | None = None
    vision_position_embedding: str | None = None
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False

    def __post_init__(self, **kwargs):
        self.image_token_id = kwargs.pop("image_token_index", self.image_token_id)  # LLaVA's names for them
        self.video_token_id = kwargs.pop("video_token_index", self.video_token_id)
        self.vision_config = _vision_config(self.vision_config)
        self.text_config = _text_config(self.text_config)
        tied_in_text = getattr(self.text_config, "tie_word_embeddings", False)  # some configs lack it
        self.tie_word_embeddings = self.tie_word_embeddings or tied_in_text
        if isinstance(self.pooled_grid_size, tuple):  # JSON knows lists only
            self.pooled_grid_size = list(self.pooled_grid_size)
        if isinstance(self.pooled_video_grid_size, tuple):
            self.pooled_video_grid_size = list(self.pooled_video_grid_size)
        self._validate_choices()
        self._check_select_strategy(kwargs.pop("vision_feature_select_strategy", "default"))
        self._cut_unused_vision_layers()
        super().__post_init__(**kwargs)

    def _validate_choices(self):
        self._validate_projector()
        self.check_image_positions(self.image_positions)
        if self.projector_num_layers < 1:
            raise ValueError(f"projector_num_layers must be at least 1, got {self.projector_num_layers}.")
        if self.projector_num_layers > _MOST_PROJECTOR_LAYERS:
            raise ValueError(
                f"projector_num_layers must be at most {_MOST_PROJECTOR_LAYERS}, got {self.projector_num_layers}."
            )
        for name in ("vision_config", "text_config"):
            part = getattr(self, name)
            _check_sizes(name, {field: getattr(part, field, None) for field in LARGEST_SIZES})
        self._validate_tower()
        vocab_size = self.text_config.vocab_size
        if not 0 <= self.image_token_id < vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is not in the vocabulary of text_config "
                f"(vocab_size={vocab_size}); it must be 0 to {vocab_size - 1}."
            )
        (rows, cols), (patch_rows, patch_cols) = check_grid(self.pooled_grid_size, self.patch_grid), self.patch_grid
        if self.projector_type == "mlp" and (rows, cols) != (patch_rows, patch_cols):
            raise ValueError(
                f"projector_type='mlp' does not compress: pooled_grid_size must be the patch grid "
                f"[{patch_rows}, {patch_cols}], got {self.pooled_grid_size}."
            )
        self._validate_views()
        self._validate_videos()

    def _validate_tower(self):
        supported = sorted([*_NUM_CLS_TOKENS, *FEATURE_MAP_TOWERS])
        if self.vision_config.model_type not in supported:
            raise ValueError(
                f"vision_config.model_type must be one of {supported}, got {self.vision_config.model_type!r}."
            )
        if self.vision_position_embedding not in (None, "sine"):
            raise ValueError(
                f"vision_position_embedding must be 'sine' or None, got {self.vision_position_embedding!r}."
            )
        if self.feature_map is None:
            if self.vision_position_embedding is not None:
                raise ValueError(
                    f"vision_position_embedding={self.vision_position_embedding!r} is for convolutional towers; a "
                    f"{self.vision_config.model_type} has its own: leave it out."
                )
            return
        if self.vision_position_embedding == "sine" and self.feature_map.channels % 4 != 0:
            raise ValueError(
                f"vision_position_embedding='sine' needs a multiple of 4 channels, and the feature map of "
                f"{self.vision_config.model_type} has {self.feature_map.channels}; leave it out."
            )
        found = {"hidden_size": self.feature_map.channels, "patch_size": self.feature_map.stride}
        _check_sizes("vision_config", found)
        _check_sizes("vision_config", {"image_size": self.view_size})
        if 0 in self.patch_grid:
            raise ValueError(
                f"vision_config.image_size: {self.view_size[0]} x {self.view_size[1]} pixels are less than the stride "
                f"of {self.vision_config.model_type}, {self.patch_size} pixels."
            )

    def _validate_views(self):
        parse_aspect_ratio(self.vision_aspect_ratio)
        if self.image_grid_pinpoints is None:
            return
        if self.projector_type not in ("avg_pool", "mlp"):
            raise ValueError(
                f"image_grid_pinpoints needs projector_type='avg_pool' or 'mlp', got {self.projector_type!r}: the "
                f"other projectors make the tokens of one view."
            )
        if self.vision_config.model_type == "siglip2_vision_model":
            raise ValueError(
                "image_grid_pinpoints needs a vision tower with one image size; siglip2_vision_model takes pictures "
                "of any shape in one view."
            )
        height, width = self.view_size
        pinpoints = self.image_grid_pinpoints
        if not isinstance(pinpoints, (list, tuple)) or not 0 < len(pinpoints) <= _MOST_PINPOINTS:
            raise ValueError(
                f"image_grid_pinpoints must be a list of 1 to {_MOST_PINPOINTS} sizes [height, width], got "
                f"{str(pinpoints)[:80]}."
            )
        for pinpoint in pinpoints:
            is_pair = isinstance(pinpoint, (list, tuple)) and len(pinpoint) == 2
            is_pair = is_pair and all(isinstance(side, int) and not isinstance(side, bool) for side in pinpoint)
            if not is_pair or min(pinpoint) < 1 or pinpoint[0] % height != 0 or pinpoint[1] % width != 0:
                raise ValueError(
                    f"image_grid_pinpoints has {str(pinpoint)[:80]}, which is not a [height, width] of multiples of "
                    f"the vision tower's image size, {height} x {width}."
                )
            if (pinpoint[0] // height) * (pinpoint[1] // width) > _MOST_TILES:
                raise ValueError(
                    f"image_grid_pinpoints has {pinpoint}, which are more than {_MOST_TILES} tiles of {height} x "
                    f"{width} pixels."
                )

    def _validate_videos(self):
        (rows, cols), mode, stride = self.patch_grid, self.spatial_pool_mode, self.spatial_pool_stride
        if mode not in ("average", "bilinear"):
            raise ValueError(f"spatial_pool_mode must be 'average' or 'bilinear', got {mode!r}.")
        if not 1 <= stride <= min(rows, cols) or (mode == "average" and (rows % stride or cols % stride)):
            divisor = ", and divide it where spatial_pool_mode is 'average'" if mode == "average" else ""
            raise ValueError(
                f"spatial_pool_stride must be 1 to the patch grid's side, {min(rows, cols)}{divisor}; got {stride}."
            )
        if not 1 <= self.frames_per_token_grid <= _MOST_FRAMES_PER_TOKEN_GRID:
            raise ValueError(
                f"frames_per_token_grid must be 1 to {_MOST_FRAMES_PER_TOKEN_GRID}, got {self.frames_per_token_grid}."
            )
        if self.pooled_video_grid_size is not None:
            check_grid(self.pooled_video_grid_size, self.patch_grid, name="pooled_video_grid_size")
        if self.video_token_id is None:
            return
        vocab_size = self.text_config.vocab_size
        if not 0 <= self.video_token_id < vocab_size or self.video_token_id == self.image_token_id:
            raise ValueError(
                f"video_token_id={self.video_token_id} must be in the vocabulary of text_config (0 to "
                f"{vocab_size - 1}), and not image_token_id."
            )
        if self.projector_type != "avg_pool":
            raise ValueError(
                f"video_token_id needs projector_type='avg_pool', got {self.projector_type!r}, which does not pool "
                f"frames."
            )

    def _check_select_strategy(self, strategy):
        """Refuse LLaVA's `vision_feature_select_strategy` where it keeps prefix tokens.

        DeCo always drops them, which is `"default"`, the value in DeCo configs of before. `"full"` is the same for a
        vision tower that has no prefix tokens.
        """
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy must be 'default' or 'full', got {strategy!r}.")
        if strategy == "full" and self.num_prefix_tokens > 0:
            raise ValueError(
                f"vision_feature_select_strategy='full' keeps prefix tokens of {self.vision_config.model_type} "
                f"({self.num_prefix_tokens}), which have no place in the patch grid; use 'default'."
            )

    def check_image_positions(self, image_positions: str | None = None) -> str:
        """The image positions of a call, which are the config's if it gives none.

        Raises:
            ValueError: the value is neither `"patch"` nor `"sequence"`, or the projector's tokens have no place in the
                picture.
        """
        image_positions = self.image_positions if image_positions is None else image_positions
        if image_positions not in IMAGE_POSITIONS:
            raise ValueError(f"image_positions must be 'patch' or 'sequence', got {image_positions!r}.")
        if image_positions == "patch" and self.projector_type in ("qformer", "resampler"):
            raise ValueError(
                f"image_positions='patch' needs tokens that have a place in the picture, and those of projector_type="
                f"{self.projector_type!r} have none; use 'sequence'."
            )
        return image_positions

    def _validate_projector(self):
        if self.projector_type not in _PROJECTOR_SIZES:
            raise ValueError(
                f"projector_type must be one of {', '.join(_PROJECTOR_SIZES)}, got {self.projector_type!r}."
            )
        allowed, given = _PROJECTOR_SIZES[self.projector_type], self.projector_config or {}
        for name, value in given.items():
            if name not in allowed:
                raise ValueError(
                    f"projector_config of projector_type={self.projector_type!r} can have "
                    f"{', '.join(allowed) or 'no fields'}, got {name!r}."
                )
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"projector_config[{name!r}] must be a positive int, got {value!r}.")
            largest = LARGEST_SIZES.get(name, _MOST_PROJECTOR_LAYERS)
            if value > largest:
                raise ValueError(f"projector_config[{name!r}] must be at most {largest}, got {value!r}.")
        sizes = {**allowed, **given}
        if sizes.get("hidden_size", 0) % sizes.get("num_attention_heads", 1) != 0:
            raise ValueError(
                f"projector_config: hidden_size={sizes['hidden_size']} is not a multiple of "
                f"num_attention_heads={sizes['num_attention_heads']}."
            )

    def _cut_unused_vision_layers(self):
        if self.feature_map is not None:
            if self.vision_feature_layer not in (None, -1):
                raise ValueError(
                    f"vision_feature_layer={self.vision_feature_layer}: DeCo reads the last feature map of a "
                    f"{self.vision_config.model_type}, and its layers have maps of other sizes; use -1."
                )
            self.vision_feature_layer = -1
            return
        num_layers = self.vision_config.num_hidden_layers
        num_cut = getattr(self.vision_config, "num_cut_layers", None)  # None: no DecoConfig has cut it yet
        layer = self.vision_feature_layer
        if layer is None:
            layer = -2 if num_cut is None else -1
        num_uncut = num_layers + (num_cut or 0)
        num_used = min(layer % (num_uncut + 1), num_layers)
        if not -num_uncut <= layer <= num_layers or num_used == 0:
            raise ValueError(
                f"vision_feature_layer={layer} selects no layer of a vision tower with {num_layers}; it must be "
                f"-{num_uncut} to -1 or 1 to {num_layers}."
            )
        self.vision_feature_layer = -1
        is_siglip = self.vision_config.model_type.startswith("siglip")
        has_head = is_siglip and getattr(self.vision_config, "vision_use_head", True)
        if num_used == num_layers and not has_head and num_cut is not None:
            return
        fields = {**self.vision_config.to_dict(), "num_hidden_layers": num_used}
        fields["num_cut_layers"] = num_uncut - num_used
        if has_head:  # SigLIP's attention pooling, whose output DeCo does not read
            fields["vision_use_head"] = False
        for name in ("stage_names", "out_features", "out_indices"):  # DINOv2's names of layers, made from their number
            fields.pop(name, None)
        self.vision_config = type(self.vision_config)(**fields)

    @property
    def projector_sizes(self) -> dict[str, int]:
        """Sizes of a compressive projector: the field's standard, replaced by those in `projector_config`."""
        self._validate_projector()  # fields may have been set after construction
        return _PROJECTOR_SIZES[self.projector_type] | (self.projector_config or {})

    @property
    def text_hidden_size(self) -> int:
        """Width of the language model's embeddings and outputs. In some OPT models its layers have another width."""
        return getattr(self.text_config, "word_embed_proj_dim", self.text_config.hidden_size)

    @property
    def takes_any_grid(self) -> bool:
        """Whether a call may use another grid. Projectors with learned queries, and `"mlp"`, have one grid."""
        return self.projector_type in ("avg_pool", "c_abstractor")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens in the vision tower's output: CLS and register tokens."""
        if self.feature_map is not None:
            return 0
        num_register_tokens = getattr(self.vision_config, "num_register_tokens", 0)
        return _NUM_CLS_TOKENS[self.vision_config.model_type] + num_register_tokens

    @property
    def patch_grid(self) -> tuple[int, int]:
        """`(rows, cols)` of the vision tower's patches at its own image size."""
        if self.vision_config.model_type == "siglip2_vision_model":  # has a number of patches, not an image size
            side = math.isqrt(self.vision_config.num_patches)
            return side, side
        return self.patch_grid_of(*self.view_size)

    def patch_grid_of(self, height: int, width: int) -> tuple[int, int]:
        """`(rows, cols)` of the vision tower's patches of a picture of this size in pixels."""
        return count_patches((height, width), self.patch_size, self.patch_padding)

    @property
    def feature_map(self) -> FeatureMap | None:
        """The output of a convolutional vision tower, None for a transformer."""
        return feature_map(self.vision_config)

    @property
    def vision_hidden_size(self) -> int:
        """Width of the vision tower's patch features."""
        return self.vision_config.hidden_size if self.feature_map is None else self.feature_map.channels

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels: the stride of a convolutional vision tower."""
        return patch_settings(self.vision_config)["patch_size"]

    @property
    def patch_padding(self) -> int:
        """A side of `n` pixels has `(n + patch_padding) // patch_size` patches."""
        return patch_settings(self.vision_config)["patch_padding"]

    @property
    def view_size(self) -> tuple[int, int]:
        """`(height, width)` in pixels of a view: the vision tower's own image size, to which the processor brings
        pictures."""
        if self.vision_config.model_type == "siglip2_vision_model":
            rows, cols = self.patch_grid
            size = (rows * self.patch_size, cols * self.patch_size)
        else:
            size = self.vision_config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width

    @property
    def view_settings(self) -> dict[str, Any]:
        """The fields that say how pictures and videos are cut into views, which the processor needs too."""
        of_images = ("image_overview", "image_newline", "vision_aspect_ratio")
        of_videos = ("spatial_pool_mode", "spatial_pool_stride", "video_newline")
        return {name: getattr(self, name) for name in (*of_images, *of_videos)}

    @property
    def views(self) -> Views:
        """How pictures and videos are cut into views."""
        return Views(self.view_size, self.patch_grid, self.image_grid_pinpoints, **self.view_settings)

    @property
    def has_newline(self) -> bool:
        """Whether the model has the parameter `image_newline`."""
        return self.image_newline or self.video_newline

    @property
    def pooled_video_grid(self) -> tuple[int, int]:
        """`(rows, cols)` of a frame's tokens."""
        if self.pooled_video_grid_size is None:
            return default_video_grid(self.views.full_video_grid)
        return parse_grid(self.pooled_video_grid_size)

    @property
    def pooled_grid(self) -> tuple[int, int]:
        """`(rows, cols)` of `pooled_grid_size`."""
        return parse_grid(self.pooled_grid_size)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes at the config's grid."""
        return num_image_tokens(self.pooled_grid_size)

    @property
    def mrope_section(self) -> list[int] | None:
        """With `image_positions="patch"`, vLLM takes this as the sign that it must ask the model for positions, which
        `DecoModel.get_rope_index` computes. vLLM reads the length: positions have three rows."""
        return [1, 1, 1] if self.image_positions == "patch" else None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """`PreTrainedConfig.get_config_dict`, which `from_pretrained` calls. The fields of a LLaVA of transformers
        become those of a DeCo at its patch grid, where its logits are LLaVA's. No conversion is needed.

        Raises:
            ValueError: the config is neither DeCo's nor that of a LLaVA that DeCo supports.
        """
        arguments = dict(kwargs)
        fields, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if fields.get("model_type", cls.model_type) != cls.model_type:
            fields = _fields_of_llava(fields, pretrained_model_name_or_path, arguments)
        return fields, unused

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        self._validate_choices()  # fields may have been set after construction
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory)
        copy_remote_code(save_directory)
        if push_to_hub:  # super would upload its own files, without the code
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(self, repo_id: str, *, max_shard_size=None, **kwargs):
        """`PreTrainedConfig.push_to_hub`, with the code. The model's `push_to_hub` also writes the card."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, **kwargs)


def _check_sizes(name: str, fields: dict) -> None:
    """Raise a ValueError if a size in a part's config is not a positive int, or is too large."""
    for field, largest in LARGEST_SIZES.items():
        value = fields.get(field)
        for size in value if isinstance(value, (list, tuple)) else [value]:
            is_int = isinstance(size, int) and not isinstance(size, bool)
            lowest = 0 if field == "num_register_tokens" else 1
            if size is not None and not (is_int and lowest <= size <= largest):
                raise ValueError(f"{name}.{field} must be an int of {lowest} to {largest}, got {value!r}.")


def _vision_config(vision_config) -> PreTrainedConfig:
    if vision_config is None:
        return AutoConfig.for_model(
            "clip_vision_model",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
    if isinstance(vision_config, dict):
        _check_sizes("vision_config", vision_config)  # before construction: some configs make a list of their layers
        vision_config = AutoConfig.for_model(**{"model_type": "clip_vision_model", **vision_config})
    if has_feature_map(vision_config) and getattr(vision_config, "image_size", None) is None:
        vision_config = copy.deepcopy(vision_config)  # the given one is not changed
        vision_config.image_size = image_size_of(vision_config)
    return vision_config


def _text_config(text_config) -> PreTrainedConfig:
    if text_config is None:
        return AutoConfig.for_model("llama", vocab_size=32064)
    if isinstance(text_config, dict):
        _check_sizes("text_config", text_config)
        text_config = AutoConfig.for_model(**{"model_type": "llama", **text_config})
    if text_config.is_encoder_decoder or not hasattr(text_config, "vocab_size"):
        raise ValueError(
            f"text_config.model_type must be that of a decoder-only language model, got {text_config.model_type!r}."
        )
    return text_config


def _fields_of_llava(fields: dict, name, arguments: dict[str, Any]) -> dict[str, Any]:
    """The fields of the `DecoConfig` that the converter makes of a LLaVA of transformers, at the patch grid.

    Args:
        arguments: those of `from_pretrained`.
    """
    # imported here to avoid a circle: it imports modules of transformers that import the one that registers DecoConfig
    from .llava import (
        check_features,
        check_image_token,
        check_vocabulary,
        choose_video_token,
        deco_fields,
        find_llava,
        has_processor,
        hub_arguments,
        is_llava,
        load_tokenizer,
        refusal,
    )

    if not is_llava(fields):
        raise ValueError(refusal(fields.get("model_type"), name))
    where = f"config.json of {name}"
    check_features(fields, where)
    for part in ("vision_config", "text_config"):
        _check_sizes(part, fields.get(part) or {})
    config_fields = deco_fields(fields, where)
    video_token_id = config_fields.pop("video_token_id", None)
    try:
        config = DecoConfig(**config_fields, pooled_grid_size=1)
    except ValueError:
        raise
    except Exception as error:  # a field has another type
        raise ValueError(f"{where} cannot be used: {' '.join(str(error).split())[:300]}") from None
    tokenizer, num_rows = None, config.text_config.vocab_size
    folder = find_llava(name, **hub_arguments(arguments))
    if folder is not None and has_processor(folder):
        tokenizer = load_tokenizer(folder)
        check_image_token(tokenizer, config.image_token_id, name)
        check_vocabulary(tokenizer, num_rows, name)
        config_fields["text_config"].pad_token_id = tokenizer.pad_token_id
    if video_token_id is not None:  # the model was made for videos
        config_fields["pooled_video_grid_size"] = list(config.views.full_video_grid)
    config_fields["video_token_id"] = choose_video_token(tokenizer, video_token_id, num_rows, name)
    rows, cols = config.patch_grid
    return config_fields | {
        "model_type": DecoConfig.model_type,
        "pooled_grid_size": rows if rows == cols else [rows, cols],
        "dtype": fields.get("dtype", fields.get("torch_dtype")),
        "architectures": ["DecoForConditionalGeneration"],
        "auto_map": dict(AUTO_MAP),
    }


__all__ = ["DecoConfig"]
