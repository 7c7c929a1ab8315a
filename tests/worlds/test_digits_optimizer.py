# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Muon equals torch's, and the joint optimizer resumes exactly."""

import copy

import pytest
import torch

from modeling_deco.worlds.digits.optimizer import Muon, MuonAdamW


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_muon_is_torchs_but_for_the_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    convolution = torch.nn.Parameter(start.clone()[..., None, None])
    optimizers = [
        torch.optim.Muon([parameters[0]], lr=0.02, weight_decay=0.1),
        Muon([parameters[1], convolution], lr=0.02, weight_decay=0.1),
    ]
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        for parameter in (*parameters, convolution):
            parameter.grad = gradient.view_as(parameter).clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (parameters[0] - start).norm()
    assert (parameters[0] - parameters[1]).norm() < 0.02 * moved  # torch's is in bfloat16
    assert torch.equal(convolution[..., 0, 0], parameters[1])


def test_optimizer_resumes_exactly():
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        return layer, MuonAdamW([{"params": [layer.weight], "lr": 0.1}], [{"params": [layer.bias], "lr": 0.1}], 0.0)

    def step(layer, optimizer, value):
        layer(torch.full((2, 4), value)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = make()
    step(layer, optimizer, 1.0)
    weights, state = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))  # as from a file
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(state)
    resumed_optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.05  # as a scheduler does
    step(layer, optimizer, 2.0)
    step(resumed, resumed_optimizer, 2.0)
    assert torch.equal(layer.weight, resumed.weight)
    assert torch.equal(layer.bias, resumed.bias)
