"""Sign descent with momentum, also called Signum (arXiv 1802.04434)."""

import torch


class SignMomentum(torch.optim.Optimizer):
    """``m = beta * m + (1 - beta) * g``, then ``w = (1 - lr * weight_decay) * w - lr * sign(m)``."""

    def __init__(self, params, lr=0.003, beta=0.9, weight_decay=0.0):
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), not {beta}")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(momentum.sign(), alpha=group["lr"])
