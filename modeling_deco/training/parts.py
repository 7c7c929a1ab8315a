# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of a DeCo, by the names of their parameters."""

PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def part_of(parameter_name: str) -> str:
    """The part of `PARTS` that a parameter belongs to. An adapter belongs to the part that it adapts. The newline of
    images belongs to the projector, with which it is trained."""
    names = parameter_name.split(".")
    if "image_newline" in names:
        return "multi_modal_projector"
    return next((part for part in PARTS[:2] if part in names), "language_model")
