"""Rules that scale the learning rate from the base batch to the batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from largebatch.config.optimizer_libraries import TimmOptimizer
from largebatch.config.optimizers import OptimizerConfig
from largebatch.config.options import option


@dataclass
class LrScalingConfig:
    """Scaling rule and its options; ``docs/lr_scaling.md``."""

    rule: str = option("none", allowed=("none", "linear", "sqrt", "surge"))
    base_batch: int = option(256, least=1)
    noise_scale: float | None = option(None, above=0)  # surge: the gradient noise scale N in samples
    force: bool = False  # surge: allow optimizers that its theory doesn't cover

    def scaled(self, lr: float, batch_size: int) -> float:
        """Return the learning rate at ``batch_size`` B, from ``lr`` at the base batch b and the noise scale N.

        linear: ``lr * B / b``; sqrt: ``lr * sqrt(B / b)``. The surge rule (arXiv 2405.14578, theorem 3) is
        ``lr(B) = lr_max / (0.5 * (sqrt(N / B) + sqrt(B / N)))``. The given lr(b) cancels lr_max:
        ``lr(B) = lr(b) * sqrt(B / b) * (b + N) / (B + N)``.
        """
        base, noise = self.base_batch, self.noise_scale or 0.0
        factor = {
            "none": 1.0,
            "linear": batch_size / base,
            "sqrt": math.sqrt(batch_size / base),
            "surge": math.sqrt(batch_size / base) * (base + noise) / (batch_size + noise),
        }
        return lr * factor[self.rule]

    def problems(self, optimizer: OptimizerConfig) -> list[str]:
        """Return one line for each option that is missing, or doesn't fit the rule or the optimizer."""
        if self.rule != "surge":
            given = {"noise_scale": self.noise_scale, "force": self.force or None}
            return [
                f"lr_scaling.{key}={value}: only lr_scaling.rule=surge has this key. Fix: leave it out or set that rule"
                for key, value in given.items()
                if value is not None
            ]
        problems = []
        if self.noise_scale is None:
            problems.append(
                "lr_scaling.noise_scale=null: lr_scaling.rule=surge needs the gradient noise scale in samples. "
                "Fix: measure it as docs/lr_scaling.md explains"
            )
        if not self.force and (beyond := optimizer.beyond_surge()):
            problems.append(
                "lr_scaling.rule=surge: the surge rule covers sign-like updates such as Adam's; "
                f"{beyond} is not one. Allowed: {', '.join(TimmOptimizer.SIGN_LIKE)}, without amsgrad or centered. "
                "Fix: lr_scaling.rule=linear, sqrt or none, or lr_scaling.force=true to use the rule without its theory"
            )
        return problems
