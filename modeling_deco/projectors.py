# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo's projector: it pools the patch grid without parameters, then applies LLaVA's MLP. Beside it are the projectors
that it is compared with.

A projector can be used without the rest of the model:

    projector = AvgPoolProjector(vision_hidden_size=1024, text_hidden_size=4096, pooled_grid_size=12)
    image_features = projector(patch_features)  # (num_images, 576, 1024) -> (num_images, 144, 4096)

All projectors take the same arguments. `patch_features` are `(num_images, patch_rows * patch_cols,
vision_hidden_size)`, row by row and without prefix tokens, of images that share one patch grid and one pooled grid:

    patch_grid: `(patch_rows, patch_cols)`. Default: a square.
    pooled_grid: `(rows, cols)`. Default: the module's.

They return `(num_images, rows * cols, text_hidden_size)`. They raise a ValueError if the patches do not fill the patch
grid, or if the projector cannot pool to the grid.

The compressive projectors consist of transformers' blocks, which are imported when a projector is built: average
pooling does not depend on them.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_deco import check_grid, num_image_tokens, parse_grid


def pool_patch_grid(
    patch_features: torch.Tensor, patch_grid: tuple[int, int], pooled_grid: tuple[int, int]
) -> torch.Tensor:
    """Shrink the patch grid by 2D adaptive average pooling (arXiv 2405.20985): no parameters, no abstraction.

    Args:
        patch_features: `(num_images, patch_rows * patch_cols, vision_hidden_size)`, row by row.
        patch_grid: `(patch_rows, patch_cols)`.
        pooled_grid: `(rows, cols)`, at most the patch grid. Windows overlap where sizes do not divide.

    Returns:
        `(num_images, rows * cols, vision_hidden_size)`, contiguous; the input itself at the patch grid.

    Raises:
        ValueError: the tokens do not fill the patch grid, or the pooled grid is larger than it.
    """
    patch_grid = _find_patch_grid(patch_features, patch_grid)
    check_grid(pooled_grid, patch_grid, of="the image")
    if tuple(pooled_grid) == patch_grid:
        return patch_features
    patch_map = _to_map(patch_features, patch_grid)
    return _from_map(nn.functional.adaptive_avg_pool2d(patch_map, pooled_grid))


def _find_patch_grid(patch_features: torch.Tensor, patch_grid: tuple[int, int] | None) -> tuple[int, int]:
    num_patches = patch_features.shape[1]
    if patch_grid is None:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(f"{num_patches} patches are not square; pass patch_grid=(rows, cols).")
        return side, side
    if patch_grid[0] * patch_grid[1] != num_patches:
        raise ValueError(
            f"{num_patches} patch features do not fill a grid of {patch_grid[0]} x {patch_grid[1]} = "
            f"{patch_grid[0] * patch_grid[1]} patches."
        )
    rows, cols = patch_grid
    return rows, cols


def _to_map(patch_features: torch.Tensor, patch_grid: tuple[int, int]) -> torch.Tensor:
    return patch_features.transpose(1, 2).unflatten(2, patch_grid)  # (images, hidden, patch_rows, patch_cols)


def _from_map(feature_map: torch.Tensor) -> torch.Tensor:
    return feature_map.flatten(2).transpose(1, 2).contiguous()  # (images, rows * cols, hidden)


class MlpProjector(nn.Module):
    """LLaVA-1.5's projector (arXiv 2310.03744): every patch becomes a token. The layers are `linear_1 ... linear_n`,
    with an activation between them.

    Args:
        vision_hidden_size: width of the patch features.
        text_hidden_size: width of the language model.
        num_layers: linear layers.
        hidden_act: a key of transformers' `ACT2FN`.
        bias: whether the linear layers have biases.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_layers: int = 2,
        hidden_act: str = "gelu",
        bias: bool = True,
    ):
        super().__init__()
        self.num_layers = num_layers
        if hidden_act not in ACT2FN:
            raise ValueError(f"projector_hidden_act={hidden_act!r} is no activation of transformers; use 'gelu'.")
        self.act = ACT2FN[hidden_act]
        for index in range(num_layers):
            in_features = vision_hidden_size if index == 0 else text_hidden_size
            self.add_module(f"linear_{index + 1}", nn.Linear(in_features, text_hidden_size, bias=bias))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., vision_hidden_size)` to `(..., text_hidden_size)`, token by token."""
        for index in range(self.num_layers):
            if index > 0:
                features = self.act(features)
            features = self.get_submodule(f"linear_{index + 1}")(features)
        return features

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_grid: tuple[int, int] | None = None,
        pooled_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """See the module's docstring; the pooled grid can only be the patch grid."""
        patch_grid = _find_patch_grid(patch_features, patch_grid)
        if pooled_grid is not None and tuple(pooled_grid) != patch_grid:
            raise ValueError(
                f"projector_type 'mlp' does not compress: {patch_grid[0]} x {patch_grid[1]} patches become as many "
                f"tokens, not {pooled_grid[0]} x {pooled_grid[1]}; choose avg_pool for that."
            )
        return self.project(patch_features)


