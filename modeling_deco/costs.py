# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What an answer costs, measured: time before its first word, and memory of GPUs."""

import statistics
import time

import torch


@torch.inference_mode()
def prefill_seconds(model, inputs, repeats: int = 5, max_seconds: float = 1.0) -> float:
    """Median time from pixels and token ids to the first token's logits: vision tower, projector, language model.

    Args:
        model: a `DecoForConditionalGeneration` that has been run before, so that it is warm.
        inputs: what its processor returns, on the model's device.
        repeats: measurements.
        max_seconds: seconds after which no further one begins; a slow prefill is measured once.
    """
    seconds = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < max_seconds):
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1).logits.cpu()  # a copy waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def reset_peak_gpu_memory() -> None:
    """Let `peak_gpu_memory` count from now on."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def peak_gpu_memory() -> int:
    """Bytes that tensors took at their most, weights included, summed over GPUs."""
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
