"""Options of each optimizer, with their defaults and limits.

``target`` names the optimizer's class. Each option has the name and the default of a keyword argument of that class; a
test compares them. To add an optimizer, add its dataclass here and to ``OPTIMIZERS``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from largebatch.config.options import option

if TYPE_CHECKING:
    from largebatch.config.schema import Config


_LEARNING_RATES = ("name", "lr", "lr_1d", "lr_1d_ratio")  # no keyword arguments of a class


@dataclass
class OptimizerConfig:
    """Options of every optimizer.

    ``target`` is the optimizer's class and ``label`` its name in reports. ``sign_like`` is True if the update is a
    gradient over its own recent size, or a sign. The theory of ``lr_scaling.rule=surge`` covers only such updates.
    """

    target: ClassVar[str] = ""
    label: ClassVar[str] = ""
    sign_like: ClassVar[bool] = False
    head_options: ClassVar[dict[str, Any]] = {}  # of the classifier's weights, as a parameter group

    name: str = MISSING
    lr: float = option(MISSING, above=0)  # learning rate; with a scaling rule, at lr_scaling.base_batch
    # Learning rate of biases and norm parameters: lr_1d, or else lr * lr_1d_ratio. Both None: lr.
    lr_1d: float | None = option(None, least=0)
    lr_1d_ratio: float | None = option(None, least=0)

    def __post_init__(self) -> None:
        if self.lr_1d is not None:  # takes the place of a preset's ratio
            self.lr_1d_ratio = None

    def arguments(self, batch_size: int, steps_per_epoch: float, steps: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of the class, without parameters and learning rates.

        Args:
            batch_size: global batch size.
            steps_per_epoch: optimizer steps per epoch, maybe a fraction.
            steps: optimizer steps of the training that this optimizer does.
        """
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _LEARNING_RATES}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}

    @property
    def samples_together(self) -> int:
        """Number of samples that must be in one micro-batch. Divides the micro-batch."""
        return 1

    def learning_rate_1d(self) -> float | None:
        """Return the learning rate of biases and norm parameters, or None if it is ``lr``."""
        if self.lr_1d is None and self.lr_1d_ratio is not None:
            return self.lr * self.lr_1d_ratio
        return self.lr_1d

    def beyond_surge(self) -> str:
        """Return the optimizer and its unsuitable option if the surge rule doesn't cover it, else an empty string."""
        return "" if self.sign_like else self.name

    def problems(self, config: Config) -> list[str]:
        """Return one line for each conflict between options, or with the rest of the configuration."""
        return []

    def two_averages(self, config: Config) -> str:
        """Return the problem of ``ema_decay`` with an optimizer that averages the weights itself."""
        return (
            f"ema_decay={config.ema_decay:g}: the optimizer {self.name} averages the weights itself. "
            "Fix: ema_decay=null, or another optimizer"
        )


@dataclass
class Lars(OptimizerConfig):
    """LARS (arXiv 1708.03888)."""

    target = "largebatch.optim.lars:LARS"
    label = "LARS"
    denominators: ClassVar[tuple[str, str]] = ("norm_of_sum", "sum_of_norms")

    weight_decay: float = option(0.0, least=0)
    momentum: float = option(0.9, least=0, below=1)
    nesterov: bool = False
    trust_coefficient: float = option(1e-3, above=0)
    denominator: str = option("norm_of_sum", allowed=denominators)  # ||g + wd*w|| or ||g|| + wd*||w||
    eps: float = option(0.0, least=0)
    adapt_1d: bool = False  # scale biases and norm parameters layer-wise too
    decay_1d: bool = False  # decay them too
    norm_clip: float | None = option(None, above=0, switch=True)  # upper bound of the norms in the trust ratio
    max_ratio: float | None = option(None, above=0, switch=True)  # upper bound of the trust ratio itself
    larc: bool = False  # divide the trust ratio by lr before max_ratio clips it
    lr_in_momentum: bool = False  # keep the learning rate inside the momentum buffer

    def problems(self, config: Config) -> list[str]:
        problems = super().problems(config) + _nesterov_problems(self.nesterov, self.momentum)
        if self.larc and self.max_ratio is None:
            problems.append("optimizer.larc=true: needs optimizer.max_ratio. Fix: optimizer.max_ratio=1, as in LARC")
        return problems


