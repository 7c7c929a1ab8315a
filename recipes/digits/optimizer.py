"""Muon for matrices and AdamW for the rest, as one optimizer that a Trainer can schedule, save and resume."""

import torch


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` side by side.

    Args:
        muon_groups: parameter groups of matrices.
        adamw_groups: parameter groups of everything else.
        weight_decay: decoupled, on the matrices only.
    """

    def __init__(self, muon_groups: list[dict], adamw_groups: list[dict], weight_decay: float):
        self.parts = [
            torch.optim.Muon(muon_groups, weight_decay=weight_decay),
            torch.optim.AdamW(adamw_groups, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], defaults={})
        self._share_groups()

    def _share_groups(self) -> None:
        """A scheduler writes learning rates into `param_groups`: they must be the very groups of the two parts."""
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
