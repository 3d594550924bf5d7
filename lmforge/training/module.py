"""The Lightning module: one `training_step` is one optimizer step on one whole global batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lmforge.step import Report
from lmforge.training import dropout, state
from lmforge.training.meter import Meter
from lmforge.training.objective import Figured, LossParts, Objective, Preparing, Resumable
from lmforge.training.order import GlobalBatch
from lmforge.training.randomness import seed_step
from lmforge.training.recipe import Recipe
from lmforge.training.signals import StopSignals, StopVote


class TrainingModule(LightningModule):
    """Gradients of sum(loss) / sum(weight) over all micro-batches and ranks; the host waits for the device at log intervals only
    (and in each step where it must know: of an overflow under loss scaling, and that another rank is to stop).

    `resumed` is what `state.load` gave, `folder` where the next state goes. `last` holds the metrics of the last interval.
    """

    def __init__(self, recipe: Recipe, objective: Objective, model: nn.Module, report: Report, folder: Path, resumed: dict[str, Any] | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recipe, self.objective, self.model, self.report = recipe, objective, model, report
        self.folder, self.resumed = folder, resumed
        self.spread = False
        self.signals, self.stopped = StopSignals(), False
        self.done, self.tokens, self.elapsed_s = 0, 0, 0.0
        self.last: dict[str, float] = {}

    # Lightning's hooks

    @property
    def engine(self) -> Any:
        """The strategy: how a step is spread over ranks."""
        return self.trainer.strategy

    def configure_model(self) -> None:
        if not self.spread:  # Lightning may ask again
            self.model, self.spread = self.engine.spread(self.model), True

    def configure_optimizers(self) -> list[Optimizer]:
        named = ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        self.torch_optimizers = self.recipe.optimizer.build(named)
        self.engine.groups(self.torch_optimizers)
        for group in self._groups():
            group["initial_lr"] = group["lr"]
        return self.torch_optimizers

    def on_train_start(self) -> None:
        self.model.train()  # from_pretrained leaves a model in evaluation mode
        if not getattr(self.objective, "dropout", True):
            dropout.switch_off(self.model)
        self.ranks = self.engine.ranks
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.meter = Meter(self.device, counts=self.ranks.speaks)
        self.vote = StopVote(self.device)
        enabled = self.recipe.loss_scale is not None
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=self.recipe.loss_scale or 1.0, enabled=enabled)
        if self.resumed is not None:
            self._restore(self.resumed)
            self.resumed = None
        self.signals.install()  # after Lightning's own, which would end the process in the middle of things
        self.saved_at = self.interval_start = time.monotonic()
        self.started = self.interval_start - self.elapsed_s
        self.interval_tokens = self.tokens

    def training_step(self, batch: GlobalBatch, batch_index: int) -> None:
        seed_step(self.recipe.seed, batch.step, self.ranks.data_rank)
        factor = self.recipe.optimizer.schedule.factor(batch.step, self.recipe.steps)
        for group in self._groups():
            group["lr"] = group["initial_lr"] * factor
        if isinstance(self.objective, Preparing):
            with torch.no_grad(), self.autocast():
                batch = self.objective.prepare(self.model, batch)
        loss = self._backward(batch)
        self._update(batch.step, loss)
        self.done = batch.step + 1
        self.tokens += batch.tokens * self.ranks.data_degree
        if self.done % self.recipe.log_every == 0 or self.done == self.recipe.steps:
            self._log()

    def on_train_batch_end(self, outputs: Any, batch: GlobalBatch, batch_index: int) -> None:
        stop = self.vote.wanted() if dist.is_initialized() else self.signals.requested
        late = time.monotonic() - self.saved_at >= self.recipe.save_every_s
        if (stop or late) and self.done < self.recipe.steps:
            self.save_state()
        if stop:
            self.stopped = self.trainer.should_stop = True

    # One step

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.torch_optimizers for group in optimizer.param_groups]

    def _backward(self, batch: GlobalBatch) -> Tensor:
        """Gradients of the global batch's mean loss; returns this rank's share of its sum [scalar]."""
        weight = self.vote.ask(batch.weight if self.ranks.speaks else torch.zeros_like(batch.weight), self.signals.requested)
        # Gradients are means over the data-parallel ranks, so their number takes that mean back.
        shares = Shares(self, (self.ranks.data_degree / weight.clamp_min(1)).float())
        self.engine.gradients(self, batch.micro_batches, shares)
        return shares.count(len(batch.micro_batches))

    def autocast(self) -> Any:
        """What a forward pass runs in."""
        compute = getattr(torch, self.recipe.compute_dtype)
        enabled = self.recipe.compute_dtype != self.recipe.param_dtype
        return torch.autocast(self.device.type, dtype=compute if enabled else None, enabled=enabled)

    def _update(self, step: int, loss: Tensor) -> None:
        """Clip, step and clear the gradients; with loss scaling a step in which any gradient overflowed is skipped whole."""
        for optimizer in self.torch_optimizers:
            self.scaler.unscale_(optimizer)

        def skips(norm: Tensor) -> bool:
            self.meter.watch(step, loss, *(() if self.scaler.is_enabled() else (norm,)))
            return self._overflowed()

        self.meter.grad_norm = self.engine.update(self.trainable, self.torch_optimizers, self.recipe.optimizer.grad_clip, skips)

    def _overflowed(self) -> bool:
        """Whether a gradient of any optimizer overflowed; moves the loss scale, once for all of them.

        Not by `scaler.step`, which decides for each optimizer by itself, though clipping has mixed their gradients. Ranks hold the same
        averaged gradients, so they decide alike. Waits for the device where there is a loss scale.
        """
        if not self.scaler.is_enabled():
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        return not 0 < before <= self.scaler.get_scale()

    # What is said and kept

    def _log(self) -> None:
        sums = self.meter.read()
        now = time.monotonic()
        weight = sums.pop("weight")
        metrics = {name: value / max(weight, 1.0) for name, value in sums.items()}
        if isinstance(self.objective, Figured):
            metrics |= self.objective.figures()
        metrics["grad_norm"] = float(self.meter.grad_norm)
        metrics["lr"] = self._groups()[0]["lr"]
        metrics["tokens_per_s"] = (self.tokens - self.interval_tokens) / max(now - self.interval_start, 1e-9)
        metrics["tokens"] = self.tokens
        if self.scaler.is_enabled():
            metrics["loss_scale"] = self.scaler.get_scale()
        self.interval_start, self.interval_tokens, self.elapsed_s = now, self.tokens, now - self.started
        self.last = metrics
        if self.trainer.is_global_zero:
            self.report.log(self.done, {**metrics, "step": self.done})
            self.report.progress(self.done, self.recipe.steps, f"loss {metrics['loss']:.2f} · {_short(metrics['tokens_per_s'])} tok/s")

    def save_state(self) -> None:
        """Write the state after the steps done so far (rank 0; the others hold the same). RunError where it is not finite or cannot be written."""
        self.saved_at = time.monotonic()
        self.meter.refuse_bad()
        if not self.trainer.is_global_zero:
            return
        payload = {
            "step": self.done,
            "tokens": self.tokens,
            "elapsed_s": time.monotonic() - self.started,
            "weights": state.weights(self.model),
            "optimizers": [optimizer.state_dict() for optimizer in self.torch_optimizers],
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }
        if isinstance(self.objective, Resumable):
            payload["objective"] = self.objective.state_dict()
        state.save(self.folder, self.done, payload)

    def _restore(self, saved: dict[str, Any]) -> None:
        state.put_weights(self.model, saved["weights"], self.folder)
        for optimizer, one in zip(self.torch_optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(one)
        self.scaler.load_state_dict(saved["scaler"])
        self.meter.load_state_dict(saved["meter"])
        if isinstance(self.objective, Resumable):
            self.objective.load_state_dict(saved["objective"])
        self.done, self.tokens, self.elapsed_s = saved["step"], saved["tokens"], saved["elapsed_s"]


class Shares:
    """The losses of a step's micro-batches, scaled to shares of the global batch's mean, and what they add up to."""

    def __init__(self, module: TrainingModule, scale: Tensor) -> None:
        self.module, self.scale, self.autocast = module, scale, module.autocast
        self.parts: list[LossParts] = []

    def of(self, batch: Any) -> Tensor:
        with self.autocast():
            return self._share(self.module.objective.loss(self.module.model, batch))

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            return self._share(self.module.objective.of_logits(logits, labels))

    def _share(self, parts: LossParts) -> Tensor:
        self.parts.append(LossParts(parts.sum.detach(), parts.weight, parts.metrics))
        return self.module.scaler.scale(parts.sum * self.scale)

    def count(self, micro_batches: int) -> Tensor:
        """Add up what the last so many said (a pipeline's first step asks once more, for shapes); returns the sum of their losses [scalar]."""
        meter, total = self.module.meter, torch.zeros((), device=self.module.device)
        for parts in self.parts[-micro_batches:]:
            total += parts.sum
            meter.add("weight", parts.weight)
            for name, value in parts.metrics.items():
                meter.add(name, value)
        meter.add("loss", total)
        return total


def _short(number: float) -> str:
    """12,345 as 12.3k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
