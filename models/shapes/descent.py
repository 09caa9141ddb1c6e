"""How weights are changed: Muon and AdamW on float32 copies of bfloat16 weights, shared by two processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ADAMW_RATE, MUON_RATE = 2e-3, 3e-3  # Muon at 8e-3 learns fast for 200 steps and then no more


@dataclass(frozen=True)
class Team:
    """The processes that train one model together."""

    rank: int = 0
    size: int = 1

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values


class Descent:
    """Trains modules in bfloat16; each step's rate is a share of the peak rates above.

    Matrices of layers are trained by Muon and everything else by AdamW. The optimizers work on float32 copies,
    because steps are smaller than the resolution of bfloat16.
    """

    def __init__(self, modules: Iterable[nn.Module], skip: Iterable[nn.Module] = (), team: Team | None = None) -> None:
        skipped = {id(parameter) for module in skip for parameter in module.parameters()}
        self.team = team or Team()
        self.groups: list[list[tuple[nn.Parameter, Tensor]]] = []  # clipped separately
        muon, adamw = [], []
        for module in modules:
            group = []
            for name, parameter in module.named_parameters():
                if id(parameter) in skipped:
                    continue
                master = parameter.detach().clone().float()
                group.append((parameter, master))
                (muon if "layers." in name and parameter.ndim == 2 else adamw).append(master)
            self.groups.append(group)
            module.bfloat16()
            for part in module.modules():
                if "RotaryEmbedding" in type(part).__name__:
                    part.float()  # positions need more digits
        self.optimizers = [torch.optim.AdamW(adamw, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.01)]
        self.optimizers.append(torch.optim.Muon(muon, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))

    def step(self, loss: Tensor, share: float) -> None:
        """Take one step downhill on the mean loss of the team."""
        pairs = [pair for group in self.groups for pair in group]
        for parameter, _ in pairs:
            parameter.grad = None
        loss.backward()
        flat = self.team.mean(torch.cat([parameter.grad.float().flatten() for parameter, _ in pairs]))
        for (_, master), grad in zip(pairs, flat.split([master.numel() for _, master in pairs]), strict=True):
            master.grad = grad.view_as(master)
        for group in self.groups:
            nn.utils.clip_grad_norm_([master for _, master in group], 1.0)
        for optimizer, peak in zip(self.optimizers, (ADAMW_RATE, MUON_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
        with torch.no_grad():
            for parameter, master in pairs:
                parameter.copy_(master)

    def state(self) -> dict[str, Any]:
        """Return what `load` needs to continue: the weights in float32 and the optimizers' memory."""
        masters = [[master for _, master in group] for group in self.groups]
        return {"masters": masters, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with the same modules."""
        with torch.no_grad():
            for group, masters in zip(self.groups, state["masters"], strict=True):
                for (parameter, master), kept in zip(group, masters, strict=True):
                    master.copy_(kept)
                    parameter.copy_(kept)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)

    def finish(self) -> None:
        """Give the modules their float32 weights."""
        for group in self.groups:
            for parameter, master in group:
                parameter.data = master.detach()
