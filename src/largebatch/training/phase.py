"""Main training of a run: gradient, update and metrics of each optimizer step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from largebatch.config.epochs import planned_steps
from largebatch.machine import distributed
from largebatch.machine.memory import is_out_of_memory
from largebatch.machine.pulse import progressed
from largebatch.optim import TVLARS
from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.optim.measured import MeasuredOptimizer
from largebatch.runs.metrics import Row
from largebatch.seeding import derive_seed
from largebatch.tracking.layers import plain_statistics, update_ratios
from largebatch.tracking.recorder import Recorder
from largebatch.tracking.rows import Layer, has_layer_row, has_metrics_row
from largebatch.training.curvature import measured_sharpness
from largebatch.training.evaluation import classified, metrics_of_images, recorded_metrics
from largebatch.training.facts import Facts
from largebatch.training.graphs import Function, Tensors
from largebatch.training.micro_batch import release_memory, smaller_micro_batch
from largebatch.training.optimization import seed_step
from largebatch.training.profile import Profile
from largebatch.training.state import Run, Training

Batches = Iterator[tuple[Tensor, Tensor]]
_HALF_EVERY = 25  # steps between measurements of the noise scale that need half a step of their own


class MainPhase:
    """Training with the mode's loss, from step 0 to ``run.steps``.

    ``loop`` takes the steps. When memory runs out, ``run`` is replaced by a run with smaller micro-batches.

    Args:
        mode: module of ``largebatch.modes``.

    Attributes:
        start, end: numbers of optimizer steps done at the start and at the end of the phase.
        total_steps: number of the run's last optimizer step, over all phases.
        grew: True if the present step let the next batch grow.
    """

    start = 0
    grew = False

    def __init__(self, run: Run, training: Training, mode: ModuleType) -> None:
        self.run, self.training, self.mode = run, training, mode
        self.epochs = run.epochs
        folder = run.folder.profile if run.config.profile and run.rank == 0 else None
        self.profile = Profile(folder, run.device)
        self.end = self.total_steps = run.steps

    def load(self, saved: dict[str, Any], rank: int) -> None:
        """Continue from the checkpoint ``saved``."""
        self.training.load(saved, rank)
        if self.training.growing:
            self.end = self.total_steps = planned_steps(self.run.config, self.epochs)

    def following(self) -> MainPhase | None:
        """Return the next phase, if any."""
        return None

    def batches(self) -> Generator[tuple[Tensor, Tensor]]:
        """Yield this process's micro-batches after optimizer step ``training.step``."""
        run = self.run
        return run.loader.train(
            run.data.train, run.epochs, run.batch, run.config.seed, self.training.step, run.config.mode.views,
            passes=2 if run.exact else 1, mixing=run.config.mode.mixing, classes=run.data.num_classes,
        )  # fmt: skip

    def gradient(self, batches: Batches) -> Tensor | None:
        """Compute the gradient of the mean loss over a global batch, and keep the mode's totals of the step.

        Returns:
            True if every loss was finite, as a bool tensor on the device, because reading it waits for the device. None
            if any process ran out of memory. Then only ``run`` has changed: it has smaller micro-batches.
        """
        done = self._gradient(batches)
        if done is None:
            return None
        totals, finite = done
        self._end_noise()
        self.grew = self._tests and self._test()
        self.training.unlogged.add(self.position(self.training.step) | self.learning_rates(), totals)
        return finite

    def _gradient(self, batches: Batches) -> tuple[Tensor, Tensor] | None:
        """Compute the gradient. Return the result of ``_forward_backward``, or None after smaller micro-batches."""
        run, training = self.run, self.training
        torch.manual_seed(derive_seed(run.config.seed, "step", training.step, run.rank))  # for dropout; needs no saving
        if not run.within_memory:
            result = self._forward_backward(batches)
            if run.averages_afterwards or self._uneven:
                distributed.average_gradients(training.model)
            return result
        buffers = list(training.model.buffers())
        before = [tensor.clone() for tensor in buffers]
        done = None
        try:
            done = self._forward_backward(batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if not distributed.any_process(done is None):
            # Not during the backward pass, as in DDP: there, processes would wait for one that is out of memory.
            distributed.average_gradients(training.model)
            return done
        training.optimizer.zero_grad(set_to_none=True)
        if training.norms is not None:
            training.norms.forget()
        for tensor, saved in zip(buffers, before, strict=True):
            tensor.copy_(saved)
        release_memory(run.device)
        self.run = run.with_micro_batch(smaller_micro_batch(run.batch))
        return None

    @property
    def _images(self) -> int:
        """Number of images in the global batch of the present step."""
        return self.epochs.size(self.training.step - 1)

    @property
    def _smaller(self) -> bool:
        """True for a smaller last batch of an epoch, and for the first batches of ``batch_schedule``."""
        return self._images < self.run.batch.global_batch

    @property
    def _uneven(self) -> bool:
        """True for a batch that isn't divided into equal micro-batches of the usual size, as many in each process.

        It takes the uncompiled network, because another shape would compile again. Processes have unequal parts of it,
        maybe none, so gradients are averaged afterwards.
        """
        batch = self.run.batch
        return self._images % (batch.micro_batch * batch.processes) > 0

    def _forward_backward(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Add the gradient over its share of the batch.

        Returns:
            The mode's totals, float64 of shape [mode.TOTALS], and True if every loss is finite; both on the device.
        """
        run, training, replica = self.run, self.training, self.training.replica
        replica.train()
        totals = torch.zeros(self.mode.TOTALS, dtype=torch.float64, device=run.device)
        finite = torch.ones((), dtype=torch.bool, device=run.device)
        passes = len(run.batch.pieces(run.rank, self._images))
        training.statistics.begin(run.batch.groups(self._images))
        if not passes and training.norms is not None:
            training.norms.without_samples()
        noise, alone = training.noise, run.batch.micro_batch == run.batch.global_batch
        if noise is not None:
            noise.begin(active=not alone and not self._uneven and (run.config.instruments.noise_scale or self._tests))
        for number in range(1, passes + 1):
            with self.profile.phase("data"):
                images, labels = progressed(next(batches))
            more = number < passes or self._uneven  # DDP averages gradients only in the last pass of an even batch
            with replica.no_sync() if more and isinstance(replica, DistributedDataParallel) else nullcontext():
                if noise is not None and alone and self._measures_half:
                    noise.add(noise.of_loss(partial(self._half_loss, images, labels)))
                    if training.norms is not None:
                        training.norms.forget()
                counted, is_finite, *squares = self._call(self._pass, images, labels)
            if noise is not None and noise.active and squares:  # a CUDA graph returns what it returned at first
                noise.add(*squares)
            training.statistics.after_pass()
            totals += counted
            finite &= is_finite
        training.statistics.end()
        return totals, finite

    def _call(self, function: Function, *inputs: Tensor) -> Tensors:
        """Call ``function``, if possible as a CUDA graph; a smaller last batch has other shapes."""
        return function(*inputs) if self._uneven else self.training.graphs(function, *inputs)

    def _pass(self, images: Tensor, labels: Tensor) -> Tensors:
        """Add the gradient of a micro-batch.

        Returns:
            The mode's totals; True if its loss is finite; and with ``instruments.noise_scale`` squared norms.
        """
        run, training = self.run, self.training
        network = training.replica if self._uneven else training.network
        with self.profile.phase("forward"), run.autocast:
            loss, counted = self.mode.loss(run.config, network, images, labels)
        with self.profile.phase("backward"):  # divided by the number of passes if the batch is even
            mean = loss / (self._images / (run.processes * max(len(labels), 1)))
            torch.autograd.backward(training.loss_scale.scaled(mean))
        return counted, loss.detach().isfinite(), *(training.noise.of_pass() if training.noise else ())

    @property
    def _measures_half(self) -> bool:
        """True if this step measures the noise scale by a pass over half of its batch."""
        return self.training.step % _HALF_EVERY == 1 and self._images > 1 and not self._smaller

    def _half_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scaled mean loss over the first half of a batch, by the uncompiled network."""
        run, training, half = self.run, self.training, len(labels) // 2
        views = images.chunk(run.config.mode.views)
        with run.autocast:
            images = torch.cat([view[:half] for view in views])
            loss, _ = self.mode.loss(run.config, training.replica, images, labels[:half])
        return training.loss_scale.scaled(loss)

    def _end_noise(self) -> None:
        """Add the step to the noise scale, with the gradient of the whole batch in the parameters."""
        batch, training = self.run.batch, self.training
        if training.noise is not None:
            small, factor = batch.micro_batch, self._images / (batch.micro_batch * batch.processes**2)
            if small == batch.global_batch:
                small, factor = small // 2, 1.0
            training.noise.end(small, self._images, factor, training.loss_scale.value)

    @property
    def _tests(self) -> bool:
        """True if the norm test of this step decides the size of the next batch."""
        return self.training.growing is not None and self._smaller

    def _test(self) -> bool:
        """Let the next batch grow if the norm test demands it (``batch_schedule``). Waits for the device.

        Returns:
            True if the batch grows, the same in every process.
        """
        run, noise = self.run, self.training.noise
        assert noise is not None
        size = run.config.batch_schedule.after_test(self._images, run.batch.global_batch, *noise.latest())
        size = distributed.from_rank_0(size)
        if size == self._images:
            return False
        self.epochs.grow(self.training.step, size)
        self.end = self.total_steps = planned_steps(run.config, self.epochs)
        return True

    def update(self, recorder: Recorder | None) -> None:
        """Clip the gradient, and take one optimizer and schedule step. Record its layer statistics, if they are due.

        With fp16, ``LossScale`` skips the optimizer's step if a gradient isn't finite, and it has no layer statistics.
        """
        training, optimizer = self.training, self.training.optimizer
        training.loss_scale.unscale(optimizer)
        clipped = self._clip()
        due = recorder is not None and has_layer_row(training.step, self.run.config.tracker.layers_every)
        own = optimizer.layers if due and isinstance(optimizer, LayerwiseOptimizer) else []
        plain = plain_statistics(training.model, without=own) if due else None
        before = [p.detach().clone() for p in training.model.parameters()] if due else []
        # Some libraries' optimizers draw random numbers. A resumed run and all processes must draw the same.
        seed_step(derive_seed(self.run.config.seed, "update", training.step))
        with self.profile.phase("optimizer"):
            if training.norms is not None and isinstance(optimizer, MeasuredOptimizer):
                optimizer.give(training.norms.means(training.loss_scale.value / clipped))
            taken = training.loss_scale.step(optimizer)
        training.unlogged.rows[-1] |= training.loss_scale.metrics()
        with self.profile.phase("logging"):
            if recorder and plain and taken:
                layers, statistics = plain
                if isinstance(optimizer, LayerwiseOptimizer) and own:
                    scaled = optimizer.layer_stats()
                    layers = [*map(Layer, optimizer.layer_names, (layer.ndim for layer in own)), *layers]
                    statistics = {column: torch.cat([scaled[column], statistics[column]]) for column in scaled}
                statistics["update_ratio"] = update_ratios(training.model, before, layers, statistics["weight_norm"])
                recorder.layers(training.step, layers, statistics)
        optimizer.zero_grad(set_to_none=True)
        training.schedule.step()
        if training.averaged and taken:
            training.averaged.update(training.model)

    @torch.no_grad()
    def _clip(self) -> Tensor | float:
        """Scale the gradient down to the norm ``clip_norm`` if it is longer, and keep its norm for the step's row.

        The norm is over all parameters. No number is read from the device.

        Returns:
            The factor of the gradient, by which gradients of samples shrink too: c of the loss ``c * loss``.
        """
        most = self.run.config.clip_norm
        if most is None:
            return 1.0
        parameters = [p for group in self.training.optimizer.param_groups for p in group["params"]]
        norm = clip_grad_norm_(parameters, most)
        self.training.unlogged.rows[-1]["optim/gradient_norm"] = norm
        return (most / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ computes it

    def position(self, step: int) -> dict[str, float]:
        """Return step, epoch and number of training examples after ``step``."""
        run = self.run
        return {"step": step, "epoch": run.epochs.epoch(step), "examples": run.epochs.examples(step)}

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of the next update, and phi of TVLARS."""
        optimizer, config = self.training.optimizer, self.run.config.optimizer
        rates = {"optim/lr": optimizer.param_groups[0]["lr"]}
        if config.learning_rate_1d() is not None and len(optimizer.param_groups) > 1:
            rates["optim/lr_1d"] = optimizer.param_groups[1]["lr"]
        if self.epochs.stages:
            rates["optim/batch_size"] = self._images
        if isinstance(optimizer, TVLARS):
            rates["optim/phi"] = optimizer.phi(self.training.step - self.training.loss_scale.skipped)
        return rates

    def logs_after(self, step: int) -> bool:
        """Return True if the step has a row. An evaluation that may end the training follows the row of its step."""
        may_end = self.run.config.early_stopping is not None and self.evaluates_after(step)
        return has_metrics_row(step, self.run.config.tracker.log_every) or may_end or step == self.end

    def train_rows(self) -> tuple[list[Row], list[Row]]:
        """Return the metrics of the steps since the last call, over all processes: in one row, and in a row for each.

        The one row has the position and the learning rates of the last step. No rows without a step.
        """
        if not self.training.unlogged.rows:
            return [], []
        rows, totals = self.training.unlogged.take()
        mean = rows[-1] | self.mode.train_metrics([sum(column) for column in zip(*totals, strict=True)])
        if self.training.noise is not None:
            noise = self.training.noise.take()
            mean |= noise if self.run.config.instruments.noise_scale else {}
        return [mean], [row | self.mode.train_metrics(own) for row, own in zip(rows, totals, strict=True)]

    def evaluates_after(self, step: int) -> bool:
        return step == self.end or self.epochs.ends(step, self.run.config.eval_every)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the validation and test sets, over all processes. An early stop sets ``end``."""
        step, stopping = self.training.step, self.training.early_stopping
        images = classified(self.run, self.training.result)
        stopping.evaluated(metrics_of_images(images))
        if stopping.stops:
            self.end = step
        return recorded_metrics(self.run, images, step, final=step == self.end)

    def measures_after(self, step: int) -> bool:
        """Return True if the sharpness is measured: at the start, at every so many epochs, and at the end."""
        every = self.run.config.instruments.sharpness_every
        return every is not None and (step in (0, self.end) or self.epochs.ends(step, every))

    def measure(self) -> Row:
        """Return the sharpness, over all processes."""
        return measured_sharpness(self.run, self.training)

    def facts(self) -> Facts:
        """Return the facts specific to the mode."""
        return {}

    def facts_in_words(self, facts: Facts) -> list[str]:
        """Return lines about ``facts`` for the log."""
        return []

    def close(self) -> None:
        """Check the state at the end of the phase."""
