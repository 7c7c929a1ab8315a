# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The state of a training loop in a file, from which a killed run goes on."""

import logging
from pathlib import Path
from typing import Any

import torch

from ..utils.staging import staged_file

logger = logging.getLogger(__name__)


def save_state(path: Path, step: int, parts: dict[str, Any]) -> None:
    """Write the state dicts of `parts`. An interrupted write keeps the last complete state."""
    state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
    with staged_file(path) as incomplete:
        torch.save(state, incomplete)


def load_state(path: Path, parts: dict[str, Any]) -> int:
    """Load the state dicts of `parts`, if the file exists. Returns the step, or 0."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("resuming from %s at step %d", path, state["step"])
    return state["step"]