class AvgPoolProjector(MlpProjector):
    """DeCo's projector (arXiv 2405.20985; the authors' name for it): `pool_patch_grid`, then LLaVA's MLP.

    Args:
        vision_hidden_size: width of the patch features.
        text_hidden_size: width of the language model.
        pooled_grid_size: default grid, an int (square) or `(rows, cols)`.
        num_layers: linear layers.
        hidden_act: a key of transformers' `ACT2FN`.
        bias: whether the linear layers have biases.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        pooled_grid_size: int | tuple[int, int] = 12,
        num_layers: int = 2,
        hidden_act: str = "gelu",
        bias: bool = True,
    ):
        super().__init__(vision_hidden_size, text_hidden_size, num_layers, hidden_act, bias)
        self.pooled_grid = parse_grid(pooled_grid_size)

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_grid: tuple[int, int] | None = None,
        pooled_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """See the module's docstring; any grid up to the patch grid."""
        patch_grid = _find_patch_grid(patch_features, patch_grid)
        return self.project(pool_patch_grid(patch_features, patch_grid, pooled_grid or self.pooled_grid))


class QueryProjector(nn.Module):
    """A projector with a learned query for each token, and therefore one token budget."""

    def __init__(self, pooled_grid_size: int | tuple[int, int]):
        super().__init__()
        self.pooled_grid = parse_grid(pooled_grid_size)

    def check_grids(self, patch_features: torch.Tensor, patch_grid, pooled_grid) -> None:
        if patch_grid is not None:
            _find_patch_grid(patch_features, patch_grid)
        if pooled_grid is not None and tuple(pooled_grid) != self.pooled_grid:
            raise ValueError(
                f"{type(self).__name__} has learned queries for {self.pooled_grid[0]} x {self.pooled_grid[1]} tokens "
                f"and cannot make {pooled_grid[0]} x {pooled_grid[1]}; avg_pool and c_abstractor take any grid."
            )


class QFormerProjector(QueryProjector):
    """BLIP-2's Q-Former (arXiv 2301.12597): learned queries attend to one another, and in every second layer to the
    patches. The default is BERT-base's size, as in BLIP-2.

    Its LayerNorm on the patches is LAVIS's `ln_vision`. Its last layer is BLIP-2's `language_projection`. Like LLaVA,
    it has no dropout.

    Args:
        vision_hidden_size: width of the patch features.
        text_hidden_size: width of the language model.
        pooled_grid_size: its `rows * cols` is the number of queries, which have no position in the picture.
        hidden_size, num_hidden_layers, num_attention_heads: sizes of the Q-Former. Its feed-forward layers are 4 times
            as wide.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        pooled_grid_size: int | tuple[int, int] = 12,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
    ):
        from transformers import Blip2QFormerConfig

        # private, seen in transformers 5.19 to 5.24
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

        super().__init__(pooled_grid_size)
        config = Blip2QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=4 * hidden_size,
            encoder_hidden_size=vision_hidden_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.input_norm = nn.LayerNorm(vision_hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(1, num_image_tokens(pooled_grid_size), hidden_size))
        self.qformer = Blip2QFormerModel(config)
        self.linear = nn.Linear(hidden_size, text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.query_tokens, std=0.02)

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_grid: tuple[int, int] | None = None,
        pooled_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """See the module's docstring; the pooled grid can only be the module's."""
        self.check_grids(patch_features, patch_grid, pooled_grid)
        query_tokens = self.query_tokens.expand(len(patch_features), -1, -1)  # (images, queries, hidden)
        outputs = self.qformer(
            query_embeds=query_tokens, encoder_hidden_states=self.input_norm(patch_features), return_dict=True
        )
        return self.linear(outputs.last_hidden_state)


class ResamplerProjector(QueryProjector):
    """Flamingo's perceiver resampler (arXiv 2204.14198): latents attend to the patches and to themselves at once. The
    default is six layers, as in Flamingo. The layers are Idefics2's, with SwiGLU and RMSNorm.

    Args:
        vision_hidden_size: width of the patch features.
        text_hidden_size: width of the language model.
        pooled_grid_size: its `rows * cols` is the number of latents, which have no position in the picture.
        hidden_size, num_hidden_layers, num_attention_heads: sizes of the resampler. Its feed-forward layers are 4
            times as wide.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        pooled_grid_size: int | tuple[int, int] = 12,
        hidden_size: int = 1024,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 16,
    ):
        # private, seen in transformers 5.19 to 5.24
        from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
        from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

        super().__init__(pooled_grid_size)
        if hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}."
            )
        config = Idefics2PerceiverConfig(
            hidden_size=hidden_size,
            resampler_n_latents=num_image_tokens(pooled_grid_size),
            resampler_depth=num_hidden_layers,
            resampler_n_heads=num_attention_heads,
            resampler_head_dim=hidden_size // num_attention_heads,
            num_key_value_heads=num_attention_heads,
        )
        self.input_proj = nn.Linear(vision_hidden_size, hidden_size)
        self.resampler = Idefics2PerceiverResampler(config)
        self.linear = nn.Linear(hidden_size, text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.resampler.latents, std=0.02)  # in Idefics2 all are equal until weights are loaded

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_grid: tuple[int, int] | None = None,
        pooled_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """See the module's docstring; the pooled grid can only be the module's."""
        self.check_grids(patch_features, patch_grid, pooled_grid)
        attention_mask = patch_features.new_ones(patch_features.shape[:2], dtype=torch.long)
        return self.linear(self.resampler(self.input_proj(patch_features), attention_mask))


