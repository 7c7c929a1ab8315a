# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What an answer costs, as measured."""

import time
from types import SimpleNamespace

import pytest
import torch

from modeling_deco.costs import peak_gpu_memory, prefill_seconds, reset_peak_gpu_memory


class Sleeper:
    """A model whose prefills take the given seconds, one after the other."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def __call__(self, **inputs):
        time.sleep(self.seconds.pop(0))
        return SimpleNamespace(logits=torch.zeros(1, 1, 8))


def test_the_median_does_not_follow_a_slow_beginning():
    assert 0.02 <= prefill_seconds(Sleeper(0.6, 0.02, 0.02), {}, repeats=3) < 0.15


def test_a_slow_prefill_is_measured_once():
    assert prefill_seconds(Sleeper(0.3), {}, repeats=5, max_seconds=0.2) >= 0.3


def test_the_prefill_builds_no_graph_and_one_row_of_logits(model, processor):
    seen = []
    hook = model.register_forward_hook(lambda module, arguments, output: seen.append(output.logits))
    inputs = processor(text="what is in the picture", return_tensors="pt")
    try:
        assert prefill_seconds(model, inputs, repeats=2) > 0
    finally:
        hook.remove()
    assert [logits.shape[1] for logits in seen] == [1, 1]
    assert not any(logits.requires_grad for logits in seen)


@pytest.mark.gpu
def test_peak_gpu_memory_counts_from_its_reset():
    torch.ones(2**28, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    reset_peak_gpu_memory()
    before = peak_gpu_memory()
    torch.ones(2**26, dtype=torch.uint8, device="cuda")
    assert peak_gpu_memory() - before == 2**26
