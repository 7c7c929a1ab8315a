# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The projector of the original code: LLaVA's MLP, or the `AvgPoolProjector` of DeCo's authors."""

import math
import re

from ..utils.errors import InputError
from .checkpoints import LlavaCheckpoint
from .sources import Source
from .tensors import SourceTensor


def is_average_pooling(checkpoint: LlavaCheckpoint) -> bool:
    """Whether the projector is the `AvgPoolProjector` of DeCo's authors."""
    return any("mm_projector.mlp_projector." in tensor.key for tensor in _projector(checkpoint).values())


def _projector(checkpoint: LlavaCheckpoint) -> dict[str, SourceTensor]:
    prefix = "model.multi_modal_projector."
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)}


def count_layers(checkpoint: LlavaCheckpoint, raw_config: dict) -> int:
    """The number of linear layers. The projector must be an MLP: Linear-GELU-Linear and so on."""
    source, projector = checkpoint.sources["source"], _projector(checkpoint)
    projector_type = raw_config.get("mm_projector_type", "linear")
    match = re.fullmatch(r"mlp(\d+)x_gelu", str(projector_type))
    if not is_average_pooling(checkpoint) and match is None:
        raise InputError(
            f"mm_projector_type {projector_type!r} in config.json of {source.name} is not Linear-GELU-Linear "
            f"('mlp2x_gelu'), as DeCo's projector is."
        )
    num_layers = len(projector) // 2
    expected = {
        f"model.multi_modal_projector.linear_{index + 1}.{kind}"
        for index in range(num_layers)
        for kind in ("weight", "bias")
    }
    if not projector or projector.keys() != expected or (match and int(match[1]) != num_layers):
        keys = sorted(tensor.key for tensor in projector.values())
        raise InputError(
            f"The projector of {source.name} is not a {projector_type} (Linear-GELU-Linear): it has the keys {keys}."
        )
    return num_layers


def grid_of_query_num(raw_config: dict, source: Source) -> int:
    """The grid that the authors' AvgPoolProjector was trained with, from its number of image tokens."""
    name = next((name for name in raw_config if name.endswith("query_num")), None)
    if name is None:
        raise InputError(
            f"{source.name} has the DeCo authors' AvgPoolProjector, and its config.json has no query_num; pass "
            f"--pooled-grid-size (12 if query_num was 144)."
        )
    query_num = raw_config[name]
    if not isinstance(query_num, int) or query_num < 1 or math.isqrt(query_num) ** 2 != query_num:
        raise InputError(
            f"{name}={query_num!r} in config.json of {source.name} is not a square number; pass --pooled-grid-size."
        )
    return math.isqrt(query_num)
