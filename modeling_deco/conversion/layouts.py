# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of parameters in LLaVA's checkpoint layouts, and DeCo's names for them.

Each layout is a table of keys that are dropped (pattern, reason) and of keys that are renamed (pattern, DeCo's name).
A pattern matches a whole key; a key that no pattern matches is unknown.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..llava import KEY_MAPPING

BUFFER = "a buffer, computed from the config"
COPIED_TOWER = "a copy of the frozen vision tower: like the original code, the one that the config names is used"
TIED = "tied to the embeddings"
UNUSED_HEAD = "the vision tower's attention pooling, which DeCo does not use"
UNUSED_LAYER = "above the vision layer that DeCo uses"
_OTHER_HALF = "not a part of the vision tower"


@dataclass(frozen=True)
class Layout:
    drops: tuple[tuple[str, str], ...]
    renames: tuple[tuple[str, str | Callable[[re.Match], str]], ...]

    def rename(self, key: str) -> tuple[str | None, str | None]:
        """`(DeCo's name, None)`, `(None, reason)` for a key that is dropped, or `(None, None)` for an unknown key."""
        for pattern, reason in self.drops:
            if re.fullmatch(pattern, key):
                return None, reason
        for pattern, name in self.renames:
            if match := re.fullmatch(pattern, key):
                return (name(match) if callable(name) else match.expand(name)), None
        return None, None


def _linear(match: re.Match) -> str:
    """Modules 0, 2 and 4 of an `nn.Sequential` with activations in between are linear_1, linear_2 and linear_3."""
    return f"model.multi_modal_projector.linear_{int(match['index']) // 2 + 1}.{match['kind']}"


_TEXT = r"model.language_model.\1"
_VISION = r"model.vision_tower.\1"
_BUFFERS = ((r".*\.rotary_emb\.inv_freq", BUFFER), (r".*embeddings\.position_ids", BUFFER))

# transformers: the names that it writes, the older ones on the Hub, and those in memory
LLAVA_HF = Layout(
    drops=_BUFFERS,
    renames=tuple((rf"{start}(.*)", rf"{name}\1") for start, name in KEY_MAPPING.items()),
)

# haotian-liu/LLaVA with its own projector or that of DeCo's authors, and its base: plain language models
ORIGINAL = Layout(
    drops=_BUFFERS,
    renames=(
        (r"model\.((?:embed_tokens|layers|norm)\..+)", _TEXT),
        (r"lm_head\.weight", "lm_head.weight"),
        (r"model\.image_newline", "model.image_newline"),
        (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", _VISION),
        (r"(?:model\.)?mm_projector\.(?:mlp_projector\.)?(?P<index>\d*[02468])\.(?P<kind>weight|bias)", _linear),
    ),
)

# a folder of a vision tower: CLIP or SigLIP, with or without their text halves, and DINOv2
VISION_TOWER = Layout(
    drops=(*_BUFFERS, (r"(?:text_model|text_projection|visual_projection|logit_scale|logit_bias)\b.*", _OTHER_HALF)),
    renames=((r"(?:vision_model\.)?(.+)", _VISION),),
)


def layer_index(name: str, part: str) -> int | None:
    """The index of the layer that a parameter belongs to; `part` is "vision_tower" or "language_model"."""
    match = re.match(rf"model\.{part}\.(?:encoder\.)?layers?\.(\d+)\.", name)
    return int(match[1]) if match else None
