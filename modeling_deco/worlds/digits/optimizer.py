# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Muon for matrices and AdamW for the rest, as one optimizer that the Trainer can schedule, save and resume."""

import torch


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon), with two differences from `torch.optim.Muon`.

    It also takes 1 x 1 convolutions, which are matrices. On a CPU it iterates in float32: torch's version always uses
    bfloat16, which is slow on CPUs without instructions for it.

    Args:
        params: matrices and 1 x 1 convolutions, or groups of them.
        lr, weight_decay, momentum: as in `torch.optim.Muon`.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov's
                update = orthogonalize(update.flatten(1)).view_as(parameter)
                rows, cols = parameter.shape[:2]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)
        return loss


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values close to 1 by five Newton-Schulz steps with Muon's coefficients."""
    a, b, c = 3.4445, -4.775, 2.0315
    update = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    is_tall = matrix.shape[0] > matrix.shape[1]
    update = update.T if is_tall else update
    update = update / update.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = update @ update.T
        update = torch.addmm(update, torch.addmm(gram, gram, gram, beta=b, alpha=c), update, beta=a)
    return (update.T if is_tall else update).to(matrix.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """`Muon` and `torch.optim.AdamW` as one optimizer.

    Args:
        muon_groups: parameter groups of matrices and 1 x 1 convolutions.
        adamw_groups: parameter groups of everything else.
        weight_decay: decoupled; only on the matrices.
    """

    def __init__(self, muon_groups: list[dict], adamw_groups: list[dict], weight_decay: float):
        self.parts = [
            Muon(muon_groups, weight_decay=weight_decay),
            torch.optim.AdamW(adamw_groups, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], defaults={})
        self._share_groups()

    def _share_groups(self) -> None:
        """Use the two parts' own groups as `param_groups`: a scheduler writes learning rates into them."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
