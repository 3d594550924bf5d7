"""The Lightning module: one `training_step` is one optimizer step on one whole global batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lmforge.step import Report
from lmforge.training import dropout, state
from lmforge.training.gauge import Gauge
from lmforge.training.guard import Guard, agreed
from lmforge.training.meter import Meter
from lmforge.training.objective import Figured, LossParts, Objective, OfLogits, Preparing, Resumable
from lmforge.training.order import GlobalBatch
from lmforge.training.randomness import seed_step
from lmforge.training.recipe import Recipe
from lmforge.training.shares import InShares
from lmforge.training.signals import StopSignals, StopVote


class TrainingModule(LightningModule):
    """Gradients of sum(loss) / sum(weight) over all micro-batches and ranks; the host waits for the device at log intervals only
    (and in each step where it must know: of an overflow under loss scaling, of a step to skip where some may be, and that another rank is to stop).

    `folder` is where a state may lie and the next one goes, `tokenizer` the one that belongs to the model, `taken` the rows of a step, `shares` what else
    comes with a model that no rank holds whole. `last` holds the metrics of the last interval.
    """

    def __init__(
        self, recipe: Recipe, objective: Objective, model: nn.Module, report: Report, folder: Path, tokenizer: Path | None,
        taken: Callable[[int], Iterable[int]], shares: InShares | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.recipe, self.objective, self.model, self.report = recipe, objective, model, report
        self.folder, self.tokenizer, self.taken, self.shares = folder, tokenizer, taken, shares
        self.saver = state.Saver(folder, background=True)
        optimizer = recipe.optimizer
        self.guard = Guard(optimizer.skip_sigma, optimizer.skip_window, optimizer.max_skips)
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
            self.model, self.spread = self.engine.spread(self.model, self._parts()), True

    def _parts(self) -> Any:
        """How weights are read, where the model comes without them; not those that a state brings."""
        if self.shares is None or state.read_index(self.folder) is None:
            return self.shares and self.shares.parts
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {name: None if name in trained else part for name, part in self.shares.parts.items()}

    def configure_optimizers(self) -> list[Optimizer]:
        named = ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        self.torch_optimizers = self.recipe.optimizer.build(named)
        self.engine.groups(self.torch_optimizers)
        for group in self._groups():
            group["initial_lr"] = group["lr"]
        return self.torch_optimizers

    def on_fit_start(self) -> None:
        """Before the loop, which Lightning does not begin where the state is that of the last step."""
        self.model.train()  # from_pretrained leaves a model in evaluation mode
        if not getattr(self.objective, "dropout", True):
            dropout.switch_off(self.model)
        self.ranks = self.engine.ranks
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.meter = Meter(self.device, counts=self.ranks.speaks)
        self.vote = StopVote(self.device)
        self.gauge = Gauge(self.device, getattr(self.objective, "period", 1))
        enabled = self.recipe.loss_scale is not None
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=self.recipe.loss_scale or 1.0, enabled=enabled)
        if (saved := state.open_state(self.folder)) is not None:
            self._restore(saved)
        elif self.shares is not None:
            with torch.no_grad(), self.autocast():
                self.shares.begins(self.model, self.device)
        self.signals.install()  # Lightning puts these back when it is through, for the saving of the trained weights

    def on_train_start(self) -> None:
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
        if self.guard.enabled:
            self.meter.mark()
        self._update(batch.step, *self._backward(batch))
        self.done = batch.step + 1
        self.tokens += batch.tokens * self.ranks.data_degree
        self.gauge.end(batch.step, batch.tokens * self.ranks.data_degree)
        if self.done % self.recipe.log_every == 0 or self.done == self.recipe.steps:
            self._log()

    def on_train_batch_end(self, outputs: Any, batch: GlobalBatch, batch_index: int) -> None:
        last = self.done == self.recipe.steps
        if last and dist.is_initialized():  # no later step would tell of a signal that came since this one's vote
            self.vote.ask(torch.zeros((), device=self.device), self.signals.requested)
        stop = self.vote.wanted() if dist.is_initialized() else self.signals.requested
        late = self.vote.late() if dist.is_initialized() else self._late()
        if stop or (late and not last):  # after the last step too: the weights are gathered and saved next, and there may be no time for that
            self.save_state()
        if stop:
            self.saver.wait()
            self.stopped = self.trainer.should_stop = True

    def _late(self) -> bool:
        """Whether it is time for the next state."""
        return time.monotonic() - self.saved_at >= self.recipe.save_every_s

    # One step

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.torch_optimizers for group in optimizer.param_groups]

    def _backward(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Gradients of the global batch's mean loss; returns this rank's share of its sum, and the global batch's weight [scalars]."""
        weight = self.vote.ask(batch.weight if self.ranks.speaks else torch.zeros_like(batch.weight), self.signals.requested, self._late())
        # Gradients are means over the data-parallel ranks, so their number takes that mean back.
        shares = Shares(self, (self.ranks.data_degree / weight.clamp_min(1)).float())
        self.engine.gradients(self, batch.micro_batches, shares)
        return shares.count(len(batch.micro_batches)), weight

    def autocast(self) -> Any:
        """What a forward pass runs in."""
        compute = getattr(torch, self.recipe.compute_dtype)
        enabled = self.recipe.compute_dtype != self.recipe.param_dtype
        return torch.autocast(self.device.type, dtype=compute if enabled else None, enabled=enabled)

    def _update(self, step: int, loss: Tensor, weight: Tensor) -> None:
        """Clip, step and clear the gradients; a step that the guard refuses, or in which any gradient overflowed under loss scaling, is skipped whole."""
        for optimizer in self.torch_optimizers:
            self.scaler.unscale_(optimizer)

        refused = False

        def skips(norm: Tensor) -> bool:
            nonlocal refused
            overflowed = self._overflowed()
            refused = self.guard.enabled and self._refused(step, loss, weight, norm, overflowed)
            if not refused:
                self.meter.watch(step, loss, *(() if self.scaler.is_enabled() else (norm,)))
            return refused or overflowed

        norm = self.engine.update(self.trainable, self.torch_optimizers, self.recipe.optimizer.grad_clip, skips)
        if refused:
            self.meter.forget()
        else:
            self.meter.grad_norm = norm

    def _refused(self, step: int, loss: Tensor, weight: Tensor, norm: Tensor, overflowed: bool) -> bool:
        """What the guard decides, the same on every rank; the row numbers go to the metrics."""

        def tell(line: Mapping[str, Any]) -> None:
            if self.trainer.is_global_zero:
                self.report.log(step + 1, {**line, "step": step + 1})

        mean, whole = agreed(loss, weight, norm, speaks=self.ranks.speaks)
        return self.guard.skips(step, mean, whole, lambda: self.taken(step), tell, overflowed=overflowed)

    def _overflowed(self) -> bool:
        """Whether a gradient of any optimizer overflowed; moves the loss scale, once for all of them.

        Not by `scaler.step`, which decides for each optimizer by itself, though clipping has mixed their gradients. Ranks hold the same
        averaged gradients, or shards of which torch shares what it found, so they decide alike. Waits for the device where there is a loss scale.
        """
        if not self.scaler.is_enabled():
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        return not 0 < before <= self.scaler.get_scale()

    # What is said and kept

    def _log(self) -> None:
        sums, now = self.meter.read(), time.monotonic()
        self.gauge.read()
        if not sums:  # every step of the interval was skipped, and told
            self.elapsed_s = now - self.started
            return
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
        """Write the state after the steps done so far, on all ranks together. RunError where it is not finite or cannot be written."""
        self.saved_at = time.monotonic()
        meter = self.meter.state_dict()  # of all ranks, the first step that was not finite with it
        self.meter.refuse_bad()
        if self.tokenizer is not None and self.trainer.is_global_zero and not (self.folder / state.MODEL).is_dir():
            state.describe(self.folder, self.model, self.tokenizer)
        payload = {
            "step": self.done,
            "tokens": self.tokens,
            "elapsed_s": time.monotonic() - self.started,
            "scaler": self.scaler.state_dict(),
            "meter": meter,
            "guard": self.guard.state_dict(),
            "last": self.last,
            **self.engine.state(self.model, self.torch_optimizers),
        }
        if isinstance(self.objective, Resumable):
            payload["objective"] = self.objective.state_dict()
        self.saver.save(self.done, payload)

    def _restore(self, saved: state.Saved) -> None:
        found = self.engine.put_state(self.model, self.torch_optimizers, saved.like)
        self.scaler.load_state_dict(found["scaler"])
        self.meter.load_state_dict(found["meter"])
        self.guard.load_state_dict(found["guard"])
        if isinstance(self.objective, Resumable):
            self.objective.load_state_dict(found["objective"])
        self.last = found["last"]
        self.done, self.tokens, self.elapsed_s = found["step"], found["tokens"], found["elapsed_s"]


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
            return self._share(cast(OfLogits, self.module.objective).of_logits(logits, labels))

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
