"""RotationalAdamW the way it was published (epfml/REQ; paper, algorithm 1): a loop over tensors, many passes each."""

from __future__ import annotations

import math
from typing import Any

import torch


class PublishedRotationalAdamW(torch.optim.Optimizer):
    """Rows of matrices rotate; other tensors take AdamW's update. For timing: zero rows become NaN, as published."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                state, rotates = self.state[p], p.ndim > 1
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                    if rotates:
                        state["norm"] = p.norm(dim=1, keepdim=True)
                        state["nu"] = torch.zeros_like(state["norm"])
                state["step"] += 1
                step = state["step"]
                state["m"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean, square = state["m"] / (1 - beta1**step), state["v"] / (1 - beta2**step)
                update = mean / (square.sqrt() + 1e-8)
                if not rotates:
                    p.mul_(1 - lr * decay).sub_(lr * update)
                    continue
                norm = state["norm"]
                update = update - p * (update * p).sum(dim=1, keepdim=True) / norm**2
                state["nu"].mul_(0.9).add_(0.1 * update.square().sum(dim=1, keepdim=True))
                size = (state["nu"] / (1 - 0.9**step)).sqrt() + 1e-8
                angle = math.sqrt(2 * lr * decay * (1 - beta1) / (1 + beta1))
                p.sub_(angle * norm * update / size)
                p.mul_(norm / p.norm(dim=1, keepdim=True))