def sine_positions(patch_grid: tuple[int, int], hidden_size: int) -> torch.Tensor:
    """DETR's fixed embeddings of places (arXiv 2005.12872): sines and cosines of row, then of column.

    A convolutional network is built to find a thing wherever it is; its features hardly say where.

    Args:
        patch_grid: `(rows, cols)`.
        hidden_size: width of the patch features, a multiple of 4.

    Returns:
        `(rows * cols, hidden_size)`, row by row.
    """
    exponents = torch.arange(0, hidden_size // 2, 2) / (hidden_size // 2)
    rows, cols = (
        2 * math.pi * (torch.arange(length)[:, None] + 0.5) / length * 10000.0**-exponents for length in patch_grid
    )
    rows, cols = (torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1) for angles in (rows, cols))
    grid = patch_grid[0], patch_grid[1], -1
    return torch.cat([rows[:, None].expand(grid), cols[None].expand(grid)], dim=-1).flatten(0, 1)


class GridPositions(nn.Module):
    """Learned positions, added to a feature map. They are interpolated if the map has another size."""

    def __init__(self, hidden_size: int, patch_grid: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, *patch_grid))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.trunc_normal_(self.weight, std=0.02)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        positions = self.weight
        if feature_map.shape[-2:] != positions.shape[-2:]:
            positions = nn.functional.interpolate(positions, feature_map.shape[-2:], mode="bicubic")
        return feature_map + positions


class CAbstractorProjector(nn.Module):
    """Honeybee's C-Abstractor (arXiv 2312.06742): convolutions, average pooling, convolutions, an MLP.

    The convolutions are RegNet's: depthwise, with squeeze-and-excitation, LayerNorm over channels and SiLU, as in
    Honeybee's code (timm's `RegStage`).

    Args:
        vision_hidden_size: width of the patch features.
        text_hidden_size: width of the language model.
        pooled_grid_size: default grid, an int (square) or `(rows, cols)`.
        patch_grid: `(rows, cols)` of the learned positions, which are interpolated for other grids.
        hidden_size: channels of the convolutions.
        num_hidden_layers: number of blocks before the pooling, and of blocks after it.
        mlp_num_layers: linear layers of the MLP.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        pooled_grid_size: int | tuple[int, int] = 12,
        patch_grid: tuple[int, int] = (24, 24),
        hidden_size: int = 1024,
        num_hidden_layers: int = 3,
        mlp_num_layers: int = 2,
    ):
        super().__init__()
        self.pooled_grid = parse_grid(pooled_grid_size)
        self.positions = GridPositions(vision_hidden_size, patch_grid)
        self.before = _regnet_stage(vision_hidden_size, hidden_size, num_hidden_layers)
        self.after = _regnet_stage(hidden_size, hidden_size, num_hidden_layers)
        self.readout = MlpProjector(hidden_size, text_hidden_size, mlp_num_layers, hidden_act="silu")

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # PyTorch's, as in Honeybee
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_grid: tuple[int, int] | None = None,
        pooled_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """See the module's docstring; any grid up to the patch grid."""
        patch_map = _to_map(patch_features, _find_patch_grid(patch_features, patch_grid))
        patch_map = self.before(self.positions(patch_map))  # (images, hidden, patch_rows, patch_cols)
        pooled_grid = pooled_grid or self.pooled_grid
        check_grid(pooled_grid, patch_map.shape[-2:], of="the image")
        pooled_map = nn.functional.adaptive_avg_pool2d(patch_map, pooled_grid)
        return self.readout.project(_from_map(self.after(pooled_map)))


