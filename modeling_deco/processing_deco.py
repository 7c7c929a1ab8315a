# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo's processor: prepares images and text, and expands each image's placeholder to its token budget."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from math import isqrt
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import (
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    Unpack,
    VideosKwargs,
)
from transformers.tokenization_utils_base import TextInput

from .chat_templates import CHAT_TEMPLATES, adapt_chat_template, complete_chat_template, parts_to_text
from .configuration_deco import (
    DecoConfig,
    check_grid,
    count_patches,
    default_video_grid,
    fit_grid,
    parse_grid,
    patch_settings,
)
from .hub import AUTO_MAP, copy_remote_code, upload
from .llava import (
    HUB_ARGUMENTS,
    build_image_processor,
    check_image_processor,
    choose_chat_template,
    choose_video_token,
    find_llava,
    hub_arguments,
    load_chat_template,
    load_image_processor,
    load_tokenizer,
)
from .pixels import channels_first, read_image
from .videos import PreparedVideo, in_chunks, read_video
from .views import (
    Grid,
    TokenMap,
    Views,
    largest_grid,
    num_map_tokens,
    num_map_views,
    one_map,
    parse_aspect_ratio,
    tiled_images,
)

# Arguments of a call that transformers does not know
_IMAGE_OPTIONS = ("pooled_grid_size", "max_image_tokens", "tiles")
_VIDEO_OPTIONS = ("pooled_video_grid_size", "frames_per_token_grid", "fps", "max_frames", "add_timestamps")
_FRAMES_PER_CHUNK = 16

# transformers (since 5.23) allows none of these as an argument of `__init__`, and `fps` is one
_FramesKwargs = TypedDict(  # type: ignore[misc]
    "_FramesKwargs",
    {name: field for name, field in VideosKwargs.__annotations__.items() if name != "fps"},
    total=False,
)


class DecoProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    videos_kwargs: _FramesKwargs
    _defaults = {"text_kwargs": {"padding": False}}


class DecoImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    pooled_grid_size: int | list | tuple | torch.Tensor | None
    max_image_tokens: int | None
    tiles: int | list | tuple | None


class DecoVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    pooled_video_grid_size: int | list | tuple | None
    frames_per_token_grid: int | None
    max_frames: int | None
    add_timestamps: bool | None


