# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What an answer costs, measured: time before its first word, and memory of GPUs."""

import time

import torch
from transformers import PreTrainedModel


class PrefillClock:
    """Measures the prefill of an answer by hooks: the first forward pass of a model in a `with` block.

    Attributes:
        seconds: from the pass's inputs to the first token's logits; 0 before they are there.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.seconds = 0.0
        self._start = None

    def __enter__(self):
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._hooks = [before, self.model.register_forward_hook(self._after)]
        return self

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()

    def _before(self, model, args, kwargs):
        if self._start is None:
            self._start = now(kwargs["input_ids"])

    def _after(self, model, args, output):
        if self.seconds == 0:
            self.seconds = now(output.logits) - self._start


def now(tensor: torch.Tensor) -> float:
    """`time.perf_counter`, after the device of a tensor has finished its work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def reset_peak_gpu_memory() -> None:
    """Let `peak_gpu_memory` count from now on."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def peak_gpu_memory() -> int:
    """Bytes that tensors took at their most, weights included, summed over GPUs."""
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