def _regnet_stage(in_channels: int, out_channels: int, num_layers: int) -> nn.Sequential:
    from transformers import RegNetConfig

    # private, seen in transformers 5.19 to 5.24
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.models.regnet.modeling_regnet import RegNetSELayer, RegNetYLayer

    config = RegNetConfig(groups_width=1, hidden_act="silu")
    layers = [
        RegNetYLayer(config, in_channels if index == 0 else out_channels, out_channels) for index in range(num_layers)
    ]
    stage = nn.Sequential(*layers)
    for module in stage.modules():
        if hasattr(module, "normalization"):
            module.normalization = ConvNextLayerNorm(out_channels, data_format="channels_first")
        if isinstance(module, RegNetSELayer):
            module.attention[1] = nn.SiLU()  # timm's squeeze has the block's activation
    return stage


class DAbstractorProjector(QueryProjector):
    """Honeybee's D-Abstractor (arXiv 2312.06742): a Deformable DETR decoder (arXiv 2010.04159). Its queries begin at
    the points of a grid, learn where to sample the patches, and get the pooled patches as position embeddings
    ("v-pooled queries" in Honeybee's code). The default is Deformable DETR's six layers and four points.

    Args:
        vision_hidden_size: width of the patch features.
        text_hidden_size: width of the language model.
        pooled_grid_size: grid of the queries, an int (square) or `(rows, cols)`.
        patch_grid: `(rows, cols)` of the learned positions, which are interpolated for other grids.
        hidden_size, num_hidden_layers, num_attention_heads: sizes of the decoder. Its feed-forward layers are 4 times
            as wide.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        pooled_grid_size: int | tuple[int, int] = 12,
        patch_grid: tuple[int, int] = (24, 24),
        hidden_size: int = 1024,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 16,
    ):
        from transformers import DeformableDetrConfig

        # private, seen in transformers 5.19 to 5.24
        from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoder

        super().__init__(pooled_grid_size)
        config = DeformableDetrConfig(
            d_model=hidden_size,
            decoder_layers=num_hidden_layers,
            decoder_attention_heads=num_attention_heads,
            decoder_ffn_dim=4 * hidden_size,
            num_feature_levels=1,
            dropout=0.0,
        )
        num_queries = num_image_tokens(pooled_grid_size)
        self.patch_grid = patch_grid
        self.input_proj = nn.Linear(vision_hidden_size, hidden_size)
        self.positions = GridPositions(hidden_size, patch_grid)
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, hidden_size))
        self.reference_points = nn.Parameter(torch.empty(1, num_queries, 2))  # (x, y) in 0 to 1
        self.decoder = DeformableDetrDecoder(config)
        self.linear = nn.Linear(hidden_size, text_hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.query_tokens, std=0.02)
        # from the center of the first patch to the center of the last, as in Honeybee
        y, x = (
            torch.linspace(0.5, size - 0.5, num_points) / size
            for size, num_points in zip(self.patch_grid, self.pooled_grid, strict=True)
        )
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (rows, cols, 2)
        init.copy_(self.reference_points, points.flatten(0, 1)[None])

    def forward(
        self,
        patch_features: torch.Tensor,
        patch_grid: tuple[int, int] | None = None,
        pooled_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """See the module's docstring; the pooled grid can only be the module's."""
        self.check_grids(patch_features, patch_grid, pooled_grid)
        patch_grid = _find_patch_grid(patch_features, patch_grid)
        check_grid(self.pooled_grid, patch_grid, of="the image")
        patch_map = self.positions(_to_map(self.input_proj(patch_features), patch_grid))
        outputs = self.decoder(
            inputs_embeds=self.query_tokens.expand(len(patch_features), -1, -1),
            object_queries_position_embeddings=_from_map(
                nn.functional.adaptive_avg_pool2d(patch_map, self.pooled_grid)
            ),
            encoder_hidden_states=_from_map(patch_map),
            reference_points=self.reference_points.expand(len(patch_features), -1, -1),
            valid_ratios=patch_features.new_ones(len(patch_features), 1, 2),
            spatial_shapes=torch.tensor([patch_grid], device=patch_features.device),
            spatial_shapes_list=[patch_grid],
            level_start_index=torch.tensor([0], device=patch_features.device),
            return_dict=True,
        )
        return self.linear(outputs.last_hidden_state)


__all__ = [
    "AvgPoolProjector",
    "CAbstractorProjector",
    "DAbstractorProjector",
    "MlpProjector",
    "QFormerProjector",
    "ResamplerProjector",
    "pool_patch_grid",
]