class DecoCallKwargs(DecoProcessorKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call, which `DecoProcessor.__call__` explains.

    They are not among the fields of `valid_processor_kwargs`, because transformers (since 5.23) allows none of these
    as an argument of `__init__`. They are also in the groups `images_kwargs` and `videos_kwargs`, because vLLM loads a
    processor again for each value of an argument that is in none of the groups.
    """

    images_kwargs: DecoImagesKwargs
    videos_kwargs: DecoVideosKwargs
    pooled_grid_size: int | list | tuple | torch.Tensor | None
    max_image_tokens: int | None
    tiles: int | list | tuple | None
    pooled_video_grid_size: int | list | tuple | None
    frames_per_token_grid: int | None
    max_frames: int | None
    add_timestamps: bool | None


class DecoProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    An image processor with `image_grid_pinpoints` (LLaVA-NeXT's, LLaVA-OneVision's) cuts images into views. Frames of
    videos are always one view.

    Text is padded on the left, as generation needs. To train with padding on the right, pass `padding_side`.

    Args:
        image_processor: the vision tower's image processor.
        tokenizer: the language model's tokenizer, with the image token in its vocabulary.
        pooled_grid_size: the model's default grid, an int (square) or `[rows, cols]`.
        chat_template: Jinja template. Default: the tokenizer's. If that takes text only, `"<image>"` is written into
            the text.
        image_token: placeholder of an image in the text, if the tokenizer does not name one.
        patch_size: the vision tower's patch size in pixels. With it, the processor refuses a grid that is larger than
            an image's patch grid. Without it, the model does, which stops a vLLM server. Tiles and videos need it.
        view_settings: the model's `DecoConfig.view_settings`.
        video_token: placeholder of a video in the text. Without it in the vocabulary, the processor takes no videos.
        pooled_video_grid_size: default grid of a frame. Default: 7 x 7, or the frame's full grid if that is smaller.
        frames_per_token_grid: neighbouring frames of a video that are averaged.
        fps: frames per second that are read from a video.
        max_frames: the most frames that are read from a video. Those of a longer one are spread over its length.
        patch_padding: the model's `DecoConfig.patch_padding`.
    """

    valid_processor_kwargs = DecoProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        pooled_grid_size=12,
        chat_template=None,
        image_token="<image>",
        patch_size=None,
        view_settings=None,
        video_token="<video>",
        pooled_video_grid_size=None,
        frames_per_token_grid=1,
        fps=1.0,
        max_frames=64,
        patch_padding=0,
        **kwargs,
    ):
        parse_grid(pooled_grid_size)
        if pooled_video_grid_size is not None:
            parse_grid(pooled_video_grid_size, name="pooled_video_grid_size")
        self.pooled_grid_size = pooled_grid_size
        self.patch_size = patch_size
        self.patch_padding = patch_padding
        self.view_settings = view_settings
        self.pooled_video_grid_size = pooled_video_grid_size
        self.frames_per_token_grid = frames_per_token_grid
        self.fps = fps
        self.max_frames = max_frames
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer has no token {self.image_token!r}; add it by "
                f"tokenizer.add_tokens({self.image_token!r}, special_tokens=True)."
            )
        video_token = getattr(tokenizer, "video_token", video_token)
        self.video_token_id = None if video_token is None else tokenizer.convert_tokens_to_ids(video_token)
        if self.video_token_id == tokenizer.unk_token_id:
            self.video_token_id = None
        self.video_token = None if self.video_token_id is None else video_token
        if _pinpoints(image_processor) is not None and patch_size is None:
            raise ValueError(
                "patch_size is missing: with image_grid_pinpoints, the processor needs it to count tokens."
            )
        tokenizer.padding_side = "left"
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None)
            if isinstance(chat_template, str) and "image" not in chat_template:
                chat_template = parts_to_text(chat_template)  # an untrusted template, so it is not rendered here
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """`ProcessorMixin.from_pretrained`, which also loads the processor of a LLaVA of transformers (llava-hf).

        The chat template then marks the assistant's words for training where LLaVA's own does not, and the grid is the
        patch grid, unless `pooled_grid_size` is given.

        Example:

            >>> processor = DecoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf", pooled_grid_size=12)

        Raises:
            ValueError: it is neither a DeCo nor a LLaVA that DeCo supports, or it has no processor.
        """
        hub = hub_arguments(kwargs)
        folder = find_llava(pretrained_model_name_or_path, **hub)
        if folder is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = DecoConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        own = arguments_of_config(config)
        own |= {
            name: kwargs.pop(name)
            for name in (*own, "chat_template", "image_token", "fps", "max_frames")
            if name in kwargs
        }
        others = {name: value for name, value in kwargs.items() if name not in (*HUB_ARGUMENTS, "trust_remote_code")}
        tokenizer = load_tokenizer(folder, **others)
        name, num_rows = pretrained_model_name_or_path, config.text_config.vocab_size
        choose_video_token(tokenizer, config.video_token_id, num_rows, name)
        image_processor = load_image_processor(folder, **others)
        check_image_processor(image_processor, config, name)
        if own.get("chat_template") is None:
            template = load_chat_template(folder, tokenizer)
            chosen, _ = choose_chat_template(template, tokenizer, config.text_config.model_type)
            own["chat_template"] = complete_chat_template(chosen, **tokenizer.special_tokens_map)
        tokenizer.chat_template = own["chat_template"]  # it may replace several named templates
        return cls(image_processor, tokenizer, **own)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        pooled_grid_size=12,
        chat_template=None,
        config: DecoConfig | None = None,
    ) -> "DecoProcessor":
        """Make the processor for `DecoForConditionalGeneration.from_vision_text_pretrained`: the vision tower's image
        processor and the language model's tokenizer, with `"<image>"` added if it is missing.

        Args:
            vision_model_name_or_path: a vision tower, or a model that has one.
            text_model_name_or_path: a causal language model.
            pooled_grid_size: default grid, an int (square) or `[rows, cols]`.
            chat_template: Jinja template, or a name in `chat_templates.CHAT_TEMPLATES`: `"chatml"`, `"llama3"`, ...
                Default: the language model's own template, adapted to show images. If it has no template, the format
                that its special tokens indicate, or none.
            config: the model's, if it has views or takes videos. Images are then cut into its views, and `"<video>"`
                is added too.

        Raises:
            ValueError: the language model's chat template cannot show images.
        """
        tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path, trust_remote_code=False)
        takes_videos = config is not None and config.video_token_id is not None
        tokenizer.add_tokens(["<image>", "<video>"] if takes_videos else "<image>", special_tokens=True)
        image_processor = AutoImageProcessor.from_pretrained(vision_model_name_or_path, trust_remote_code=False)
        vision_config = AutoConfig.from_pretrained(vision_model_name_or_path, trust_remote_code=False)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        own_template = tokenizer.chat_template
        if isinstance(own_template, dict):
            own_template = own_template.get("default")
        if chat_template is None:
            chat_template = _adapted(own_template, tokenizer)
            if chat_template is None and own_template:
                raise ValueError(
                    f"The chat template of {text_model_name_or_path} cannot show images, and its format is not "
                    f"recognized. Name the format by chat_template: {', '.join(CHAT_TEMPLATES)}, or a Jinja template."
                )
        own = {"pooled_grid_size": pooled_grid_size, **patch_settings(vision_config)}
        if config is not None:
            image_processor = _with_views(image_processor, config)
            own = arguments_of_config(config) | own
        return cls(image_processor, tokenizer, chat_template=CHAT_TEMPLATES.get(chat_template, chat_template), **own)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos=None,
        **kwargs: Unpack[DecoCallKwargs],
    ):
        """Prepare images and text for the model.

        Args:
            images: one image, a list, or one list per text: PIL images, arrays, tensors, paths, URLs, base64.
            text: one text or a list, with one `image_token` for each image.
            videos: one video, a list, or one list per text, with one `video_token` for each video: paths, URLs,
                encoded videos as bytes, or frames as a list of images, an array or a tensor. Files are read by PyAV.
            pooled_grid_size: token budget of this call: an int (square) or `[rows, cols]` for all images, or one
                `[rows, cols]` per image in a list or a `(num_images, 2)` tensor. Default: the processor's grid. For
                images that keep their shape (SigLIP 2 NaFlex), that is cut to the image's own patches. Where images
                are cut into views, it is the grid of a view.
            max_image_tokens: token budget of this call, in place of `pooled_grid_size`: each image gets the largest
                grid with which it has at most as many tokens.
            tiles: for a model without `image_grid_pinpoints`, the number of tiles that each image is cut into, for all
                images or one per image: 1, 4, 9, ... The number of tokens remains that of the grid.
            pooled_video_grid_size: grid of a frame: an int (square) or `[rows, cols]`. Default: the processor's.
            frames_per_token_grid: neighbouring frames that are averaged. Default: the processor's.
            fps: frames per second that are read from a video. Default: the processor's.
            max_frames: the most frames that are read from a video. Default: the processor's.
            add_timestamps: whether the time of its first frame is written before each grid of a video's tokens:
                `"<2.0 seconds>"`.

        Returns:
            `input_ids` and `attention_mask` `(batch, sequence)` and the image processor's `pixel_values` `(num_images,
            3, height, width)`. If `pooled_grid_size` or `max_image_tokens` is given, also `pooled_grid_sizes`
            `(num_images, 2)`. If images are cut into views, `pixel_values` is `(num_images, max_num_views, 3, height,
            width)`, and there are `image_sizes` `(num_images, 2)`. With videos, `pixel_values_videos` `(num_videos,
            max_num_frames, 3, height, width)` and `pooled_video_sizes` `(num_videos, 4)`.

        Raises:
            ValueError: an image or video cannot be read, the number of images or videos is not that of their tokens in
                the text, a grid is malformed or (if `patch_size` is known) larger than an image's patch grid, no grid
                has as few tokens as `max_image_tokens`, or truncation cuts an image.
        """
        inputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if _is_for_vllm(kwargs):
            self._separate_images(inputs)
        return inputs

    def _separate_images(self, inputs) -> None:
        """Change the processor's output to one entry for each image, which is what vLLM puts into its cache.

        `image_grid_thw` then replaces `pooled_grid_sizes`. It is the one field that vLLM's Transformers backend passes
        to `DecoModel.get_rope_index`, which explains its columns.
        """
        if "pixel_values" not in inputs:
            return
        grids = torch.tensor(self.image_grids(inputs, inputs.pop("pooled_grid_sizes", None)))
        views = inputs["pixel_values"]
        if "spatial_shapes" in inputs:
            sizes = torch.as_tensor(inputs["spatial_shapes"]) * self.image_processor.patch_size
        elif self.has_views:
            sizes = torch.as_tensor(inputs["image_sizes"])
        else:  # of a picture, or of one of its tiles
            sizes = torch.tensor([image.shape[-2:] for image in views])
        if "image_sizes" in inputs:  # without the empty views, which depend on the other images
            maps = self.image_maps(inputs, grids)
            views = [image[: num_map_views(maps_of_image)] for image, maps_of_image in zip(views, maps, strict=True)]
        for name in {"image_sizes", *self.image_processor.model_input_names} & inputs.keys():
            inputs[name] = list(inputs[name])
        inputs["image_grid_thw"] = torch.cat([sizes, grids], dim=-1)  # (num_images, 4)
        # vLLM divides pixel_values, or what becomes of those of different shapes, by products of image_grid_thw. It
        # stacks one number per image, and passes on as it is what has a name of its own.
        inputs["views"] = list(views)
        inputs["pixel_values"] = [torch.zeros(1) for _ in views]

    @property
    def model_input_names(self) -> list[str]:
        names = super().model_input_names
        return names if self.video_token is None else [*names, "pixel_values_videos", "pooled_video_sizes"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is not None:
            options = kwargs | (kwargs.get("images_kwargs") or {})
            channels = options.get("input_data_format")
            do_rescale = options.get("do_rescale")
            images = read_images(
                images,
                None if channels is None else str(getattr(channels, "value", channels)).removeprefix("channels_"),
                keep_floats=not (self.image_processor.do_rescale if do_rescale is None else do_rescale),
            )
            if len(make_flat_list_of_images(images)) == 0:  # a batch of texts only
                images = None
        if videos is not None:
            if isinstance(text, (list, tuple)):
                self._count_videos(list(text), videos)
            videos = _list_videos(videos) or None
        images, text, videos, audio = super().prepare_inputs_layout(
            images=images, text=text, videos=videos, audio=audio, **kwargs
        )
        takes_samples = "batch_num_images" in self.image_processor.model_input_names
        if images is not None and text is not None and takes_samples and not _is_for_vllm(kwargs):
            images = _nested_by_text(images, [sample.count(self.image_token) for sample in text])
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, **kwargs):
        if videos is not None and self.video_token is None:
            raise ValueError("The processor takes no videos: its tokenizer has no token '<video>'.")
        if text is not None:  # transformers does not count per text, and 5.19 does not count
            self._count_placeholders(text, images)
            if self.video_token is not None:
                num_tokens, num_videos = sum(sample.count(self.video_token) for sample in text), len(videos or [])
                if num_tokens != num_videos:
                    raise ValueError(
                        f"The number of {self.video_token} tokens in the prompts should be the same as the number of "
                        f"videos: found {num_tokens} tokens and {num_videos} videos."
                    )
                text = [sample.replace(self.video_token, "") for sample in text]  # they are counted
        if text is not None or images is not None or videos is None:
            super().validate_inputs(images=images, text=text, **kwargs)

    def _count_placeholders(self, text: list[str], images) -> None:
        num_tokens = [sample.count(self.image_token) for sample in text]
        num_images = 0 if images is None else len(make_flat_list_of_images(images))
        if sum(num_tokens) != num_images:
            raise ValueError(
                f"The number of {self.image_token} tokens in the prompts should be the same as the number of "
                f"images: found {sum(num_tokens)} tokens and {num_images} images."
            )
        if isinstance(images, list) and all(isinstance(images_of_text, list) for images_of_text in images):
            numbers = [len(images_of_text) for images_of_text in images]
            if len(numbers) == len(num_tokens) and numbers != num_tokens:
                raise ValueError(
                    f"The texts have {num_tokens} {self.image_token} tokens, and their images are {numbers}."
                )

    def _count_videos(self, text: list[str] | tuple[str, ...], videos) -> None:
        """Check the videos of each text, if they are given as one list per text."""
        is_per_text = all(isinstance(entry, (list, tuple)) and not _is_frames(entry) for entry in videos)
        if is_per_text and self.video_token is not None and len(videos) == len(text):
            numbers = [len(_list_videos(videos_of_text)) for videos_of_text in videos]
            num_tokens = [sample.count(self.video_token) for sample in text]
            if numbers != num_tokens:
                raise ValueError(
                    f"The texts have {num_tokens} {self.video_token} tokens, and their videos are {numbers}."
                )

    # transformers' own method refuses arguments that valid_processor_kwargs does not name
    # private, seen in transformers 5.19 to 5.24
    def _merge_kwargs(self, *args, **kwargs):
        own = {}
        for group, names in (("images_kwargs", _IMAGE_OPTIONS), ("videos_kwargs", _VIDEO_OPTIONS)):
            given = dict(kwargs.pop(group, None) or {})
            own[group] = {name: kwargs.pop(name) for name in names if name in kwargs}
            own[group] |= {name: given.pop(name) for name in names if name in given}
            kwargs[group] = given
        merged_kwargs = super()._merge_kwargs(*args, **kwargs)
        for group, options in own.items():  # for _process_images and _process_videos
            merged_kwargs[group] |= {name: value for name, value in options.items() if value is not None}
        return merged_kwargs

    # --- images ------------------------------------------------------------------------------------------------------

    @property
    def has_views(self) -> bool:
        """Whether the image processor cuts images into views, so that their tokens depend on their sizes."""
        return _pinpoints(self.image_processor) is not None

    def _views(self, view_size: Grid) -> Views:
        pinpoints = _pinpoints(self.image_processor)
        view_grid = count_patches(view_size, self.patch_size, self.patch_padding)
        return Views(view_size, view_grid, pinpoints, **(self.view_settings or {}))

    def image_maps(self, image_inputs: dict, pooled_grid_size=None, max_image_tokens=None) -> list[list[TokenMap]]:
        """The maps of tokens of each image, from which `views.num_map_tokens` counts its tokens.

        Args:
            image_inputs: the processor's output: pixels, or SigLIP 2's patches with `spatial_shapes`.
            pooled_grid_size, max_image_tokens: as in `__call__`.

        Raises:
            ValueError: a grid is malformed or (if the patch grid is known) larger than the image's patch grid.
        """
        grids = self.image_grids(image_inputs, pooled_grid_size, max_image_tokens)
        return [maps(grid) for maps, grid in zip(self._map_makers(image_inputs), grids, strict=True)]

    def _map_makers(self, image_inputs: dict) -> list[Callable[[Grid], list[TokenMap]]]:
        """For each image, a function that gives its maps at a grid."""
        if image_inputs.get("image_sizes") is None:
            return [partial(_one_map, patch_grid) for patch_grid in self._patch_grids(image_inputs)]
        views = [self._views(tuple(pixels[0].shape[-2:])) for pixels in image_inputs["pixel_values"]]
        images = zip(views, _sizes(image_inputs), _is_tiled(image_inputs), strict=True)
        return [
            partial(views_of_image.image_maps, size, is_tiled=is_tiled) for views_of_image, size, is_tiled in images
        ]

    def image_grids(self, image_inputs: dict, pooled_grid_size=None, max_image_tokens=None) -> list[Grid]:
        """The grid `(rows, cols)` that each image, or each of its views, is pooled to. See `image_maps`."""
        patch_grids = self._patch_grids(image_inputs)
        if max_image_tokens is not None:
            if pooled_grid_size is not None:
                raise ValueError("Give either pooled_grid_size or max_image_tokens, not both.")
            makers = self._map_makers(image_inputs)
            return [
                _largest_grid(patch_grid, max_image_tokens, maps)
                for patch_grid, maps in zip(patch_grids, makers, strict=True)
            ]
        if pooled_grid_size is None and image_inputs.get("spatial_shapes") is not None:
            default = parse_grid(self.pooled_grid_size)
            return [fit_grid(default, patch_grid) for patch_grid in patch_grids if patch_grid is not None]
        grids = _grids_per_image(
            self.pooled_grid_size if pooled_grid_size is None else pooled_grid_size, len(patch_grids)
        )
        for index, (grid, patch_grid) in enumerate(zip(grids, patch_grids, strict=True), start=1):
            if patch_grid is not None:
                check_grid(grid, patch_grid, of=f"image {index}")
        return grids

    def _patch_grids(self, image_inputs) -> list[Grid | None]:
        """The patch grid of each image, or of its views, None if `patch_size` is not known."""
        if image_inputs.get("spatial_shapes") is not None:
            return [(int(rows), int(cols)) for rows, cols in image_inputs["spatial_shapes"]]
        if self.patch_size is None:
            return [None] * len(image_inputs["pixel_values"])
        has_views = image_inputs.get("image_sizes") is not None
        view_sizes = [(image[0] if has_views else image).shape[-2:] for image in image_inputs["pixel_values"]]
        view_grids = [count_patches(size, self.patch_size, self.patch_padding) for size in view_sizes]
        tiles = [(1, 1)] * len(view_sizes)
        if has_views and not self.has_views:  # the grid is that of the tiles together
            sizes = zip(_sizes(image_inputs), view_sizes, strict=True)
            tiles = [(size[0] // view_size[0], size[1] // view_size[1]) for size, view_size in sizes]
        return [(rows * down, cols * across) for (rows, cols), (down, across) in zip(view_grids, tiles, strict=True)]

    # private, seen in transformers 5.19 to 5.24
    def _process_images(
        self, images, pooled_grid_size=None, max_image_tokens=None, tiles=None, input_data_format=None, **kwargs
    ):
        if tiles is not None:
            image_inputs = self._tile(make_flat_list_of_images(images), tiles, **kwargs)
        else:
            image_inputs = self.image_processor(images, **kwargs)
            if self.has_views and not (self.view_settings or {}).get("image_overview", True):
                image_inputs["pixel_values"] = _without_overview(image_inputs)
        grids = self.image_grids(image_inputs, pooled_grid_size, max_image_tokens)
        if pooled_grid_size is not None or max_image_tokens is not None:
            image_inputs["pooled_grid_sizes"] = torch.tensor(grids)  # (num_images, 2)
        maps = zip(self._map_makers(image_inputs), grids, strict=True)
        return image_inputs, [self.image_token * num_map_tokens(make(grid)) for make, grid in maps]

    def _tile(self, images: list, tiles, **kwargs) -> dict:
        """The inputs of images that are cut into tiles. Each image is prepared as the image processor does, at the
        size of all its tiles together."""
        if self.has_views:
            raise ValueError(f"tiles={tiles!r}: this processor cuts images into views by itself; leave tiles out.")
        if hasattr(self.image_processor, "max_num_patches"):
            raise ValueError(f"tiles={tiles!r}: this image processor keeps the shape of images; leave tiles out.")
        if self.patch_size is None:
            raise ValueError(f"tiles={tiles!r} needs the processor's patch_size, which is not set.")
        sides = _sides(tiles, len(images))
        if set(sides) == {1}:
            return self.image_processor(images, **kwargs)
        kwargs["return_tensors"] = "pt"
        views, sizes = [], []
        for image, side in zip(images, sides, strict=True):
            scaled = {
                name: _scaled_size(kwargs.get(name) or getattr(self.image_processor, name, None), side)
                for name in ("size", "crop_size")
            }
            given = {**kwargs, **{name: size for name, size in scaled.items() if size is not None}}
            pixels = self.image_processor([image], **given)["pixel_values"][0]  # (3, height, width)
            height, width = pixels.shape[-2] // side, pixels.shape[-1] // side
            rows = pixels[:, : side * height, : side * width].unflatten(1, (side, height))
            tiles_of_image = rows.unflatten(3, (side, width)).permute(1, 3, 0, 2, 4)
            views.append(tiles_of_image.flatten(0, 1))  # (side * side, 3, height, width)
            sizes.append((side * height, side * width))
        return {"pixel_values": _padded(views), "image_sizes": torch.tensor(sizes)}

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of an image, one for each of its tokens."""
        return self.image_token * num_map_tokens(
            self.image_maps(image_inputs, image_inputs.get("pooled_grid_sizes"))[image_idx]
        )

    # private, seen in transformers 5.19 to 5.24
    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens and views per image for the given sizes `(height, width)`. vLLM calls this."""
        if image_sizes is None:
            return MultiModalData()
        options = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)["images_kwargs"]
        inputs = self.blank_inputs([(int(height), int(width)) for height, width in image_sizes], options)
        maps = self.image_maps(inputs, options.get("pooled_grid_size"), options.get("max_image_tokens"))
        return MultiModalData(
            num_image_tokens=[num_map_tokens(maps_of_image) for maps_of_image in maps],
            num_image_patches=[num_map_views(maps_of_image) for maps_of_image in maps],
        )

    def blank_inputs(self, image_sizes: list[Grid], options: dict) -> dict:
        """What `image_maps` reads of images of these sizes, without their pixels."""
        num_images = len(image_sizes)
        if hasattr(self.image_processor, "max_num_patches"):
            # SigLIP 2's image processor derives the patch grid from an image's size, so blank images serve
            blank = [Image.new("RGB", (width, height)) for height, width in image_sizes]
            return self.image_processor(blank, return_tensors="pt") if blank else {"pixel_values": []}
        height, width = _view_size(self.image_processor, options)
        view = torch.empty(3, height, width, device="meta")
        if self.has_views:
            return {"pixel_values": [[view]] * num_images, "image_sizes": image_sizes}
        sides = _sides(options.get("tiles") or 1, num_images)
        if set(sides) <= {1}:
            return {"pixel_values": [view] * num_images}
        return {
            "pixel_values": [[view]] * num_images,
            "image_sizes": [(side * height, side * width) for side in sides],
        }

    # --- videos ------------------------------------------------------------------------------------------------------

    @property
    def video_processor(self):
        """What prepares the frames of videos: the image processor, without views. transformers looks the name up."""
        if self.video_token is None:
            raise AttributeError("a processor without a video token has no video_processor")
        return self._frame_processor

    @cached_property
    def _frame_processor(self):
        is_naflex = hasattr(self.image_processor, "max_num_patches")
        if not self.has_views and not is_naflex:
            return self.image_processor
        settings = _preparation(self.image_processor)
        if is_naflex:
            side = isqrt(self.image_processor.max_num_patches) * self.image_processor.patch_size
            settings["size"] = {"height": side, "width": side}
        settings.setdefault("do_center_crop", False)
        return build_image_processor("CLIPImageProcessor", settings)

    @property
    def frame_size(self) -> Grid:
        """`(height, width)` of the prepared frames of a video."""
        return _view_size(self._frame_processor, {})

    def frame_pixels(self, frames: Iterable[Image.Image], **kwargs) -> torch.Tensor:
        """The pixels `(num_frames, 3, height, width)` of a video's frames. `kwargs` are the image processor's."""
        return self._frame_processor(list(frames), **{**kwargs, "return_tensors": "pt"})["pixel_values"]

    def video_size(
        self, num_frames: int, frame_size: Grid, pooled_video_grid_size=None, frames_per_token_grid=None
    ) -> list[int]:
        """A video's row of `pooled_video_sizes`: its frames, those that are averaged, rows, columns.

        Args:
            frame_size: `(height, width)` of its prepared frames.
            pooled_video_grid_size, frames_per_token_grid: as in `__call__`.

        Raises:
            ValueError: the grid is malformed or larger than the patch grid, or no frames are averaged.
        """
        if self.patch_size is None:
            raise ValueError("Videos need the processor's patch_size, which is not set.")
        views = self._views(frame_size)
        given = self.pooled_video_grid_size if pooled_video_grid_size is None else pooled_video_grid_size
        if given is None:
            rows, cols = default_video_grid(views.full_video_grid)
        else:
            rows, cols = check_grid(given, views.view_grid, of="a frame", name="pooled_video_grid_size")
        averaged = self.frames_per_token_grid if frames_per_token_grid is None else frames_per_token_grid
        if not isinstance(averaged, int) or averaged < 1:
            raise ValueError(f"frames_per_token_grid must be a positive int, got {averaged!r}.")
        return [num_frames, averaged, rows, cols]

    def video_text(self, video_size: list[int], frame_size: Grid, seconds: list[float] | None = None) -> str:
        """The placeholders of a video, one for each of its tokens.

        Args:
            video_size: from the method `video_size`.
            frame_size: `(height, width)` of its prepared frames.
            seconds: the time of each frame, to write timestamps.
        """
        maps = self.video_maps(video_size, frame_size)
        texts = [str(self.video_token) * token_map.num_tokens for token_map in maps]
        if seconds is not None:
            _, averaged, *_ = video_size
            texts = [f"<{seconds[index * averaged]:.1f} seconds>{text}" for index, text in enumerate(texts)]
        return "".join(texts)

    def video_maps(self, video_size: list[int], frame_size: Grid) -> list[TokenMap]:
        """The maps of tokens of a video. The arguments are those of `video_text`."""
        num_frames, averaged, *grid = video_size
        return self._views(frame_size).video_maps(num_frames, averaged, (grid[0], grid[1]))

    # private, seen in transformers 5.19 to 5.24
    def _process_videos(
        self,
        videos,
        pooled_video_grid_size=None,
        frames_per_token_grid=None,
        fps=None,
        max_frames=None,
        add_timestamps=None,
        **kwargs,
    ):
        prepared = []
        for number, video in enumerate(videos, start=1):
            if not isinstance(video, PreparedVideo):
                rate, most = self.fps if fps is None else fps, self.max_frames if max_frames is None else max_frames
                frames = _named_errors(read_video(video, rate, most), number, video)
                video = self.prepare_video(frames, pooled_video_grid_size, frames_per_token_grid, **kwargs)
            prepared.append(video)
        inputs = {"pooled_video_sizes": torch.tensor([video.size for video in prepared])}
        pixels = [video.pixels for video in prepared if video.pixels is not None]
        if 0 < len(pixels) < len(prepared):
            raise ValueError("Some videos are encoded and some are not; encode all of them, or none.")
        if pixels:
            inputs["pixel_values_videos"] = _padded(pixels)
        texts = [
            self.video_text(video.size, video.frame_size, video.seconds if add_timestamps else None)
            for video in prepared
        ]
        return inputs, texts

    def prepare_video(
        self,
        frames: Iterable[tuple[float, Image.Image]],
        pooled_video_grid_size=None,
        frames_per_token_grid=None,
        **kwargs,
    ) -> PreparedVideo:
        """Prepare a video's frames, a few at a time, so that only those few are in memory at their own size.

        Args:
            frames: seconds and picture of each, from `videos.read_video`.
            pooled_video_grid_size, frames_per_token_grid: as in `__call__`.
            kwargs: of the image processor.

        Raises:
            ValueError: see `video_size`.
        """
        allowed = self._frame_processor.valid_kwargs.__annotations__
        kwargs = {name: value for name, value in kwargs.items() if name in allowed}
        pixels, seconds = [], []
        for chunk in in_chunks(frames, _FRAMES_PER_CHUNK):
            seconds += [second for second, _ in chunk]
            pixels.append(self.frame_pixels([picture for _, picture in chunk], **kwargs))
        frame_size = tuple(pixels[0].shape[-2:])
        size = self.video_size(len(seconds), frame_size, pooled_video_grid_size, frames_per_token_grid)
        return PreparedVideo(size, frame_size, seconds, pixels=torch.cat(pixels))

    # transformers' own error does not say which text was cut and what to do
    # private, seen in transformers 5.19 to 5.24
    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        input_ids = text_inputs["input_ids"]
        if hasattr(input_ids, "tolist"):
            input_ids = input_ids.tolist()
        placeholders = {"image": (self.image_token, self.image_token_id)}
        if self.video_token is not None:
            placeholders["video"] = (self.video_token, self.video_token_id)
        for sample, (expanded, ids) in enumerate(zip(text, input_ids, strict=True)):
            for modality, (token, token_id) in placeholders.items():
                expected, found = expanded.count(token), ids.count(token_id)
                if expected != found:
                    one = "an image" if modality == "image" else "a video"
                    raise ValueError(
                        f"Text {sample} was cut to {len(ids)} tokens, which leaves {found} of its {expected} "
                        f"{modality} placeholders: {one} would be cut. Raise max_length, shorten the text, choose a "
                        f"smaller pooled_grid_size (pooled_video_grid_size), or turn truncation off."
                    )

    def to_dict(self):
        return {**super().to_dict(), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        files = super().save_pretrained(save_directory)
        copy_remote_code(save_directory)
        if push_to_hub:  # super would upload its own files, without the code
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def push_to_hub(self, repo_id: str, *, max_shard_size=None, **kwargs):
        """`ProcessorMixin.push_to_hub`, with the code. The model's `push_to_hub` also writes the card."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, **kwargs)


def arguments_of_config(config: DecoConfig) -> dict:
    """The arguments of `DecoProcessor` that are a model's: its grids, its patch size, its views."""
    return {
        "pooled_grid_size": config.pooled_grid_size,
        **patch_settings(config.vision_config),
        "view_settings": config.view_settings if config.image_grid_pinpoints or config.video_token_id else None,
        "pooled_video_grid_size": config.pooled_video_grid_size,
        "frames_per_token_grid": config.frames_per_token_grid,
    }


def _with_views(image_processor, config: DecoConfig):
    """An image processor with the same preparation, which cuts images into the views of a config."""
    if config.image_grid_pinpoints is None:
        return image_processor
    height, width = config.view_size
    size = {"height": height, "width": width}
    settings = {
        **_preparation(image_processor),
        "size": size,
        "crop_size": size,
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }
    has_cap = parse_aspect_ratio(config.vision_aspect_ratio) is not None
    return build_image_processor("LlavaOnevisionImageProcessor" if has_cap else "LlavaNextImageProcessor", settings)


def _preparation(image_processor) -> dict:
    """The settings that say how an image processor prepares an image of one view."""
    names = {"size", "crop_size", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "resample"}
    names |= {"do_normalize", "image_mean", "image_std", "do_convert_rgb"}
    return {name: value for name, value in image_processor.to_dict().items() if name in names and value is not None}


def _adapted(chat_template, tokenizer):
    return adapt_chat_template(chat_template, tokenizer.get_vocab(), **tokenizer.special_tokens_map)


def _grids_per_image(pooled_grid_size, num_images: int) -> list[tuple[int, int]]:
    """One `(rows, cols)` per image from one grid for all or a list of pairs."""
    if isinstance(pooled_grid_size, torch.Tensor):
        pooled_grid_size = pooled_grid_size.tolist()
    if not isinstance(pooled_grid_size, (list, tuple)) or not any(
        isinstance(entry, (list, tuple, torch.Tensor)) for entry in pooled_grid_size
    ):
        return [parse_grid(pooled_grid_size)] * num_images
    if len(pooled_grid_size) != num_images:
        raise ValueError(
            f"pooled_grid_size has {len(pooled_grid_size)} grids for {num_images} images; give one grid for all, or "
            f"one [rows, cols] per image."
        )
    return [parse_grid(grid.tolist() if isinstance(grid, torch.Tensor) else grid) for grid in pooled_grid_size]


def read_images(images, channels: str | None = None, keep_floats: bool = False):
    """Read and normalize pictures with `pixels.read_image`, and keep the nesting of lists.

    Args:
        images: one picture or nested lists of pictures. A four-dimensional array or tensor is a list.
        channels: `"first"` or `"last"`, the position of arrays' channels if a shape is ambiguous.
        keep_floats: whether floating-point arrays and tensors are the model's own values, which are not scaled. Their
            three channels are moved to the front.

    Raises:
        ValueError: a picture cannot be read. The message has its number, its name and the reason.
    """
    position = 0

    def read(image):
        nonlocal position
        if isinstance(image, (list, tuple)) or getattr(image, "ndim", None) == 4:
            return [read(entry) for entry in image]
        position += 1
        try:
            is_float = "float" in str(getattr(image, "dtype", ""))
            return _model_values(image, channels) if keep_floats and is_float else read_image(image, channels)
        except Exception as error:  # decoders and downloads raise many kinds
            raise _cannot_read("Image", position, image, error) from error

    return read(images)


def _cannot_read(kind: str, number: int, source, error: Exception) -> ValueError:
    name = repr(source if isinstance(source, str) else getattr(source, "filename", None) or type(source).__name__)
    name = name if len(name) <= 120 else name[:117] + "..."
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ValueError(f"{kind} {number} ({name}) cannot be read: {reason}")


def _named_errors(frames: Iterator, number: int, video) -> Iterator:
    try:
        yield from frames
    except Exception as error:  # decoders and downloads raise many kinds
        raise _cannot_read("Video", number, video, error) from error


def _list_videos(videos) -> list:
    """The videos of nested lists. A list of images is one video."""
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if _is_frames(videos):
        return [list(videos)]
    return [video for entry in videos for video in _list_videos(entry)]


def _is_frames(videos: list | tuple) -> bool:
    return bool(videos) and all(
        isinstance(frame, Image.Image) or getattr(frame, "ndim", None) == 3 for frame in videos
    )


def _is_for_vllm(kwargs: dict) -> bool:
    """Whether vLLM calls the processor, for images that it puts into its cache one by one, whatever the prompt. It
    asks for the offsets of images alone; transformers' chat templates ask for those of the text too."""
    return bool(kwargs.get("return_text_replacement_offsets")) and not kwargs.get("return_offsets_mapping")


def _nested_by_text(images, num_tokens: list[int]) -> list[list]:
    """A list of images for each text."""
    flat = iter(make_flat_list_of_images(images))
    nested = [[image for _, image in zip(range(number), flat)] for number in num_tokens]  # noqa: B905
    return nested if sum(map(len, nested)) == sum(num_tokens) else images  # a wrong number is refused later


def _sizes(image_inputs: dict) -> list[Grid]:
    return [(int(height), int(width)) for height, width in image_inputs["image_sizes"]]


def _one_map(patch_grid: Grid | None, grid: Grid) -> list[TokenMap]:
    """The maps of an image of one view. For its number of tokens, the patch grid does not matter."""
    return one_map(patch_grid or grid, grid)


def _is_tiled(image_inputs: dict) -> list[bool]:
    return tiled_images(len(image_inputs["image_sizes"]), image_inputs.get("batch_num_images"))


def _without_overview(image_inputs: dict):
    """The tiles of images, without the view of the whole picture, which LLaVA's image processors put first."""
    tiled = zip(image_inputs["pixel_values"], _is_tiled(image_inputs), strict=True)
    views = [image[1:] if is_tiled else image for image, is_tiled in tiled]
    return _padded(views) if isinstance(image_inputs["pixel_values"], torch.Tensor) else views


def _padded(views: list[torch.Tensor]) -> torch.Tensor:
    """`(num_images, max_num_views, 3, height, width)`, padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence(views, batch_first=True)


def _sides(tiles, num_images: int) -> list[int]:
    """How many tiles the side of each image has."""
    numbers = list(tiles) if isinstance(tiles, (list, tuple)) else [tiles] * num_images
    if len(numbers) != num_images:
        raise ValueError(f"tiles has {len(numbers)} numbers for {num_images} images; give one for all, or one each.")
    for number in numbers:
        is_int = isinstance(number, int) and not isinstance(number, bool)
        if not is_int or not 1 <= number <= 256 or isqrt(number) ** 2 != number:
            raise ValueError(f"tiles must be a square number, 1, 4, 9, ... up to 256, got {number!r}.")
    return [isqrt(number) for number in numbers]


def _pinpoints(image_processor) -> list[list[int]] | None:
    return getattr(image_processor, "image_grid_pinpoints", None)


def _scaled_size(size, side: int):
    """A size of an image processor, for an image of `side` x `side` tiles."""
    if size is None or isinstance(size, int):
        return size and side * size
    return {name: side * value for name, value in dict(size).items() if value is not None}


def _view_size(image_processor, options: dict) -> Grid:
    """`(height, width)` of the views that an image processor makes."""
    crop = options.get("crop_size") or getattr(image_processor, "crop_size", None)
    size = options.get("size") or image_processor.size
    size = dict(crop if getattr(image_processor, "do_center_crop", False) and crop else size)
    height = size.get("height") or size["shortest_edge"]
    return height, size.get("width") or height


def _largest_grid(patch_grid: Grid | None, max_image_tokens: int, maps: Callable[[Grid], list[TokenMap]]) -> Grid:
    if not isinstance(max_image_tokens, int) or isinstance(max_image_tokens, bool) or max_image_tokens < 1:
        raise ValueError(f"max_image_tokens must be a positive int, got {max_image_tokens!r}.")
    if patch_grid is None:  # the grid is at most the square root
        patch_grid = isqrt(max_image_tokens), isqrt(max_image_tokens)
    return largest_grid(patch_grid, max_image_tokens, lambda grid: num_map_tokens(maps(grid)))


def _model_values(array, channels):
    """An array or tensor as `(3, height, width)`, with its values unchanged."""
    if array.ndim == 3:
        if not channels_first(array.shape, channels):
            array = array.transpose(2, 0, 1) if isinstance(array, np.ndarray) else array.permute(2, 0, 1)
        if array.shape[0] == 3:
            return array
    raise ValueError(f"its shape {tuple(array.shape)} is not (3, height, width), as do_rescale=False needs it")


__all__ = ["DecoProcessor"]
