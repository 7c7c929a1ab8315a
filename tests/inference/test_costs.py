# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""What an answer costs, as measured."""

import pytest
import torch

from modeling_deco.inference import costs
from modeling_deco.inference.costs import peak_gpu_memory, reset_peak_gpu_memory


def test_the_first_forward_pass_in_the_block_is_measured(model, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    hook = model.lm_head.register_forward_hook(lambda *call: clock.insert(0, clock[0] + 2.0))
    inputs = {"input_ids": torch.tensor([[1, 5, 6]])}
    model(**inputs)
    with costs.PrefillClock(model) as prefill:
        assert prefill.seconds == 0
        clock.insert(0, clock[0] + 5.0)
        model(**inputs)
        model(**inputs)
    hook.remove()
    model(**inputs)
    assert prefill.seconds == 2.0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.gpu
def test_peak_gpu_memory_counts_from_its_reset():
    torch.ones(2**28, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    reset_peak_gpu_memory()
    before = peak_gpu_memory()
    torch.ones(2**26, dtype=torch.uint8, device="cuda")
    assert peak_gpu_memory() - before == 2**26