@dataclass
class Tvlars(Lars):
    """TVLARS (arXiv 2309.14053)."""

    target = "largebatch.optim.tvlars:TVLARS"
    label = "TVLARS"

    # Steepness of phi's decay: per optimizer step, or for a training of any length, lmbda * steps. Both None: 10 for
    # the training, in which phi falls from its start to its floor.
    lmbda: float | None = option(None, least=0)
    lmbda_relative: float | None = option(None, least=0)
    alpha: float = option(1.0, least=0)  # phi starts near 1/alpha
    delay_epochs: float = option(0.0, least=0)  # epochs until phi reaches its midpoint
    gamma_min: int | float | str = option(0.0, least=0, words=("auto",))  # floor of phi; auto: 0.001 * batch_size / 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gamma_min, int):  # 0 and 0.0 must be the same run
            self.gamma_min = float(self.gamma_min)
        if self.lmbda is None and self.lmbda_relative is None:
            self.lmbda_relative = 10.0

    def arguments(self, batch_size: int, steps_per_epoch: float, steps: int = 0) -> dict[str, Any]:
        options = super().arguments(batch_size, steps_per_epoch)
        relative = options.pop("lmbda_relative")
        if relative is not None:
            options["lmbda"] = relative / max(steps, 1)
        options["delay"] = round(options.pop("delay_epochs") * steps_per_epoch)
        if self.gamma_min == "auto":
            options["gamma_min"] = 0.001 * batch_size / 256
        return options

    def problems(self, config: Config) -> list[str]:
        if self.lmbda is None or self.lmbda_relative is None:
            return super().problems(config)
        return [
            *super().problems(config),
            f"optimizer.lmbda={self.lmbda:g} and optimizer.lmbda_relative={self.lmbda_relative:g}: only one may be "
            "set. Fix: leave one out, or set it to null if a preset sets it",
        ]


@dataclass
class Measured(OptimizerConfig):
    """Options of optimizers for which the training loop measures the gradients of groups of samples."""

    sample_size: int = option(1, least=1)  # samples per measured gradient, which is their mean gradient

    def arguments(self, batch_size: int, steps_per_epoch: float, steps: int = 0) -> dict[str, Any]:
        options = super().arguments(batch_size, steps_per_epoch, steps)
        del options["sample_size"]  # the training loop measures the gradients
        return options

    @property
    def samples_together(self) -> int:
        return self.sample_size

    def problems(self, config: Config) -> list[str]:
        problems = super().problems(config)
        if config.compile is True:
            problems.append(
                f"compile=true: {self.name} measures gradients with hooks, which compiled passes skip. "
                "Fix: compile=false"
            )
        if config.mode.views > 1 and not config.mode.loss_over_global_batch:
            problems.append(
                f"mode.exact=false: {self.name} measures the gradients of samples, but one backward pass then has two "
                "views of each sample. Fix: mode.exact=true"
            )
        return problems


@dataclass
class Clars(Measured, Lars):
    """CLARS (arXiv 2002.01576)."""

    target = "largebatch.optim.clars:CLARS"
    label = "CLARS"
    denominators = ("sample_norms", "sum_of_norms")

    denominator: str = option("sample_norms", allowed=denominators)  # sum_of_norms adds wd*||w||


@dataclass
class VrLars(Measured, Lars):
    """VR-LARS (arXiv 2309.13681)."""

    target = "largebatch.optim.vrgd:VRLARS"
    label = "VR-LARS"

    gsnr_min: float = option(0.1, least=0, below=1)  # least factor of an element of the gradient


@dataclass
class Lamb(OptimizerConfig):
    """LAMB (arXiv 1904.00962)."""

    target = "largebatch.optim.lamb:LAMB"
    label = "LAMB"

    weight_decay: float = option(0.01, least=0)
    betas: list[float] = option([0.9, 0.999], least=0, below=1, length=2)
    eps: float = option(1e-6, least=0)
    bias_correction: bool = True
    adapt_1d: bool = False  # scale biases and norm parameters layer-wise too
    decay_1d: bool = False  # decay them too
    norm_clip: float | None = option(None, above=0, switch=True)  # upper bound of the norms in the trust ratio
    max_ratio: float | None = option(None, above=0, switch=True)  # upper bound of the trust ratio itself


@dataclass
class VrLamb(Measured, Lamb):
    """VR-LAMB (arXiv 2309.13681)."""

    target = "largebatch.optim.vrgd:VRLAMB"
    label = "VR-LAMB"

    gsnr_min: float = option(0.1, least=0, below=1)  # least factor of an element of the gradient
    gsnr_beta: float = option(0.9, least=0, below=1)  # decay of the mean of these factors


