# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo's processor: prepares images and text, and expands each image's placeholder to its token budget."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput

from .chat_templates import CHAT_TEMPLATES, adapt_chat_template, parts_to_text
from .configuration_deco import DecoConfig, check_grid, fit_grid, num_image_tokens, parse_grid
from .hub import AUTO_MAP, copy_remote_code, upload
from .llava import (
    HUB_ARGUMENTS,
    choose_chat_template,
    find_llava,
    hub_arguments,
    load_chat_template,
    load_image_processor,
    load_tokenizer,
)
from .pixels import channels_first, read_image
from .videos import read_video  # noqa: F401  remote code holds the files that this one imports


class DecoProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {"text_kwargs": {"padding": False}}


class DecoImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    pooled_grid_size: int | list | tuple | torch.Tensor | None


class DecoCallKwargs(DecoProcessorKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call. `pooled_grid_size` is explained in `DecoProcessor.__call__`.

    It is not among the fields of `valid_processor_kwargs`, because transformers (since 5.23) allows none of these as
    an argument of `__init__`. It is also among `images_kwargs`, because vLLM loads a processor again for each value of
    an argument that is in none of the groups.
    """

    images_kwargs: DecoImagesKwargs
    pooled_grid_size: int | list | tuple | torch.Tensor | None


class DecoProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Text is padded on the left, as generation needs. To train with padding on the right, pass `padding_side`.

    Args:
        image_processor: the vision tower's image processor.
        tokenizer: the language model's tokenizer, with the image token in its vocabulary.
        pooled_grid_size: the model's default grid, an int (square) or `[rows, cols]`.
        chat_template: Jinja template. Default: the tokenizer's. If that takes text only, `"<image>"` is written into
            the text.
        image_token: placeholder of an image in the text, if the tokenizer does not name one.
        patch_size: the vision tower's patch size in pixels. With it, the processor refuses a grid that is larger than
            an image's patch grid. Without it, the model does, which stops a vLLM server.
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
        **kwargs,
    ):
        parse_grid(pooled_grid_size)
        self.pooled_grid_size = pooled_grid_size
        self.patch_size = patch_size
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"The tokenizer has no token {self.image_token!r}; add it by "
                f"tokenizer.add_tokens({self.image_token!r}, special_tokens=True)."
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
        own = {"pooled_grid_size": config.pooled_grid_size, "patch_size": config.vision_config.patch_size}
        own |= {name: kwargs.pop(name) for name in (*own, "chat_template", "image_token") if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in (*HUB_ARGUMENTS, "trust_remote_code")}
        tokenizer = load_tokenizer(folder, **others)
        image_processor = load_image_processor(folder, **others)
        if own.get("chat_template") is None:
            template = load_chat_template(folder, tokenizer)
            own["chat_template"], _ = choose_chat_template(template, tokenizer, config.text_config.model_type)
        tokenizer.chat_template = own["chat_template"]  # it may replace several named templates
        return cls(image_processor, tokenizer, **own)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model_name_or_path: str, text_model_name_or_path: str, pooled_grid_size=12, chat_template=None
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

        Raises:
            ValueError: the language model's chat template cannot show images.
        """
        tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path, trust_remote_code=False)
        tokenizer.add_tokens("<image>", special_tokens=True)
        image_processor = AutoImageProcessor.from_pretrained(vision_model_name_or_path, trust_remote_code=False)
        vision_config = AutoConfig.from_pretrained(vision_model_name_or_path, trust_remote_code=False)
        patch_size = getattr(vision_config, "vision_config", vision_config).patch_size
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
        return cls(
            image_processor,
            tokenizer,
            pooled_grid_size,
            CHAT_TEMPLATES.get(chat_template, chat_template),
            patch_size=patch_size,
        )

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[DecoCallKwargs],
    ):
        """Prepare images and text for the model.

        Args:
            images: one image, a list, or one list per text: PIL images, arrays, tensors, paths, URLs, base64.
            text: one text or a list, with one `image_token` for each image.
            pooled_grid_size: token budget of this call: an int (square) or `[rows, cols]` for all images, or one
                `[rows, cols]` per image in a list or a `(num_images, 2)` tensor. Default: the processor's grid. For
                images that keep their shape (SigLIP 2 NaFlex), that is cut to the image's own patches.

        Returns:
            `input_ids` and `attention_mask` `(batch, sequence)` and the image processor's `pixel_values` `(num_images,
            3, height, width)`. If `pooled_grid_size` is given, also `pooled_grid_sizes` `(num_images, 2)`.

        Raises:
            ValueError: an image cannot be read, the number of images is not the number of image tokens, a grid is
                malformed or (if `patch_size` is known) larger than an image's patch grid, or truncation cuts an image.
        """
        inputs = super().__call__(images=images, text=text, **kwargs)
        # transformers' chat templates ask for both kinds of offsets, vLLM for those of the images alone
        if kwargs.get("return_text_replacement_offsets") and not kwargs.get("return_offsets_mapping"):
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
        if "spatial_shapes" in inputs:
            sizes = torch.as_tensor(inputs["spatial_shapes"]) * self.image_processor.patch_size
        else:
            sizes = torch.tensor([image.shape[-2:] for image in inputs["pixel_values"]])
        for name in self.image_processor.model_input_names:
            inputs[name] = list(inputs[name])
        inputs["image_grid_thw"] = torch.cat([sizes, grids], dim=-1)  # (num_images, 4)

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
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        if text is not None:  # transformers does not count per text, and 5.19 does not count
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
        super().validate_inputs(images=images, text=text, **kwargs)

    # transformers' own method refuses arguments that valid_processor_kwargs does not name
    # private, seen in transformers 5.19 to 5.24
    def _merge_kwargs(self, *args, pooled_grid_size=None, images_kwargs=None, **kwargs):
        images_kwargs = dict(images_kwargs or {})
        pooled_grid_size = images_kwargs.pop("pooled_grid_size", pooled_grid_size)
        merged_kwargs = super()._merge_kwargs(*args, images_kwargs=images_kwargs, **kwargs)
        if pooled_grid_size is not None:
            merged_kwargs["images_kwargs"]["pooled_grid_size"] = pooled_grid_size  # for _process_images
        return merged_kwargs

    def image_grids(self, image_inputs: dict, pooled_grid_size=None) -> list[tuple[int, int]]:
        """The grid `(rows, cols)` that each image is pooled to.

        Args:
            image_inputs: the image processor's output: pixels, or SigLIP 2's patches with `spatial_shapes`.
            pooled_grid_size: as in `__call__`.

        Raises:
            ValueError: a grid is malformed or (if the patch grid is known) larger than the image's patch grid.
        """
        patch_grids = self._patch_grids(image_inputs)
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

    def _patch_grids(self, image_inputs) -> list[tuple[int, int] | None]:
        """The patch grid of each image, None if `patch_size` is not known."""
        if image_inputs.get("spatial_shapes") is not None:
            return [(int(rows), int(cols)) for rows, cols in image_inputs["spatial_shapes"]]
        if self.patch_size is None:
            return [None] * len(image_inputs["pixel_values"])
        sizes = [image.shape[-2:] for image in image_inputs["pixel_values"]]
        return [(height // self.patch_size, width // self.patch_size) for height, width in sizes]

    # private, seen in transformers 5.19 to 5.24
    def _process_images(self, images, pooled_grid_size=None, input_data_format=None, **kwargs):
        image_inputs = self.image_processor(images, **kwargs)
        grids = self.image_grids(image_inputs, pooled_grid_size)
        if pooled_grid_size is not None:
            image_inputs["pooled_grid_sizes"] = torch.tensor(grids)  # (num_images, 2)
        return image_inputs, [self.image_token * num_image_tokens(grid) for grid in grids]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of an image, one for each cell of its grid."""
        grids = self.image_grids(image_inputs, image_inputs.get("pooled_grid_sizes"))
        return self.image_token * num_image_tokens(grids[image_idx])

    # private, seen in transformers 5.19 to 5.24
    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens per image for the given sizes `(height, width)`. vLLM calls this."""
        if image_sizes is None:
            return MultiModalData()
        pooled_grid_size = kwargs.get("pooled_grid_size")
        if pooled_grid_size is None and hasattr(self.image_processor, "max_num_patches"):
            # SigLIP 2's image processor derives the patch grid from an image's size, so blank images serve
            blank = [Image.new("RGB", (width, height)) for height, width in image_sizes]
            grids = self.image_grids(self.image_processor(blank, return_tensors="pt")) if blank else []
        else:
            grids = _grids_per_image(pooled_grid_size or self.pooled_grid_size, len(image_sizes))
        return MultiModalData(
            num_image_tokens=[num_image_tokens(grid) for grid in grids], num_image_patches=[1] * len(image_sizes)
        )

    # transformers' own error does not say which text was cut and what to do
    # private, seen in transformers 5.19 to 5.24
    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        input_ids = text_inputs["input_ids"]
        if hasattr(input_ids, "tolist"):
            input_ids = input_ids.tolist()
        for sample, (expanded, ids) in enumerate(zip(text, input_ids, strict=True)):
            expected, found = expanded.count(self.image_token), ids.count(self.image_token_id)
            if expected != found:
                raise ValueError(
                    f"Text {sample} was cut to {len(ids)} tokens, which leaves {found} of its {expected} image "
                    f"placeholders: an image would be cut. Raise max_length, shorten the text, choose a smaller "
                    f"pooled_grid_size, or turn truncation off."
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
            name = repr(image if isinstance(image, str) else getattr(image, "filename", None) or type(image).__name__)
            name = name if len(name) <= 120 else name[:117] + "..."
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"Image {position} ({name}) cannot be read: {reason}") from error

    return read(images)


def _model_values(array, channels):
    """An array or tensor as `(3, height, width)`, with its values unchanged."""
    if array.ndim == 3:
        if not channels_first(array.shape, channels):
            array = array.transpose(2, 0, 1) if isinstance(array, np.ndarray) else array.permute(2, 0, 1)
        if array.shape[0] == 3:
            return array
    raise ValueError(f"its shape {tuple(array.shape)} is not (3, height, width), as do_rescale=False needs it")


__all__ = ["DecoProcessor"]
