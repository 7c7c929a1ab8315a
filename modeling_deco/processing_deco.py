# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo's processor: images and text in, placeholders expanded to each image's token budget."""

from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .configuration_deco import AUTO_MAP, copy_remote_code, num_image_tokens, parse_grid


class DecoImagesKwargs(ImagesKwargs, total=False):
    """`pooled_grid_size`: see `DecoProcessor.__call__`."""

    pooled_grid_size: int | list | tuple | torch.Tensor | None


class DecoProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DecoImagesKwargs

    _defaults = {"text_kwargs": {"padding": False}}  # noqa: RUF012


class DecoProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Text is padded on the left, as generation needs; trainers that pad on the right say so per call.

    Args:
        image_processor: of the vision tower.
        tokenizer: of the language model, with the image token in its vocabulary.
        pooled_grid_size: default grid, an int (square) or `[rows, cols]`: the model's.
        chat_template: Jinja template; default: the tokenizer's.
        image_token: placeholder of an image in the text, where the tokenizer does not name one.
    """

    valid_processor_kwargs = DecoProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        pooled_grid_size=12,
        chat_template=None,
        image_token="<image>",  # noqa: S107
        **kwargs,
    ):
        parse_grid(pooled_grid_size)
        self.pooled_grid_size = pooled_grid_size
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        tokenizer.padding_side = "left"
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls, vision_model_name_or_path: str, text_model_name_or_path: str, pooled_grid_size=12, chat_template=None
    ) -> "DecoProcessor":
        """The processor that goes with `DecoForConditionalGeneration.from_vision_text_pretrained`: the vision tower's
        image processor, and the language model's tokenizer with `"<image>"` added where it is missing."""
        tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path)
        tokenizer.add_tokens("<image>", special_tokens=True)
        image_processor = AutoImageProcessor.from_pretrained(vision_model_name_or_path)
        return cls(image_processor, tokenizer, pooled_grid_size=pooled_grid_size, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs: Unpack[DecoProcessorKwargs]):
        """Prepare images and text for the model.

        Args:
            images: one image, a list, or one list per text: PIL images, arrays, tensors, paths, URLs, base64.
            text: one text or a list, with one `image_token` for each image.
            pooled_grid_size: token budget of this call: an int (square) or `[rows, cols]` for all images, or one
                `[rows, cols]` per image in a list or a `(num_images, 2)` tensor. Default: the processor's own.

        Returns:
            `input_ids` and `attention_mask` `(batch, sequence)`, the image processor's `pixel_values` `(num_images, 3,
            height, width)` and, only where `pooled_grid_size` was given, `pooled_grid_sizes` `(num_images, 2)`.

        Raises:
            ValueError: an image cannot be read, images and image tokens are not as many, a grid is malformed, or
                truncation cuts into an image.
        """
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is not None:
            images = _read_images(images, self.image_processor.fetch_images)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _process_images(self, images, pooled_grid_size=None, **kwargs):
        image_inputs, _ = super()._process_images(images, **kwargs)
        num_images = len(make_flat_list_of_images(images))
        grids = [parse_grid(self.pooled_grid_size)] * num_images
        if pooled_grid_size is not None:
            grids = _grids_per_image(pooled_grid_size, num_images)
            image_inputs["pooled_grid_sizes"] = torch.tensor(grids)  # (num_images, 2)
        return image_inputs, [self.image_token * num_image_tokens(grid) for grid in grids]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders that stand for an image at the processor's own grid."""
        return self.image_token * num_image_tokens(self.pooled_grid_size)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens per image of the given sizes (vLLM asks): the size does not matter, only the grid."""
        if image_sizes is None:
            return MultiModalData()
        grids = _grids_per_image(kwargs.get("pooled_grid_size") or self.pooled_grid_size, len(image_sizes))
        return MultiModalData(
            num_image_tokens=[num_image_tokens(grid) for grid in grids], num_image_patches=[1] * len(image_sizes)
        )

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        input_ids = text_inputs["input_ids"]
        for sample, (expanded, ids) in enumerate(zip(text, input_ids, strict=True)):
            expected, found = expanded.count(self.image_token), list(ids).count(self.image_token_id)
            if expected != found:
                raise ValueError(
                    f"Text {sample} was cut to {len(ids)} tokens, which leaves {found} of its {expected} image "
                    f"placeholders: an image would be cut. Raise max_length, shorten the text, choose a smaller "
                    f"pooled_grid_size, or turn truncation off."
                )

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_remote_code(save_directory)  # before super, which uploads what it finds
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


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


def _read_images(images, fetch):
    """`images` with paths, URLs and lazily opened files decoded, nesting kept."""
    position = 0

    def read(image):
        nonlocal position
        if isinstance(image, (list, tuple)):
            return [read(entry) for entry in image]
        position += 1
        try:
            image = fetch(image)
            if hasattr(image, "load"):  # PIL decodes late: a truncated file fails here, with its name
                image.load()
        except (OSError, ValueError, TypeError, SyntaxError) as error:
            name = repr(image if isinstance(image, str) else getattr(image, "filename", None) or type(image).__name__)
            name = name if len(name) <= 120 else name[:117] + "..."
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"Image {position} ({name}) cannot be read: {reason}") from error
        return image

    return read(images)


__all__ = ["DecoProcessor"]
