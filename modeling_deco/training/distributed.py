# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes: work for the first of them alone, and a gradient that accelerate and TRL do not reduce."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor, Partial

from ..utils.errors import one_line
from .config import DecoSFTConfig


def on_first_process(training_args: DecoSFTConfig, function: Callable[..., Any], *args) -> Any:
    """Call a function on the first process alone. All processes get its result, or raise its error as a ValueError."""
    result = error = None
    if training_args.process_index == 0:
        try:
            result = function(*args)
        except (ValueError, OSError) as failure:
            error = one_line(failure)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise ValueError(error)
    return result


def reduce_head_gradient(model) -> None:
    """Average the gradient of `lm_head` over ranks under FSDP2, as FSDP does for every other parameter.

    accelerate (1.15) makes the head a unit of its own, and TRL (1.16) multiplies by its weight without calling the
    unit. The weight is then gathered outside of FSDP, and each rank's shard gets the gradient of that rank alone.
    """
    fused_forward = model.forward

    def gathered_head():
        head = type(model).get_output_embeddings(model)
        if not isinstance(head.weight, DTensor):
            return head
        placements = [Partial("avg")] * head.weight.device_mesh.ndim
        return SimpleNamespace(weight=head.weight.full_tensor(grad_placements=placements), bias=None)

    @functools.wraps(fused_forward)
    def forward(*args, **kwargs):
        model.get_output_embeddings = gathered_head
        try:
            return fused_forward(*args, **kwargs)
        finally:
            del model.get_output_embeddings

    model.forward = forward
