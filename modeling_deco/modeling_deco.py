# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo: LLaVA with its patch grid pooled before the projector.

It differs from transformers' LLaVA models (modeling_llava.py, modeling_llava_next.py and others, 5.24) in five ways:

- Patches are pooled to a grid before the MLP.
- The grid is an argument of each call.
- The patch grid is read from the pixels' shape.
- The vision tower has no layer above the one whose output is used.
- Patches of tiles are stitched to one map, and padding is cut off, before the MLP.

Parameters have LLaVA's names.
"""

import copy
import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import (  # private, seen in transformers 5.19 to 5.24
    TransformersKwargs,
    can_return_tuple,
    logging,
    torch_compilable_check,
)

from .configuration_deco import DecoConfig, check_grid, fit_grid
from .hub import base_models, files_of, model_card, upload
from .llava import (
    KEY_MAPPING,
    check_safetensors,
    find_llava,
    generation_config_of,
    has_processor,
    hub_arguments,
    load_tokenizer,
    read_settings,
    suppress_placeholders,
)
from .positions import (
    Places,
    has_moved,
    next_position,
    num_tokens,
    patch_position_ids,
    places,
    position_behind,
    set_next_position,
)
from .projectors import (
    AvgPoolProjector,
    CAbstractorProjector,
    DAbstractorProjector,
    GridPositions,
    MlpProjector,
    QFormerProjector,
    QueryProjector,
    ResamplerProjector,
    pool_patch_grid,
    sine_positions,
)
from .views import TokenMap, num_map_tokens, num_map_views, one_map, tiled_images

if TYPE_CHECKING:  # transformers also reads this import, and fetches the file beside a model that is remote code
    from .processing_deco import DecoProcessor

logger = logging.get_logger(__name__)

# Modules that are not quantized: all but the language model's layers. Each entry is a prefix of a module's full name,
# so "vision_tower" alone would miss "model.vision_tower.encoder". The list has the names of both
# DecoForConditionalGeneration and DecoModel, since either class can load a folder that the other has saved.
_NOT_QUANTIZED = [
    "model.vision_tower",
    "model.multi_modal_projector",
    "vision_tower",
    "multi_modal_projector",
    "lm_head",
]

# The language model's fields in both outputs. transformers 5.24 renames the key-value cache from `past_key_values` to
# `cache`, in outputs and arguments.
_LANGUAGE_MODEL_FIELDS = [field.name for field in fields(BaseModelOutputWithPast)]
CACHE_NAME = "cache" if "cache" in _LANGUAGE_MODEL_FIELDS else "past_key_values"

# arguments with one row for each image, and for each video
IMAGE_INPUTS = ("pixel_values", "pooled_grid_sizes", "pixel_attention_mask", "spatial_shapes", "image_sizes")
VIDEO_INPUTS = ("pixel_values_videos", "pooled_video_sizes")

_FRAMES_PER_PASS = 16  # frames of a video that the vision tower encodes together

# Where a prompt ends in an image, the answer does not begin one position behind the last token, as `generate` counts.
# This argument of a call says where instead: `(batch, 2)`, the position of the last token, and what is to be added to
# those behind it.
_GAP = "gap_behind_prompt"

_PUSH_ARGUMENTS = (
    "repo_id",
    "processor",
    "metadata",
    "tags",
    "private",
    "token",
    "revision",
    "create_pr",
    "commit_message",
    "commit_description",
)


@dataclass
class DecoModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `DecoModel`.

    `image_outputs` is the output of `get_image_features`, or None without images, and `video_outputs` that of
    `get_video_features`. The other fields are the language model's.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None

    @property
    def image_hidden_states(self) -> torch.FloatTensor | None:
        """Projected tokens of all images, one after the other: `(num_image_features, text_hidden_size)`."""
        return None if self.image_outputs is None else torch.cat(list(self.image_outputs.pooler_output))


@dataclass
class DecoCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of `DecoForConditionalGeneration`.

    `loss` is a scalar if labels are given. `logits` is `(batch, sequence or logits_to_keep, vocab_size)`. The other
    fields are those of `DecoModelOutputWithPast`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None
    image_hidden_states = DecoModelOutputWithPast.image_hidden_states


class DecoPreTrainedModel(PreTrainedModel):
    config: DecoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    # private, seen in transformers 5.19 to 5.24
    # projectors with residual connections; post_init adds the backbones' modules and drops those not in the model
    _no_split_modules: list[str] | set[str] = [
        "QFormerProjector",
        "ResamplerProjector",
        "CAbstractorProjector",
        "DAbstractorProjector",
    ]
    _skip_keys_device_placement = [CACHE_NAME]

    _supports_flash_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, quantization_config=None, key_mapping=None, **kwargs
    ):
        """`PreTrainedModel.from_pretrained`, with two additions.

        - A LLaVA of transformers (llava-hf) is loaded as it is, from its safetensors files: its parameters have the
          same names. The grid is its patch grid, where its logits are LLaVA's, unless `pooled_grid_size` is given.
          `save_pretrained` then writes a DeCo.
        - A `quantization_config` applies to the language model's layers only. Vision tower, projector and `lm_head`
          keep their dtype, unless the config lists the modules to skip.

        Example:

            >>> model = DecoForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf", pooled_grid_size=12)

        Raises:
            ValueError: the checkpoint is neither a DeCo nor a LLaVA that DeCo supports, or a LLaVA without safetensors
                files.
        """
        if quantization_config is not None:
            quantization_config = _with_modules_to_skip(quantization_config)
        hub = hub_arguments(kwargs)
        llava = find_llava(pretrained_model_name_or_path, **hub)
        if llava is not None:
            kwargs = cls._arguments_for_llava(pretrained_model_name_or_path, hub, kwargs)
        loaded = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            quantization_config=quantization_config,
            key_mapping={**KEY_MAPPING, **(key_mapping or {})},
            **kwargs,
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _forget_llavas_names(model)
        if llava is not None:
            model._finish_llava(llava, keeps_generation_config="generation_config" in kwargs)
        return loaded

    @classmethod
    def _arguments_for_llava(cls, name, hub: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `from_pretrained` for a LLaVA. Its dtype is that of its weights, not that in its config."""
        if kwargs.get("variant") is None:
            check_safetensors(name, **hub)
        kwargs = {**kwargs, "use_safetensors": True}
        dtypes = {kwargs.get("dtype") or "auto", kwargs.get("torch_dtype") or "auto"}
        if kwargs.get("config") is None and dtypes == {"auto"}:
            kwargs.pop("config", None)
            config, kwargs = cls.config_class.from_pretrained(name, return_unused_kwargs=True, **kwargs)
            config.dtype = None
            kwargs = {**kwargs, **hub, "config": config}
        return kwargs

    def _finish_llava(self, folder: Path, keeps_generation_config: bool) -> None:
        """What the converter writes into the config and the generation config of a LLaVA.

        Args:
            folder: of the small files.
        """
        embeddings, head = self.get_input_embeddings(), self.get_output_embeddings()
        if self.config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
            self.config.tie_word_embeddings = self.config.text_config.tie_word_embeddings = False
        if self.can_generate() and not keeps_generation_config:
            tokenizer = load_tokenizer(folder) if has_processor(folder) else None
            settings = read_settings(folder / "generation_config.json")
            self.generation_config = generation_config_of(settings, tokenizer)
            suppress_placeholders(self.generation_config, self.config)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """`PreTrainedModel.save_pretrained`. With `push_to_hub=True` it also uploads what it writes, and takes the
        arguments of `push_to_hub`. A `README.md` in the folder becomes the repository's card."""
        if not push_to_hub or kwargs.get("distributed_checkpoint"):  # super uploads a consolidated copy of these
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        arguments = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs}
        unchanged = files_of(save_directory)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            arguments.setdefault("repo_id", Path(save_directory).name)
            self._upload(save_directory, unchanged=unchanged, **arguments)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: "DecoProcessor | None" = None,
        metadata: dict | None = None,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ):
        """Upload weights, configs, the code for `trust_remote_code=True`, and a model card.

        A repository without a card gets one, which names the model's base models if they are on the Hub. Licence and
        language are left to `metadata`.

        Args:
            repo_id: id of the repository, which is created if it does not exist.
            processor: uploaded in the same commit. `processor.push_to_hub(repo_id)` uploads it separately.
            metadata: fields of the card: `license`, `language`, `datasets`, `widget`, ...
            max_shard_size: see `save_pretrained`.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr` and `tags` of
                `PreTrainedModel.push_to_hub`.

        Returns:
            The `CommitInfo`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return self._upload(folder, repo_id, processor=processor, metadata=metadata, **kwargs)

    def _upload(self, folder, repo_id, processor=None, tags=None, **kwargs):
        if processor is not None:
            processor.save_pretrained(folder)
        tags = [tags] if isinstance(tags, str) else tags or []
        return upload(folder, repo_id, self._card, tags=[*(self.model_tags or []), *tags], **kwargs)

    def _card(self, repo_id, **metadata):
        fields = {
            "base_model": base_models(self.config, repo_id) or None,
            "pipeline_tag": "image-text-to-text" if self.can_generate() else None,
        }
        return model_card(self.config, repo_id.rpartition("/")[-1], repo_id, **{**fields, **metadata})

    @classmethod
    def is_custom_code(cls) -> bool:
        # For custom code, transformers takes modules without parameters of their own as initialized. CLIP's attention
        # and MLP would then miss CLIP's initialization when a checkpoint lacks their weights.
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (CAbstractorProjector, GridPositions, QueryProjector)):
            module.reset_parameters()
        elif isinstance(module, DecoModel):
            module.reset_newline()

    def post_init(self):
        super().post_init()
        # Vision towers also name layers of their text models, and FSDP's wrapping policy requires every named class.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        # a convolutional tower has no attention, and refuses an implementation that is meant for the language model
        if self.config.feature_map is not None and isinstance(attn_implementation, str):
            parts = {"text_config": attn_implementation, "vision_config": "eager"}
            attn_implementation = {"": attn_implementation, **parts}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def enable_input_require_grads(self):
        # For gradient checkpointing, transformers makes the embeddings of every part require gradients. A frozen
        # vision tower would then run a backward pass that nothing needs.
        if any(parameter.requires_grad for parameter in self.base_model.vision_tower.parameters()):
            return super().enable_input_require_grads()
        embeddings = self.get_input_embeddings()
        self._require_grads_hook = embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_(True))
        self._require_grads_hooks = [self._require_grads_hook]


class DecoModel(DecoPreTrainedModel):
    """Vision tower, projector and language model, without the language modeling head."""

    def __init__(self, config: DecoConfig):
        super().__init__(config)
        # as in set_attn_implementation
        no_attention = {} if config.feature_map is None else {"attn_implementation": "eager"}
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False, **no_attention)
        self.multi_modal_projector = build_projector(config)
        newline = torch.empty(config.text_hidden_size) if config.has_newline else None
        self.image_newline = None if newline is None else nn.Parameter(newline)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self._uses_positions = _uses_positions(self.language_model)  # noted before anything wraps it
        self.check_image_positions(config.image_positions)
        # a LLaVA has these: layers above the one that is used, and SigLIP's attention pooling
        unused = range(0)
        if config.feature_map is None:
            num_layers = config.vision_config.num_hidden_layers
            unused = range(num_layers, num_layers + config.vision_config.num_cut_layers)
        # private, seen in transformers 5.19 to 5.24
        self._keys_to_ignore_on_load_unexpected = [
            r"vision_tower\.head\.",
            *(rf"vision_tower\.encoder\.layers?\.{layer}\." for layer in unused),
        ]
        self.post_init()

    def train(self, mode: bool = True) -> "DecoModel":
        """`Module.train`, except that a frozen vision tower is always in evaluation mode, and so are the batch
        normalizations of one that is trained: their running statistics, of as many pictures as the tower was
        pretrained on, are better than those of the few in a batch."""
        super().train(mode)
        is_frozen = not any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        for module in self.vision_tower.modules():
            if is_frozen or isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
                module.training = False
        return self

    def reset_newline(self) -> None:
        """LLaVA's initialization of the newline, if the model has one."""
        if self.image_newline is not None:
            init.normal_(self.image_newline, std=self.config.text_hidden_size**-0.5)

    def check_image_positions(self, image_positions: str | None = None) -> str:
        """`DecoConfig.check_image_positions`; it also refuses `"patch"` if the language model uses no positions."""
        image_positions = self.config.check_image_positions(image_positions)
        if image_positions == "patch" and not self._uses_positions:
            raise ValueError(
                f"image_positions='patch' needs a language model that takes position_ids and has embeddings of them, "
                f"unlike text_config.model_type={self.config.text_config.model_type!r}; use 'sequence'."
            )
        return image_positions

    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        pooled_grid_sizes: torch.LongTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        views: torch.FloatTensor | list[torch.FloatTensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode, pool and project images.

        Args:
            pixel_values: `(num_images, 3, height, width)`; the patch grid is `height / patch_size` by
                `width / patch_size`, rounded as the vision tower does. From SigLIP 2's own image processor,
                `(num_images, max_num_patches, 3 * patch_size ** 2)` with `pixel_attention_mask` and `spatial_shapes`
                (one patch grid per image). With `image_sizes`, the views of each image, `(num_images, max_num_views,
                3, height, width)`, or of all images, `(num_views, 3, height, width)`.
            pooled_grid_sizes: `(num_images, 2)`, the grid `[rows, cols]` that each image is pooled to, or, if the
                config has `image_grid_pinpoints`, each of its views. Default: the config's grid for all images, which
                keeps the graph static for `torch.compile(fullgraph=True)`. With `spatial_shapes`, the default grid is
                cut to each image's own patches.
            image_grid_thw: vLLM's form of `pooled_grid_sizes`, see `get_rope_index`.
            image_sizes: `(num_images, 2)`, `[height, width]` of pictures that are cut into views, before they are
                resized. If the config has no `image_grid_pinpoints`, the size of the tiles together: their patches
                become one map, which is pooled to the grid as a whole.
            batch_num_images: `(num_samples,)`, the images of each sample: those of samples with several images are not
                tiled (LLaVA-OneVision). Default: all are tiled.
            views: vLLM's form of `pixel_values`, a list if the images have different shapes.

        Returns:
            The vision tower's output. Its `pooler_output` is replaced by a list with one `(num_tokens,
            text_hidden_size)` tensor per image. Only the last hidden state is kept, unless `output_hidden_states=True`
            is given.

        Raises:
            ValueError: a grid of `pooled_grid_sizes` is larger than the image's patch grid, the number of grids is not
                the number of images, or the views are not those of the image sizes.
        """
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if isinstance(views, list):
            image_outputs = self._encode_one_by_one(
                views,
                {
                    "pixel_attention_mask": pixel_attention_mask,
                    "spatial_shapes": spatial_shapes,
                    "image_grid_thw": image_grid_thw,
                    "image_sizes": image_sizes,
                },
                **kwargs,
            )
            return image_outputs if return_dict else image_outputs.to_tuple()
        pixel_values = pixel_values if views is None else views
        if image_grid_thw is not None:
            pooled_grid_sizes = image_grid_thw[:, 2:]
        self._check_views(pixel_values, image_sizes)
        if image_sizes is not None:
            maps = self.image_maps(pooled_grid_sizes, image_sizes=image_sizes, batch_num_images=batch_num_images)
            views = _without_empty_views(pixel_values, [num_map_views(maps_of_image) for maps_of_image in maps])
            image_outputs, view_features = self.encode_views(self._tower_inputs(views), **kwargs)
            image_outputs.pooler_output = self.project_maps(view_features, maps)
        else:
            tower_inputs = self._tower_inputs(pixel_values, pixel_attention_mask, spatial_shapes)
            image_outputs, patch_features = self.encode_views(tower_inputs, **kwargs)
            patch_grids = self.patch_grids(pixel_values, spatial_shapes)
            image_outputs.pooler_output = self.project_features(patch_features, patch_grids, pooled_grid_sizes)
        return image_outputs if return_dict else image_outputs.to_tuple()

    def _encode_one_by_one(
        self, views: list[torch.FloatTensor], inputs: dict[str, Any], **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """`get_image_features` of images of different shapes. `inputs` are its arguments with one entry per image."""
        given = {name: values for name, values in inputs.items() if values is not None}
        outputs = []
        for index, image in enumerate(views):
            own = {name: values[index][None] for name, values in given.items()}
            outputs.append(self.get_image_features(image[None], return_dict=True, **own, **kwargs))
        outputs[-1].pooler_output = [features for output in outputs for features in output.pooler_output]
        return outputs[-1]

    def _check_views(self, pixel_values: torch.FloatTensor, image_sizes: torch.LongTensor | None) -> None:
        if image_sizes is None and (self.config.image_grid_pinpoints is not None or pixel_values.ndim == 5):
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} are views of images, and image_sizes is missing: pass "
                f"everything that the processor returns to the model."
            )
        if image_sizes is not None:
            if self.config.projector_type not in ("avg_pool", "mlp"):
                raise ValueError(
                    f"The projector {self.config.projector_type!r} makes the tokens of one view, and image_sizes says "
                    f"that images are cut into tiles; leave out tiles, or use 'avg_pool'."
                )
            self._check_view_size("pixel_values", pixel_values)

    def _check_view_size(self, name: str, pixel_values: torch.FloatTensor) -> None:
        if tuple(pixel_values.shape[-2:]) != self.config.view_size:
            height, width = self.config.view_size
            raise ValueError(
                f"{name} of the shape {tuple(pixel_values.shape)} are not views of {height} x {width} pixels, the "
                f"vision tower's image size; use the model's own processor."
            )

    def encode_views(
        self, tower_inputs: dict[str, Any], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[BaseModelOutputWithPooling, torch.FloatTensor]:
        """The vision tower's output, and its patch features `(num_views, num_patches, vision_hidden_size)`."""
        keep_hidden_states = kwargs.pop("output_hidden_states", False)
        if self.config.feature_map is not None:
            outputs = self.vision_tower(
                **tower_inputs, return_dict=True, output_hidden_states=keep_hidden_states, **kwargs
            )
            return outputs, self._cells(outputs.last_hidden_state, tower_inputs["pixel_values"])
        # newer transformers keeps only the hidden state with this index; 5.19 takes any value but 0 as True
        outputs = self.vision_tower(
            **tower_inputs, return_dict=True, output_hidden_states=keep_hidden_states or -1, **kwargs
        )
        if not keep_hidden_states:  # 5.19 returns all, and they would stay in memory while the language model runs
            num_others = len(outputs.hidden_states) - 1
            outputs.hidden_states = (*[None] * num_others, outputs.hidden_states[-1])
        # hidden_states[-1], not last_hidden_state, which SigLIP and DINOv2 normalize
        return outputs, outputs.hidden_states[-1][:, self.config.num_prefix_tokens :]

    def _cells(self, feature_map: torch.FloatTensor, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """The cells of feature maps `(num_views, channels, rows, cols)` as patch features, row by row."""
        height, width = pixel_values.shape[-2:]
        expected = (self.config.vision_hidden_size, *self.config.patch_grid_of(height, width))
        if tuple(feature_map.shape[1:]) != expected:
            raise ValueError(
                f"The vision tower makes a feature map of the shape {tuple(feature_map.shape[1:])} of {height} x "
                f"{width} pixels, and its config says {expected} (channels, rows, columns): give pictures whose sides "
                f"are multiples of the stride, or correct vision_config (patch_size={self.config.patch_size})."
            )
        cells = feature_map.flatten(2).transpose(1, 2).contiguous()  # (num_views, rows * cols, channels)
        if self.config.vision_position_embedding == "sine":
            cells = cells + sine_positions(expected[1:], expected[0]).to(cells)
        return cells

    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        pooled_video_sizes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode the frames of videos, pool them in space and time, and project them. The vision tower encodes a few
        frames at a time.

        Args:
            pixel_values_videos: `(num_videos, max_num_frames, 3, height, width)`.
            pooled_video_sizes: `(num_videos, 4)`: the video's frames, the neighbouring frames that are averaged, and
                `rows, cols` of the grid that they are pooled to. Default: all frames, and the config's
                `frames_per_token_grid` and `pooled_video_grid_size`.

        Returns:
            The vision tower's output for the last frames. Its `pooler_output` is replaced by a list with one
            `(num_tokens, text_hidden_size)` tensor per video.

        Raises:
            ValueError: the sizes are not those of the videos, or a grid is larger than the patch grid.
        """
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        self._check_view_size("pixel_values_videos", pixel_values_videos)
        maps = self.video_maps(pooled_video_sizes, pixel_values_videos)
        num_frames = [num_map_views(maps_of_video) for maps_of_video in maps]
        features: list[list[torch.Tensor]] = [[] for _ in maps]
        video_outputs = None
        for owners, maps_of_pass, frames in _passes(maps, _without_empty_views(pixel_values_videos, num_frames)):
            video_outputs, frame_features = self.encode_views(self._tower_inputs(frames), **kwargs)
            for owner, tokens in zip(
                owners, self.project_maps(frame_features, [[token_map] for token_map in maps_of_pass]), strict=True
            ):
                features[owner].append(tokens)
        video_outputs = BaseModelOutputWithPooling() if video_outputs is None else video_outputs
        video_outputs.pooler_output = [torch.cat(tokens) for tokens in features]
        return video_outputs if return_dict else video_outputs.to_tuple()

    def _tower_inputs(self, pixel_values, pixel_attention_mask=None, spatial_shapes=None) -> dict[str, Any]:
        vision_config = self.config.vision_config
        if vision_config.model_type == "siglip2_vision_model":
            if pixel_values.ndim == 4:
                return _patchify(pixel_values, vision_config.patch_size)
            inputs = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
            return {"pixel_values": pixel_values, **inputs}
        if self.config.feature_map is not None:  # unlike transformers, these do not convert pixels to their dtype
            return {"pixel_values": pixel_values.to(self.vision_tower.dtype)}
        if vision_config.model_type.startswith("dinov2"):  # interpolates without the argument
            return {"pixel_values": pixel_values}
        return {"pixel_values": pixel_values, "interpolate_pos_encoding": True}

    def patch_grids(
        self, pixel_values: torch.FloatTensor | None = None, spatial_shapes: torch.LongTensor | None = None
    ) -> tuple[int, int] | list[tuple[int, int]]:
        """The patch grid `(rows, cols)` of all images, or a list with one for each image if there are
        `spatial_shapes`. Without either argument, it is that of the vision tower's own image size."""
        if pixel_values is not None and pixel_values.ndim == 4:
            return self.config.patch_grid_of(*pixel_values.shape[-2:])
        if spatial_shapes is not None:
            return [(rows, cols) for rows, cols in spatial_shapes.tolist()]
        return self.config.patch_grid

    def image_grids(
        self, patch_grids: list[tuple[int, int]], pooled_grid_sizes: torch.LongTensor | None = None
    ) -> list[tuple[int, int]]:
        """The grid `(rows, cols)` that each image is pooled to.

        Args:
            patch_grids: `(rows, cols)` of each image's patches. SigLIP 2 has another grid for each shape of image.
            pooled_grid_sizes: as in `get_image_features`.

        Raises:
            ValueError: a grid of `pooled_grid_sizes` is larger than the image's patch grid, or the number of grids is
                not the number of images.
        """
        if pooled_grid_sizes is None:
            grid, is_free = self.config.pooled_grid, self.config.takes_any_grid
            return [fit_grid(grid, patch_grid) if is_free else grid for patch_grid in patch_grids]
        if len(pooled_grid_sizes) != len(patch_grids):
            raise ValueError(
                f"pooled_grid_sizes has {len(pooled_grid_sizes)} grids for {len(patch_grids)} images; pass one grid "
                f"per image."
            )
        grids = zip(pooled_grid_sizes.tolist(), patch_grids, strict=True)
        return [
            check_grid(grid, patch_grid, of=f"image {index}", name="pooled_grid_sizes")
            for index, (grid, patch_grid) in enumerate(grids, start=1)
        ]

    def _grids_of(self, patch_grids, pooled_grid_sizes, num_images: int | None = None):
        """The patch grid and the pooled grid of all images, or a list of each if images may differ. Without
        `num_images` there are as many as `pooled_grid_sizes`."""
        if isinstance(patch_grids, tuple) and pooled_grid_sizes is None:
            return patch_grids, self.config.pooled_grid
        if isinstance(patch_grids, tuple):
            patch_grids = [patch_grids] * (len(pooled_grid_sizes) if num_images is None else num_images)
        return patch_grids, self.image_grids(patch_grids, pooled_grid_sizes)

    def image_maps(
        self,
        pooled_grid_sizes: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
    ) -> list[list[TokenMap]]:
        """The maps of each image. Arguments are those of `get_image_features`. If all images have one view, one patch
        grid and the config's grid, there is one entry for all of them, and the graph is static."""
        if image_sizes is None:
            patch_grids, pooled_grids = self._grids_of(
                self.patch_grids(pixel_values, spatial_shapes), pooled_grid_sizes
            )
            if isinstance(patch_grids, tuple):
                return [one_map(patch_grids, pooled_grids)]
            return [one_map(*grids) for grids in zip(patch_grids, pooled_grids, strict=True)]
        views, sizes = self.config.views, [(height, width) for height, width in image_sizes.tolist()]
        is_tiled = tiled_images(len(sizes), None if batch_num_images is None else batch_num_images.tolist())
        has_pinpoints = self.config.image_grid_pinpoints is not None
        # without pinpoints, the grid is that of the tiles together
        largest = [(1, 1) if has_pinpoints else _tiles(size, self.config.view_size) for size in sizes]
        patch_rows, patch_cols = self.config.patch_grid
        patch_grids = [(rows * patch_rows, cols * patch_cols) for rows, cols in largest]
        pooled_grids = self.image_grids(patch_grids, pooled_grid_sizes)
        if len(is_tiled) != len(sizes):
            raise ValueError(
                f"batch_num_images has {len(is_tiled)} images in all, and image_sizes has {len(sizes)}; pass one size "
                f"per image."
            )
        return [views.image_maps(*image) for image in zip(sizes, pooled_grids, is_tiled, strict=True)]

    def video_maps(
        self,
        pooled_video_sizes: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
    ) -> list[list[TokenMap]]:
        """The maps of each video, one for each grid of tokens. Arguments are those of `get_video_features`; either one
        may be missing.

        Raises:
            ValueError: the sizes are not those of the videos, or a grid is larger than the patch grid.
        """
        if pooled_video_sizes is None:
            num_videos, num_frames = (0, 0) if pixel_values_videos is None else pixel_values_videos.shape[:2]
            sizes = [[num_frames, self.config.frames_per_token_grid, *self.config.pooled_video_grid]] * num_videos
        else:
            sizes = pooled_video_sizes.tolist()
        if pixel_values_videos is not None:
            num_videos, num_frames = pixel_values_videos.shape[:2]
            if len(sizes) != num_videos or any(not 0 < size[0] <= num_frames for size in sizes):
                raise ValueError(
                    f"pooled_video_sizes has videos of {[size[0] for size in sizes]} frames, and pixel_values_videos "
                    f"has {num_videos} of up to {num_frames}; pass everything that the processor returns to the model."
                )
        maps = []
        for num_frames, frames_per_token_grid, *grid in sizes:
            pooled_grid = check_grid(grid, self.config.patch_grid, of="a frame", name="pooled_video_sizes")
            if frames_per_token_grid < 1:
                raise ValueError(f"frames_per_token_grid must be at least 1, got {frames_per_token_grid}.")
            maps.append(self.config.views.video_maps(num_frames, frames_per_token_grid, pooled_grid))
        return maps

    def token_maps(self, inputs: Mapping[str, Any]) -> dict[str, list[list[TokenMap]]]:
        """The maps of a call's images and videos.

        Args:
            inputs: arguments of `forward`. Of these, the ones of `image_maps` and `video_maps` are read.

        Returns:
            `{"image": image_maps(...), "video": video_maps(...)}`
        """
        names = ("pooled_grid_sizes", "pixel_values", "spatial_shapes", "image_sizes", "batch_num_images")
        return {
            "image": self.image_maps(**{name: inputs.get(name) for name in names}),
            "video": self.video_maps(inputs.get("pooled_video_sizes"), inputs.get("pixel_values_videos")),
        }

    def project_maps(self, view_features: torch.FloatTensor, maps: list[list[TokenMap]]) -> list[torch.FloatTensor]:
        """Stitch, pool and project the patch features of views, and add newlines.

        Args:
            view_features: `(num_views, num_patches, vision_hidden_size)` of all maps, without prefix tokens.
            maps: of each image or video.

        Returns:
            One `(num_tokens, text_hidden_size)` tensor per image or video.
        """
        return self.project_pooled(self.pool_maps(view_features, maps), maps)

    def pool_maps(self, view_features: torch.FloatTensor, maps: list[list[TokenMap]]) -> torch.FloatTensor:
        """Stitch and pool the patch features of views: the first half of `project_maps`.

        Returns:
            What the projector gets, `(sum of TokenMap.num_pooled, vision_hidden_size)`.
        """
        all_maps = list(chain.from_iterable(maps))
        views = view_features.split([token_map.num_views for token_map in all_maps])
        return torch.cat([self._pool_map(*pair) for pair in zip(views, all_maps, strict=True)])

    def project_pooled(self, pooled: torch.FloatTensor, maps: list[list[TokenMap]]) -> list[torch.FloatTensor]:
        """Project what `pool_maps` returns, and add newlines: the second half of `project_maps`."""
        all_maps = list(chain.from_iterable(maps))
        projected = self.multi_modal_projector.project(pooled)  # token by token, so all at once
        parts = projected.split([token_map.num_pooled for token_map in all_maps])
        tokens = iter(self._finish_map(*pair) for pair in zip(parts, all_maps, strict=True))
        return [torch.cat([next(tokens) for _ in maps_of_one]) for maps_of_one in maps]

    def _pool_map(self, views: torch.FloatTensor, token_map: TokenMap) -> torch.FloatTensor:
        """What the projector gets of a map, `(rows * cols, vision_hidden_size)`."""
        tile_grid, (top, left), (rows, cols) = token_map.tile_grid, token_map.padding, token_map.patch_grid
        if token_map.num_frames > 1:
            views = views.mean(0, keepdim=True)
        tiles = views.unflatten(1, self.config.patch_grid).unflatten(0, tile_grid)
        patch_map = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (padded_rows, padded_cols, vision_hidden)
        patches = patch_map[top : top + rows, left : left + cols].flatten(0, 1)  # (rows * cols, vision_hidden)
        if token_map.is_interpolated or 0 in token_map.pooled_grid:
            return patches
        return pool_patch_grid(patches[None], token_map.patch_grid, token_map.pooled_grid)[0]

    def _finish_map(self, projected: torch.FloatTensor, token_map: TokenMap) -> torch.FloatTensor:
        """The tokens of a projected map, `(num_tokens, text_hidden_size)`."""
        rows, cols = token_map.pooled_grid
        if token_map.is_interpolated:
            feature_map = projected.T.unflatten(1, token_map.patch_grid)[None]
            feature_map = nn.functional.interpolate(feature_map, token_map.pooled_grid, mode="bilinear")
            projected = feature_map[0].flatten(1).T  # (rows * cols, text_hidden)
        if self.image_newline is None or token_map.newline == "none" or rows == 0:
            return projected
        newline = self.image_newline.to(projected)
        if token_map.newline == "end":
            return torch.cat([projected, newline[None]])
        token_rows = projected.unflatten(0, (rows, cols))
        return torch.cat([token_rows, newline.expand(rows, 1, -1)], dim=1).flatten(0, 1)

    def project_features(
        self,
        patch_features: torch.FloatTensor,
        patch_grids: tuple[int, int] | list[tuple[int, int]],
        pooled_grid_sizes: torch.LongTensor | None = None,
    ) -> list[torch.FloatTensor]:
        """Pool and project the vision tower's patch features: the second half of `get_image_features`.

        Args:
            patch_features: `(num_images, num_patches, vision_hidden_size)`, without prefix tokens.
            patch_grids: `(rows, cols)` of all images, or a list with one for each image.
            pooled_grid_sizes: as in `get_image_features`.

        Returns:
            One `(rows * cols, text_hidden_size)` tensor per image. Images with the same grids are projected together.
        """
        num_images = patch_features.shape[0]
        patch_grids, pooled_grids = self._grids_of(patch_grids, pooled_grid_sizes, num_images)
        if isinstance(patch_grids, tuple):  # one grid for all: no loop over images
            return list(self.multi_modal_projector(patch_features, patch_grids, pooled_grids))
        groups: dict[tuple, list[int]] = {}
        for index, grids in enumerate(zip(patch_grids, pooled_grids, strict=True)):
            groups.setdefault(grids, []).append(index)
        image_features = [None] * num_images
        for (patch_grid, pooled_grid), indices in groups.items():
            group = patch_features if len(indices) == num_images else patch_features[indices]
            group = group[:, : patch_grid[0] * patch_grid[1]]  # SigLIP 2 pads images to a common length
            for index, features in zip(
                indices, self.multi_modal_projector(group, patch_grid, pooled_grid), strict=True
            ):
                image_features[index] = features
        return image_features

    def find_placeholders(self, input_ids, inputs_embeds, modality: str = "image") -> torch.BoolTensor:
        """`(batch, sequence)`, true at the placeholders of images, or of videos (`modality="video"`). Without ids they
        are found by their embedding."""
        token_id = self.config.image_token_id if modality == "image" else self.config.video_token_id
        if input_ids is not None and input_ids.numel() > 0:
            return torch.zeros_like(input_ids, dtype=torch.bool) if token_id is None else input_ids == token_id
        if token_id is None:
            return torch.zeros_like(inputs_embeds[..., 0], dtype=torch.bool)
        embedding = self.get_input_embeddings()(torch.full((), token_id, device=inputs_embeds.device))
        return (inputs_embeds == embedding).all(-1)

    def get_placeholder_mask(
        self, input_ids, inputs_embeds, features, cache=None, modality: str = "image"
    ) -> torch.BoolTensor:
        """`(batch, sequence, 1)`, true at the placeholders of images, or of videos.

        Args:
            features: a list, one `(num_tokens, text_hidden_size)` tensor per image or video.
            cache: the key-value cache, for the error's message.

        Raises:
            ValueError: the number of placeholders is not the number of features, or the model takes no videos.
        """
        if modality == "video" and self.config.video_token_id is None:
            raise ValueError("The model takes no videos: its config has no video_token_id.")
        placeholder_mask = self.find_placeholders(input_ids, inputs_embeds, modality)
        mismatch = self._mismatch if modality == "image" else self._video_mismatch
        torch_compilable_check(
            placeholder_mask.sum() == sum(tokens.shape[0] for tokens in features),
            lambda: mismatch(placeholder_mask, [tokens.shape[0] for tokens in features], cache),
        )
        return placeholder_mask.unsqueeze(-1).to(inputs_embeds.device)

    def _video_mismatch(self, placeholder_mask, tokens_per_video: list[int], cache) -> str:
        return (
            f"Video features and video tokens do not match: {len(tokens_per_video)} video(s) give "
            f"{sum(tokens_per_video)} features ({', '.join(map(str, tokens_per_video))} per video), but the text has "
            f"{int(placeholder_mask.sum())} placeholders (video_token_id={self.config.video_token_id}): write the "
            f"video token once for each video, let the processor expand it, and pass everything that it returns, "
            f"including pooled_video_sizes, to the model."
        )

    def _mismatch(self, placeholder_mask, tokens_per_image: list[int], cache) -> str:
        """The error's message: what does not match, in which way, and what to do."""
        num_features, num_placeholders = sum(tokens_per_image), int(placeholder_mask.sum())
        ends_in_image, begins_in_image = bool(placeholder_mask[:, -1].any()), bool(placeholder_mask[:, 0].any())
        one_grid = (
            "Use one pooled_grid_size for processor and model: pass it to the processor, and pass everything that it "
            "returns, including pooled_grid_sizes, to the model."
        )
        if num_placeholders == 0 and _is_filled(cache):
            case = (
                "there are none in the new tokens, which continue from a cache: an image is passed once, with its "
                "placeholders; leave out the images that are in the cache."
            )
        elif num_placeholders == 0:
            case = (
                "there are none. Write the image token once for each image, as chat templates do, and let the "
                "processor expand it."
            )
        elif num_placeholders < num_features and ends_in_image:
            case = (
                "there are too few, and the text ends within an image, so it was truncated. Raise max_length, or turn "
                "truncation off."
            )
        elif num_placeholders < num_features:
            case = f"there are too few. {one_grid}"
            if begins_in_image:  # a text may begin with an image, or it was truncated on the left
                case += " If the text was truncated, raise max_length, or turn truncation off."
        else:
            case = f"there are too many. Pass every image of the text. {one_grid}"
        return (
            f"Image features and image tokens do not match: {len(tokens_per_image)} image(s) give {num_features} "
            f"features ({', '.join(map(str, tokens_per_image))} per image; the config's grid "
            f"{self.config.pooled_grid_size} gives {self.config.num_image_tokens}), but the text has "
            f"{num_placeholders} placeholders "
            f"(image_token_id={self.config.image_token_id}): {case}"
        )

    def find_places(self, input_ids, inputs_embeds, maps: dict[str, list[list[TokenMap]]]) -> list[Places]:
        """The places of images' and videos' tokens, for `positions.patch_position_ids`.

        Args:
            maps: from `token_maps`.
        """
        return [
            places(self.find_placeholders(input_ids, inputs_embeds, modality), chain.from_iterable(maps[modality]))
            for modality in maps
        ]

    def position_behind(self, inputs: Mapping[str, Any], length: int | None = None) -> torch.LongTensor:
        """Position `(batch, 1)` behind the tokens of a prompt if images keep their places. There its answer begins.

        Args:
            inputs: arguments of `forward`, with `input_ids`.
            length: the number of tokens to count, with whole images. Default: all.
        """
        found = self.find_places(inputs["input_ids"], None, self.token_maps(inputs))
        mask = inputs.get("attention_mask") if length is None else None
        return position_behind([part._replace(mask=part.mask[:, :length]) for part in found], mask)

    def check_encoded(self, mm_encoder_outputs, maps: dict[str, list[list[TokenMap]]]) -> None:
        """Check that maps are those of encoded images and videos, whose places would be wrong otherwise.

        Raises:
            ValueError: they are not.
        """
        for modality, name in (("image", "pooled_grid_sizes"), ("video", "pooled_video_sizes")):
            outputs = (mm_encoder_outputs or {}).get(modality)
            if outputs is None:
                continue
            found = [features.shape[0] for features in outputs.pooler_output]
            expected = [num_map_tokens(maps_of_one) for maps_of_one in maps[modality]]
            expected = expected * len(found) if len(expected) == 1 else expected
            if expected != found:
                raise ValueError(
                    f"mm_encoder_outputs has {modality}s of {found} tokens, and their grids give {expected}: pass the "
                    f"{name} with which they were encoded, and all other inputs but the pixels."
                )

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        image_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pooled_grid_sizes: torch.LongTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        pooled_video_sizes: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Positions of prompts. vLLM's Transformers backend calls this if the config has an `mrope_section`.

        Args:
            input_ids: `(batch, sequence)`.
            image_grid_thw: `(num_images, 4)`: height and width in pixels, and rows and columns of the pooled grid, in
                place of the arguments below. vLLM passes only this. The size is that of the prepared picture, of one
                of its tiles, or, if the config has `image_grid_pinpoints`, of the picture before it is resized.
            mm_token_type_ids: `(batch, sequence)`, 1 at image placeholders. Default: wherever the image token is.
            attention_mask: `(batch, sequence)`, 0 at padding. Default: no padding.
            pixel_values, pooled_grid_sizes, pixel_attention_mask, spatial_shapes, image_sizes, batch_num_images: as in
                `get_image_features`. Default: the vision tower's own image size and the config's grid.
            pixel_values_videos, pooled_video_sizes: as in `get_video_features`.

        Returns:
            Positions `(3, batch, sequence)`, three times the same: other models count time, rows and columns. And
            `(batch, 1)`, the next token's position minus the number of tokens.
        """
        if mm_token_type_ids is not None:
            input_ids = input_ids.masked_fill(mm_token_type_ids == 1, self.config.image_token_id)
        if self.config.image_positions == "sequence":
            found = self.find_places(input_ids, None, {"image": [one_map((1, 1), (1, 1))]})
        elif image_grid_thw is not None:
            found = self.find_places(input_ids, None, {"image": self._maps_of_grids(image_grid_thw)})
        else:
            inputs = {
                "pixel_values": pixel_values,
                "pooled_grid_sizes": pooled_grid_sizes,
                "spatial_shapes": spatial_shapes,
                "image_sizes": image_sizes,
                "batch_num_images": batch_num_images,
                "pixel_values_videos": pixel_values_videos,
                "pooled_video_sizes": pooled_video_sizes,
            }
            found = self.find_places(input_ids, None, self.token_maps(inputs))
        position_ids = patch_position_ids(found, attention_mask)
        behind = position_behind(found, attention_mask)
        return position_ids.expand(3, -1, -1), behind - input_ids.shape[1]

    def _maps_of_grids(self, image_grid_thw: torch.LongTensor) -> list[list[TokenMap]]:
        sizes, pooled_grid_sizes = image_grid_thw[:, :2], image_grid_thw[:, 2:]
        if self.config.image_grid_pinpoints is not None:
            return self.image_maps(pooled_grid_sizes, image_sizes=sizes)
        patch_grids = [self.config.patch_grid_of(height, width) for height, width in sizes.tolist()]
        # tiles may be pooled to a finer grid than that of one view
        return [
            one_map((max(rows, pooled_rows), max(cols, pooled_cols)), (pooled_rows, pooled_cols))
            for (rows, cols), (pooled_rows, pooled_cols) in zip(patch_grids, pooled_grid_sizes.tolist(), strict=True)
        ]

    def _new_position_ids(
        self, inputs_embeds, found: list[Places], is_moved: bool, attention_mask, cache
    ) -> tuple[torch.LongTensor | None, torch.LongTensor | None]:
        """Positions of new tokens, which continue those in the cache, and of the token behind them; None where the
        language model's own numbering is the same.

        Args:
            found: places of images and videos that keep them.
            is_moved: whether that changes the numbering.
        """
        batch_size, length = inputs_embeds.shape[:2]
        is_pattern = _is_pattern(attention_mask, length)
        if not is_moved and not has_moved(cache) and not is_pattern:
            return None, None
        if not found:
            no_images = inputs_embeds.new_zeros(batch_size, length, dtype=torch.bool)
            found = [places(no_images, [])]
        if not is_pattern:
            is_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
            attention_mask = attention_mask[:, -length:] if is_mask else None
        start = next_position(cache)
        position_ids = start + patch_position_ids(found, attention_mask)
        if is_pattern:  # its rows are not continued
            return position_ids, position_ids[:, -1:] + 1
        return position_ids, start + position_behind(found, attention_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pooled_grid_sizes: torch.LongTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        pooled_video_sizes: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_positions: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DecoModelOutputWithPast:
        """See `get_image_features` and `get_video_features` for the arguments of images and videos, and the language
        model for the others.

        `mm_encoder_outputs`, `{"image": get_image_features(...), "video": get_video_features(...)}`, replaces
        `pixel_values` and `pixel_values_videos` where images and videos are already encoded: `generate` encodes them
        once and passes the result on. The other arguments then say how they were pooled.

        `image_positions`, `"patch"` or `"sequence"`, is explained in `DecoConfig`, whose value is the default. It has
        no effect if `position_ids` are given. With a cache, the new tokens continue the positions of those that are
        in it. With a boolean `attention_mask` `(batch, 1, sequence, sequence)`, a token's position counts only what it
        attends to.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given, or both pixels and
                `mm_encoder_outputs`; or `get_image_features`, `get_video_features` or `get_placeholder_mask` raise it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        image_positions = self.check_image_positions(image_positions)
        outputs = {modality: (mm_encoder_outputs or {}).get(modality) for modality in ("image", "video")}
        if pixel_values is not None and outputs["image"] is not None:
            raise ValueError("Pass images either as pixel_values or as mm_encoder_outputs, not as both.")
        if pixel_values_videos is not None and outputs["video"] is not None:
            raise ValueError("Pass videos either as pixel_values_videos or as mm_encoder_outputs, not as both.")

        if "past_key_values" in kwargs:
            kwargs[CACHE_NAME] = kwargs.pop("past_key_values")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            views = {"image_sizes": image_sizes, "batch_num_images": batch_num_images}
            outputs["image"] = self.get_image_features(
                pixel_values, pooled_grid_sizes, pixel_attention_mask, spatial_shapes, **views, return_dict=True
            )
        if pixel_values_videos is not None:
            outputs["video"] = self.get_video_features(pixel_values_videos, pooled_video_sizes, return_dict=True)
        cache = kwargs.get(CACHE_NAME)
        masks: dict[str, torch.BoolTensor] = {}
        token_embeds = inputs_embeds
        for modality, encoded in outputs.items():
            if encoded is None:
                continue
            mask = self.get_placeholder_mask(input_ids, token_embeds, encoded.pooler_output, cache, modality)
            features = torch.cat(list(encoded.pooler_output))  # (num_tokens of all, text_hidden)
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
            masks[modality] = mask[..., 0]

        behind = None
        if position_ids is not None and position_ids.ndim == 3:  # vLLM's, from get_rope_index
            position_ids = position_ids[0]
        elif position_ids is not None and image_positions == "patch":
            _refuse_engine(self.config.text_config)
        if position_ids is None and (
            image_positions == "patch" or _is_pattern(attention_mask, inputs_embeds.shape[1])
        ):
            found, is_moved = [], False
            if image_positions == "patch" and masks:
                maps = {
                    "image": self.image_maps(
                        pooled_grid_sizes, pixel_values, spatial_shapes, image_sizes, batch_num_images
                    ),
                    "video": self.video_maps(pooled_video_sizes, pixel_values_videos),
                }
                self.check_encoded(mm_encoder_outputs, maps)
                found = [places(mask, chain.from_iterable(maps[modality])) for modality, mask in masks.items()]
                is_moved = any(
                    token_map.pooled_grid != token_map.full_grid
                    for modality in masks
                    for token_map in chain.from_iterable(maps[modality])
                )
            position_ids, behind = self._new_position_ids(inputs_embeds, found, is_moved, attention_mask, cache)
        if behind is not None:  # numbered here
            kwargs |= _as_one_sequence(self.language_model, position_ids, cache)
            if attention_mask is None and cache is None:  # or positions that jump are taken for packed sequences
                attention_mask = torch.ones_like(position_ids)
        text_outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        text_outputs = {name: text_outputs.get(name) for name in _LANGUAGE_MODEL_FIELDS}
        if behind is not None:
            cache = text_outputs[CACHE_NAME]
            set_next_position(cache, behind, num_tokens(cache))
        return DecoModelOutputWithPast(**text_outputs, image_outputs=outputs["image"], video_outputs=outputs["video"])


class DecoForConditionalGeneration(DecoPreTrainedModel, GenerationMixin):
    """DeCo with its language modeling head: answers questions about images."""

    # the embeddings' name in most language models; each instance sets its own
    # private, seen in transformers 5.19 to 5.24
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DecoConfig):
        super().__init__(config)
        self.model = DecoModel(config)
        self.lm_head = nn.Linear(config.text_hidden_size, config.text_config.vocab_size, bias=config.lm_head_bias)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        image_token_id: int | None = None,
        dtype: str | torch.dtype = "auto",
        takes_videos: bool = False,
        **config_kwargs,
    ) -> "DecoForConditionalGeneration":
        """Join two pretrained backbones with a new projector, to start stage 1 of training. With `image_newline` or
        `video_newline`, the newline is new too.

        Args:
            vision_model_name_or_path: a vision tower, or a model that has one (CLIP, SigLIP).
            text_model_name_or_path: a causal language model.
            image_token_id: id of the image placeholder. Default: the id of `"<image>"` in the language model's
                tokenizer, to which it is added if necessary, as in `DecoProcessor.from_vision_text_pretrained`. If the
                id is outside the embeddings, they are resized to a multiple of 64.
            dtype: of all parts; `"auto"` takes the language model's.
            takes_videos: whether `"<video>"` is added to the tokenizer too, for the config's `video_token_id`.
            config_kwargs: more fields of `DecoConfig`.
        """
        text_model = _load_text_model(text_model_name_or_path, dtype)
        own_logits = _own_logits(text_model)
        if image_token_id is None or takes_videos:
            # imported here to avoid a circle: its module imports the one that registers this class
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path, trust_remote_code=False)
            tokenizer.add_tokens(["<image>", "<video>"] if takes_videos else "<image>", special_tokens=True)
            if image_token_id is None:
                image_token_id = tokenizer.convert_tokens_to_ids("<image>")
            if takes_videos:
                config_kwargs["video_token_id"] = tokenizer.convert_tokens_to_ids("<video>")
        largest_id = max(image_token_id, config_kwargs.get("video_token_id") or 0)
        if largest_id >= text_model.config.get_text_config().vocab_size:
            text_model.resize_token_embeddings(largest_id + 1, pad_to_multiple_of=64)

        vision_config = AutoConfig.from_pretrained(vision_model_name_or_path, trust_remote_code=False)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        lm_head = text_model.get_output_embeddings()
        config = cls.config_class(
            vision_config=vision_config,
            text_config=text_model.config.get_text_config(),
            image_token_id=image_token_id,
            tie_word_embeddings=lm_head.weight is text_model.get_input_embeddings().weight,
            lm_head_bias=lm_head.bias is not None,
            **config_kwargs,
        )
        config.vision_config.name_or_path = str(vision_model_name_or_path)  # a whole CLIP has it at the top
        with torch.device("meta"):
            model = cls(config)
        _take_language_model(model, text_model, own_logits)
        # The config's tower has no layers above the one that is used; their weights are reported as unexpected.
        vision_tower, loading = AutoModel.from_pretrained(
            vision_model_name_or_path,
            config=config.vision_config,
            dtype=text_model.dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _refuse_missing_weights(vision_tower, loading)
        model.model.vision_tower = vision_tower
        projector = build_projector(config)
        # private, seen in transformers 5.19 to 5.24
        projector.smart_apply(model._initialize_weights, cls.is_custom_code())  # transformers' parts have their own
        model.model.multi_modal_projector = projector.to(text_model.dtype)
        if config.has_newline:
            newline = torch.empty(config.text_hidden_size, dtype=text_model.dtype)
            model.model.image_newline = nn.Parameter(newline)
            model.model.reset_newline()
        model.generation_config = text_model.generation_config
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = model._with_image_token(suppressed)
        return model.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See `DecoModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See `DecoModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pooled_grid_sizes: torch.LongTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        batch_num_images: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        pooled_video_sizes: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_positions: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DecoCausalLMOutputWithPast:
        """See `DecoModel.forward`.

        Args:
            labels: `(batch, sequence)`, next-token targets; -100 is ignored.
            logits_to_keep: the number of last positions whose logits are computed (0: all), or the positions.

        Example:

            >>> from transformers import AutoModelForImageTextToText, AutoProcessor
            >>> processor = AutoProcessor.from_pretrained(model_id)
            >>> model = AutoModelForImageTextToText.from_pretrained(model_id)
            >>> inputs = processor(images=image, text=prompt, pooled_grid_size=6, return_tensors="pt")
            >>> answer = model.generate(**inputs, max_new_tokens=32)
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pooled_grid_sizes=pooled_grid_sizes,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            image_sizes=image_sizes,
            batch_num_images=batch_num_images,
            pixel_values_videos=pixel_values_videos,
            pooled_video_sizes=pooled_video_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            image_positions=image_positions,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _finish_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return DecoCausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def generate(self, inputs=None, generation_config=None, logits_processor=None, stopping_criteria=None, **kwargs):
        """`GenerationMixin.generate`, with two differences.

        - The placeholders of images and videos are never generated: they are added to the `suppress_tokens` of the
          call or the config.
        - `stop_strings` work with every tokenizer. transformers' own search fails with word-level tokenizers.
        """
        kwargs.pop(_GAP, None)  # of a model that this one assists
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
        settings = [config for config in (generation_config, self.generation_config) if config is not None]
        given = [kwargs.pop("suppress_tokens", None), *(config.suppress_tokens for config in settings)]
        suppress_tokens = self._with_image_token(next((tokens for tokens in given if tokens is not None), []))
        tokenizer, stop_strings = kwargs.get("tokenizer"), kwargs.get("stop_strings")
        if stop_strings is None and generation_config is not None:
            stop_strings = generation_config.stop_strings
        if stop_strings and tokenizer is not None:
            kwargs.pop("stop_strings", None)
            if generation_config is not None:
                generation_config.stop_strings = None
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            prompt_length = 0 if prompt is None else prompt.shape[1]
            criterion = StopStrings(tokenizer, stop_strings, prompt_length)
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), criterion])
        if generation_config is None:  # transformers takes either a config or arguments
            kwargs["suppress_tokens"] = suppress_tokens
        else:
            generation_config.suppress_tokens = suppress_tokens
        return super().generate(inputs, generation_config, logits_processor, stopping_criteria, **kwargs)

    # private, seen in transformers 5.19 to 5.24
    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if self.model.check_image_positions(model_kwargs.get("image_positions")) == "sequence":
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        input_ids, inputs_embeds = model_kwargs.get("input_ids"), model_kwargs.get("inputs_embeds")
        if inputs_tensor.ndim == 2:
            input_ids = inputs_tensor
        else:
            inputs_embeds = inputs_tensor
        maps = self.model.token_maps(model_kwargs)
        self.model.check_encoded(model_kwargs.get("mm_encoder_outputs"), maps)
        found = self.model.find_places(input_ids, inputs_embeds, maps)
        attention_mask, cache = model_kwargs["attention_mask"], model_kwargs.get(CACHE_NAME)
        num_all, num_cached = attention_mask.shape[1], int(num_tokens(cache))
        if not has_moved(cache) and inputs_tensor.shape[1] == num_all:  # all tokens are here to be numbered
            num_cached = 0
        num_new = num_all - num_cached
        start = next_position(cache) if has_moved(cache) else attention_mask[:, :num_cached].sum(-1, keepdim=True)
        found = [part._replace(mask=part.mask[:, -num_new:]) for part in found]
        attention_mask = attention_mask[:, -num_new:]
        position_ids = start + patch_position_ids(found, attention_mask)
        last = position_ids[:, -1:]
        behind = start + position_behind(found, attention_mask)
        gap = behind - last - 1
        if gap.any():
            model_kwargs[_GAP] = torch.cat([last, gap], dim=1)
        return nn.functional.pad(position_ids, (num_cached, 0))  # only those of new tokens are read

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the signature
    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        gap = kwargs.pop(_GAP, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        position_ids, cache = inputs.get("position_ids"), inputs.get(CACHE_NAME)
        if position_ids is None or self.model.check_image_positions(kwargs.get("image_positions")) == "sequence":
            return inputs
        if cache is None and inputs.get("attention_mask") is None:  # `generate` drops a mask of ones
            inputs["attention_mask"] = torch.ones_like(position_ids)
        behind = position_ids[:, -1:] + 1
        if gap is not None:
            last, gap = gap.to(position_ids.device).split(1, dim=1)
            inputs["position_ids"] = position_ids = position_ids + gap * (position_ids > last)
            behind = behind + gap * (behind > last)
        if is_first_iteration:
            set_next_position(cache, behind, num_tokens(cache) + position_ids.shape[1])
        return inputs | _as_one_sequence(self.model.language_model, position_ids, cache)

    def _with_image_token(self, tokens: list[int]) -> list[int]:
        placeholders = [self.config.image_token_id, self.config.video_token_id]
        return list(dict.fromkeys([*tokens, *(token for token in placeholders if token is not None)]))


class StopStrings(StoppingCriteria):
    """Ends an answer that contains a stop string. Text of the prompt is not matched."""

    def __init__(self, tokenizer, stop_strings: str | list[str], prompt_length: int):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        # each token has at least one byte, so a stop string of n bytes is within the last n tokens
        self.num_tokens = max(len(stop.encode()) for stop in self.stop_strings)

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        ends = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.num_tokens) :]
        texts = self.tokenizer.batch_decode(ends)  # keeps special tokens, which may be stop strings
        found = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def build_projector(config: DecoConfig) -> nn.Module:
    """The config's projector, with PyTorch's initialization."""
    widths, sizes = (config.vision_hidden_size, config.text_hidden_size), config.projector_sizes
    mlp: dict[str, Any] = {
        "num_layers": config.projector_num_layers,
        "hidden_act": config.projector_hidden_act,
        "bias": config.multimodal_projector_bias,
    }
    if config.projector_type == "mlp":
        return MlpProjector(*widths, **mlp)
    if config.projector_type == "avg_pool":
        return AvgPoolProjector(*widths, config.pooled_grid, **mlp)
    if config.projector_type == "qformer":
        return QFormerProjector(*widths, config.pooled_grid, **sizes)
    if config.projector_type == "resampler":
        return ResamplerProjector(*widths, config.pooled_grid, **sizes)
    abstractor = CAbstractorProjector if config.projector_type == "c_abstractor" else DAbstractorProjector
    return abstractor(*widths, config.pooled_grid, config.patch_grid, **sizes)


def _uses_positions(language_model: PreTrainedModel) -> bool:
    """Whether `position_ids` change what a language model computes. Some hybrids take them but have no embeddings of
    positions (Jamba, Nemotron-H), and with ALiBi a model counts tokens."""
    takes_positions = "position_ids" in inspect.signature(language_model.forward).parameters
    if not takes_positions or getattr(language_model.config, "alibi", False):
        return False
    names = [name for name, _ in (*language_model.named_modules(), *language_model.named_buffers())]
    # the names in transformers 5.19 to 5.24: rotary_emb, embed_positions, positions_embed, pos_encoding, wpe
    return any(re.search(r"rotary|positions|pos_encoding|wpe", name.rpartition(".")[2]) for name in names)


def _refuse_engine(text_config) -> None:
    """Refuse engines that run the model with their own attention and their own positions.

    Raises:
        ValueError: the language model's attention is an engine's.
    """
    engine = text_config._attn_implementation  # private, seen in transformers 5.19 to 5.24
    if engine in ("vllm", "sglang", "tgi"):
        raise ValueError(
            f"image_positions='patch' needs an engine that asks the model for positions, and this version of "
            f"{engine!r} numbers tokens one after another; use vLLM 0.32 or newer, or image_positions='sequence'."
        )


def _is_pattern(attention_mask, length: int) -> bool:
    """Whether a mask says of each token to which others it attends. Then its position counts those alone, so that
    independent texts in one row have the positions that they have in rows of their own."""
    is_tensor = isinstance(attention_mask, torch.Tensor) and attention_mask.dtype == torch.bool
    return is_tensor and attention_mask.ndim == 4 and attention_mask.shape[-2:] == (length, length)


def _as_one_sequence(language_model: PreTrainedModel, position_ids: torch.Tensor, cache) -> dict[str, Any]:
    """Arguments of flash attention that say that a batch of one is one sequence. Without them, it takes positions that
    jump for several packed sequences, whatever the mask."""
    batch_size, length = position_ids.shape
    # private, seen in transformers 5.19 to 5.24
    if batch_size != 1 or length == 1 or "flash" not in (language_model.config._attn_implementation or ""):
        return {}
    num_keys = int(num_tokens(cache)) + length
    return {
        "cu_seq_lens_q": torch.tensor([0, length], dtype=torch.int32, device=position_ids.device),
        "cu_seq_lens_k": torch.tensor([0, num_keys], dtype=torch.int32, device=position_ids.device),
        "max_length_q": length,
        "max_length_k": num_keys,
    }


def _is_filled(cache) -> bool:
    """Whether a cache has tokens. A cache that cannot count its tokens is taken as filled."""
    try:
        return cache is not None and cache.get_seq_length() > 0
    except (AttributeError, ValueError):
        return True


def _finish_logits(logits: torch.Tensor, text_config) -> torch.Tensor:
    """Scale or cap the output of `lm_head`, as the language model's own causal class does."""
    if text_config.model_type != "mpt":  # MPT's logit_scale has no effect
        for name in ("logit_scale", "lm_head_multiplier"):  # Cohere's; Falcon-H1's
            if (factor := getattr(text_config, name, None)) is not None:
                logits = logits * factor
    if (scaling := getattr(text_config, "logits_scaling", None)) is not None:  # Granite's, MiniCPM3's
        logits = logits * scaling if text_config.model_type == "hyperclovax" else logits / scaling
    # Gemma's; RecurrentGemma's; xLSTM's
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if (cap := getattr(text_config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


def _load_text_model(name_or_path, dtype) -> PreTrainedModel:
    """Load a causal language model, which must have one linear head and no missing weights."""
    text_config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name_or_path}: its model_type, {text_config.model_type!r}, is not that of a causal language model; "
            f"choose a decoder-only one."
        )
    text_model, loading = AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    _refuse_missing_weights(text_model, loading)
    lm_head = text_model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear) or not lm_head.state_dict().keys() <= {"weight", "bias"}:
        raise _cannot_join(text_model, "its head is not one linear layer")
    return text_model.eval()


def _refuse_missing_weights(model: PreTrainedModel, loading: dict) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):  # FSDP: another rank has read the files
        return
    missing = sorted({*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{model.name_or_path}: {len(missing)} weights are missing or have another shape than in config.json: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )


def _cannot_join(text_model: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"{text_model.name_or_path}: a {type(text_model).__name__} cannot be joined: {reason}. DeCo takes a decoder "
        f"that AutoModel builds, on embeddings, under one linear layer; choose a language model of that kind."
    )


@torch.no_grad()
def _logits_of(model: PreTrainedModel, vocab_size: int, with_cache: bool) -> torch.Tensor:
    """Logits of 8 ids, `(8, vocab_size)`. With a cache, the last 3 ids use the cache of the first 5."""
    device = model.get_input_embeddings().weight.device
    ids = torch.linspace(1, vocab_size - 1, 8, device=device).long()[None]
    if not with_cache:
        return model(input_ids=ids, return_dict=True).logits[0].float()
    before = model(input_ids=ids[:, :5], use_cache=True, return_dict=True)
    if type(before[CACHE_NAME]) is not DynamicCache:
        raise TypeError("generate makes a DynamicCache")
    after = model(input_ids=ids[:, 5:], return_dict=True, **{CACHE_NAME: before[CACHE_NAME]})
    return torch.cat([before.logits, after.logits], dim=1)[0].float()


def _own_logits(text_model: PreTrainedModel) -> dict[bool, torch.Tensor]:
    """A causal language model's own logits, without and with a cache. Empty if this process does not hold all weights
    (ZeRO-3, FSDP) or cannot run the model."""
    if not all(parameter.numel() > 0 and not parameter.is_meta for parameter in text_model.parameters()):
        return {}
    own_logits, vocab_size = {}, text_model.get_input_embeddings().weight.shape[0]
    for with_cache in (False, True):
        try:
            own_logits[with_cache] = _logits_of(text_model, vocab_size, with_cache)
        except Exception as error:  # of many kinds: it needs kernels that this machine lacks
            if with_cache:
                reason = "it does not continue from the kind of cache that generate makes"
                raise _cannot_join(text_model, reason) from error
            else:
                logger.warning(f"{type(text_model).__name__} does not run here; its logits are not compared: {error}")
                return {}
    if own_logits[False].isnan().any():
        raise ValueError(
            f"{text_model.name_or_path}: its logits in {text_model.dtype} are NaN, so its weights are damaged or need "
            f"another dtype."
        )
    return own_logits


def _take_language_model(model, text_model: PreTrainedModel, own_logits: dict[bool, torch.Tensor]) -> None:
    """Put the decoder and the head of a causal language model into a DeCo.

    Args:
        own_logits: the language model's logits without and with a cache, which the DeCo must reproduce.

    Raises:
        ValueError: the DeCo has other logits, or the decoder is not the one that AutoModel builds.
    """
    decoder_class, lm_head = type(model.model.language_model), text_model.get_output_embeddings()
    decoders = [module for module in text_model.modules() if type(module) is decoder_class]
    if not decoders:
        raise _cannot_join(text_model, f"AutoModel builds a {decoder_class.__name__}, which is no part of it")
    if decoders[0].state_dict().keys() != model.model.language_model.state_dict().keys():
        raise _cannot_join(text_model, f"its {decoder_class.__name__} is not the one that AutoModel builds")
    if not own_logits:
        model.model.language_model, model.lm_head = decoders[0], lm_head
        return
    if lm_head.weight.shape != model.lm_head.weight.shape:
        raise _cannot_join(
            text_model,
            f"its head has the shape {tuple(lm_head.weight.shape)} where its embeddings have "
            f"{tuple(model.lm_head.weight.shape)}",
        )
    model.model.language_model, model.lm_head = decoders[0], lm_head
    for with_cache, expected in own_logits.items():
        vocab_size = expected.shape[-1]
        try:
            logits = _logits_of(model.eval(), vocab_size, with_cache)[:, :vocab_size]
            with torch.no_grad():  # like an image's, these embeddings belong to no token
                model(inputs_embeds=lm_head.weight.new_full((1, 2, model.config.text_hidden_size), 0.01))
        except Exception as error:  # of many kinds
            reason = f"its decoder does not run on embeddings alone ({type(error).__name__})"
            raise _cannot_join(text_model, reason) from error
        largest = expected[expected.isfinite()].abs().max()
        if not torch.allclose(logits, expected, rtol=0.0, atol=0.01 * largest.item()):
            difference = (logits - expected).abs().max()
            raise _cannot_join(
                text_model,
                f"its own logits and those of its decoder and head alone differ by {difference:.3g}; the largest "
                f"logit is {largest:.3g}",
            )


def _forget_llavas_names(model: PreTrainedModel) -> None:
    """`save_pretrained` gives weights the names that they were loaded by. A DeCo is saved with its own."""
    # private, seen in transformers 5.19 to 5.24
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        own = set(KEY_MAPPING.values())
        model._weight_conversions = [entry for entry in conversions if own.isdisjoint(entry.target_patterns)]


def _with_modules_to_skip(quantization_config):
    """A copy of a quantization config or its dict. If it lists no modules to skip, it gets `_NOT_QUANTIZED`."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.copy(quantization_config)
    # the field's name in bitsandbytes and in most other methods (Quanto, torchao, ...); some methods have no such list
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if vars(quantization_config).get(field, ()) is None:
            setattr(quantization_config, field, list(_NOT_QUANTIZED))
    return quantization_config


def _tiles(image_size: tuple[int, int], view_size: tuple[int, int]) -> tuple[int, int]:
    """`(rows, cols)` of the tiles of a model without pinpoints."""
    (height, width), (view_height, view_width) = image_size, view_size
    if height < view_height or width < view_width or height % view_height or width % view_width:
        raise ValueError(
            f"image_sizes has {height} x {width}, which are not tiles of {view_height} x {view_width} pixels; pass "
            f"what the processor returns for `tiles`."
        )
    return height // view_height, width // view_width


def _without_empty_views(pixel_values: torch.FloatTensor, num_views: list[int]) -> torch.FloatTensor:
    """All views, `(sum of num_views, 3, height, width)`, from padded ones, `(num_images, max_num_views, 3, height,
    width)`, or as they are.

    Raises:
        ValueError: there are more or fewer views than the images have.
    """
    if pixel_values.ndim == 5 and len(pixel_values) == len(num_views) and max(num_views) <= pixel_values.shape[1]:
        return torch.cat([views[:number] for views, number in zip(pixel_values, num_views, strict=True)])
    if pixel_values.ndim == 4 and len(pixel_values) == sum(num_views):
        return pixel_values
    raise ValueError(
        f"pixel_values of the shape {tuple(pixel_values.shape)} are not the views of {len(num_views)} images with "
        f"{', '.join(map(str, num_views))} views; pass everything that the processor returns to the model."
    )


def _passes(
    maps: list[list[TokenMap]], frames: torch.FloatTensor
) -> Iterator[tuple[list[int], list[TokenMap], torch.FloatTensor]]:
    """Split the frames of videos into passes of the vision tower, at the borders of maps.

    Yields:
        For each map of the pass, which video it belongs to; the maps; their frames.
    """
    owners: list[int] = []
    maps_of_pass: list[TokenMap] = []
    num_done = 0
    of_all = [(owner, token_map) for owner, maps_of_video in enumerate(maps) for token_map in maps_of_video]
    for index, (owner, token_map) in enumerate(of_all, start=1):
        owners.append(owner)
        maps_of_pass.append(token_map)
        num_frames = num_map_views(maps_of_pass)
        if num_frames >= _FRAMES_PER_PASS or index == len(of_all):
            yield owners, maps_of_pass, frames[num_done : num_done + num_frames]
            owners, maps_of_pass, num_done = [], [], num_done + num_frames


def _patchify(pixel_values, patch_size: int) -> dict[str, Any]:
    """SigLIP 2's inputs from `(num_images, 3, height, width)`: flat patches in its order (patch row, patch column,
    channel), no padding."""
    num_images, num_channels, height, width = pixel_values.shape
    rows, cols = height // patch_size, width // patch_size
    cells = pixel_values[:, :, : rows * patch_size, : cols * patch_size].unflatten(2, (rows, patch_size))
    cells = cells.unflatten(4, (cols, patch_size))  # (num_images, 3, rows, patch_size, cols, patch_size)
    patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(num_images, rows * cols, num_channels * patch_size**2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": pixel_values.new_ones(num_images, rows * cols, dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, cols]] * num_images, device=pixel_values.device),
    }


__all__ = ["DecoForConditionalGeneration", "DecoModel", "DecoPreTrainedModel"]
