# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of parameters in LLaVA's checkpoint layouts, and DeCo's names for them.

Each layout is a table: keys that are left behind (pattern, reason), and keys that are renamed (pattern, DeCo's name).
Patterns match whole keys, and a key that no line matches is unknown.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

BUFFER = "a buffer, computed from the config"
COPIED_TOWER = "of a frozen vision tower: the one that the config names is taken, as by the original code"
TIED = "tied to the embeddings"
UNUSED_HEAD = "the vision tower's attention pooling, which is not read"
UNUSED_LAYER = "above the vision layer that is read"
_OTHER_HALF = "not a part of the vision tower"


@dataclass(frozen=True)
class Layout:
    drops: tuple[tuple[str, str], ...]
    renames: tuple[tuple[str, str | Callable[[re.Match], str]], ...]

    def rename(self, key: str) -> tuple[str | None, str | None]:
        """`(DeCo's name, None)`, or `(None, reason)` for a key that is left behind, or `(None, None)` for an unknown
        one."""
        for pattern, reason in self.drops:
            if re.fullmatch(pattern, key):
                return None, reason
        for pattern, name in self.renames:
            if match := re.fullmatch(pattern, key):
                return (name(match) if callable(name) else match.expand(name)), None
        return None, None


def _linear(match: re.Match) -> str:
    """Members 0, 2, 4 of an `nn.Sequential` with activations between are linear_1, linear_2, linear_3."""
    return f"model.multi_modal_projector.linear_{int(match['index']) // 2 + 1}.{match['kind']}"


_TEXT = r"model.language_model.\1"
_VISION = r"model.vision_tower.\1"
_BUFFERS = ((r".*\.rotary_emb\.inv_freq", BUFFER), (r".*embeddings\.position_ids", BUFFER))

# transformers: what it writes, what the Hub has from before version 5, and the names in memory
LLAVA_HF = Layout(
    drops=_BUFFERS,
    renames=(
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", _VISION),
        (r"(?:model\.)?multi_modal_projector\.(.+)", r"model.multi_modal_projector.\1"),
        (r"(?:language_model\.model|model\.language_model)\.(.+)", _TEXT),
        (r"(?:language_model\.)?lm_head\.weight", "lm_head.weight"),
    ),
)

# haotian-liu/LLaVA with its own projector or the DeCo authors', and plain language models, its base
ORIGINAL = Layout(
    drops=_BUFFERS,
    renames=(
        (r"model\.((?:embed_tokens|layers|norm)\..+)", _TEXT),
        (r"lm_head\.weight", "lm_head.weight"),
        (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", _VISION),
        (r"(?:model\.)?mm_projector\.(?:mlp_projector\.)?(?P<index>\d*[02468])\.(?P<kind>weight|bias)", _linear),
    ),
)

# a vision tower's own folder: CLIP or SigLIP with or without their text halves, DINOv2
VISION_TOWER = Layout(
    drops=(*_BUFFERS, (r"(?:text_model|text_projection|visual_projection|logit_scale|logit_bias)\b.*", _OTHER_HALF)),
    renames=((r"(?:vision_model\.)?(.+)", _VISION),),
)


def layer_index(name: str, part: str) -> int | None:
    """Index of the layer of `part`, "vision_tower" or "language_model", that a parameter by DeCo's name belongs to."""
    match = re.match(rf"model\.{part}\.(?:encoder\.)?layers?\.(\d+)\.", name)
    return int(match[1]) if match else None