@dataclass
class Merit(Lamb):
    """MERIT (arXiv 2508.20577)."""

    target = "largebatch.optim.merit:MERIT"
    label = "MERIT"

    bias_correction: bool = False
    update_clip: float | None = option(1.0, above=0, switch=True)  # limit of an element of a layer's scaled direction


@dataclass
class Muon(OptimizerConfig):
    """Muon, with AdamW for the classifier, biases and norm parameters."""

    target = "largebatch.optim.muon:Muon"
    label = "Muon"
    head_options: ClassVar[dict[str, Any]] = {"orthogonal": False}

    weight_decay: float = option(0.1, least=0)
    momentum: float = option(0.95, least=0, below=1)
    nesterov: bool = True
    # Scale of an orthogonal [m, n]: 0.2 * sqrt(max(m, n)), which has the size of AdamW's steps, or sqrt(max(1, m / n)).
    adjust_lr_fn: str = option("match_rms_adamw", allowed=("match_rms_adamw", "original"))
    betas: list[float] = option([0.9, 0.95], least=0, below=1, length=2)  # AdamW's
    eps: float = option(1e-8, least=0)  # AdamW's


@dataclass
class AdaMuon(Muon):
    """AdaMuon (arXiv 2507.11005)."""

    target = "largebatch.optim.muon:AdaMuon"
    label = "AdaMuon"

    adjust_lr_fn: str = option("match_rms_adamw", allowed=("match_rms_adamw",))


@dataclass
class RotationalLion(OptimizerConfig):
    """Rotational Lion (arXiv 2305.17212), of which LionAR (arXiv 2410.23922) is a variant."""

    target = "largebatch.optim.rotational:RotationalLion"
    label = "Rotational Lion"

    weight_decay: float = option(1.0, above=0)  # sets, with lr, the angle of a step
    betas: list[float] = option([0.9, 0.99], least=0, below=1, length=2)
    norm_beta: float = option(0.9, least=0, below=1)  # decay of the mean square of the directions' norms
    zero_mean: bool = True  # keep the mean of a neuron's weights at 0
    eps: float = option(1e-8, least=0)


@dataclass
class Sgd(OptimizerConfig):
    target = "torch.optim:SGD"
    label = "SGD"

    weight_decay: float = option(0.0, least=0)
    momentum: float = option(0.0, least=0, below=1)
    nesterov: bool = False

    def problems(self, config: Config) -> list[str]:
        return super().problems(config) + _nesterov_problems(self.nesterov, self.momentum)


@dataclass
class Adam(OptimizerConfig):
    target = "torch.optim:Adam"
    label = "Adam"
    sign_like = True

    weight_decay: float = option(0.0, least=0)
    betas: list[float] = option([0.9, 0.999], least=0, below=1, length=2)
    eps: float = option(1e-8, least=0)
    amsgrad: bool = False

    def beyond_surge(self) -> str:
        return f"{self.name} with amsgrad" if self.amsgrad else ""


@dataclass
class AdamW(Adam):
    target = "torch.optim:AdamW"
    label = "AdamW"

    weight_decay: float = option(0.01, least=0)


@dataclass
class Adagrad(OptimizerConfig):
    target = "torch.optim:Adagrad"
    label = "Adagrad"

    weight_decay: float = option(0.0, least=0)
    eps: float = option(1e-10, least=0)
    lr_decay: float = option(0.0, least=0)


@dataclass
class RmsProp(OptimizerConfig):
    target = "torch.optim:RMSprop"
    label = "RMSprop"
    sign_like = True

    weight_decay: float = option(0.0, least=0)
    momentum: float = option(0.0, least=0, below=1)
    alpha: float = option(0.99, least=0)  # smoothing constant of the squared gradient
    eps: float = option(1e-8, least=0)
    centered: bool = False

    def beyond_surge(self) -> str:
        return f"{self.name} with centered" if self.centered else ""


def _nesterov_problems(nesterov: bool, momentum: float) -> list[str]:
    return ["optimizer.nesterov=true: needs optimizer.momentum above 0"] if nesterov and not momentum else []


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "lars": Lars,
    "lamb": Lamb,
    "tvlars": Tvlars,
    "clars": Clars,
    "vrlars": VrLars,
    "vrlamb": VrLamb,
    "merit": Merit,
    "muon": Muon,
    "adamuon": AdaMuon,
    "rotational_lion": RotationalLion,
    "sgd": Sgd,
    "adamw": AdamW,
    "adam": Adam,
    "adagrad": Adagrad,
    "rmsprop": RmsProp,
}
