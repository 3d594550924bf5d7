"""What PPO and GRPO have in common: when a rollout is due, whose answers a step trains on, what is logged, and what a resumed run must know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmforge.errors import RunError
from lmforge.step import Report
from lmforge.training.objective import Batch
from lmforge.training.order import GlobalBatch, RowOrder
from lmforge.training.rl.ranks import rank
from lmforge.training.rl.rollouts import Rollout, Rollouts, seed_of
from lmforge.training.rl.tokens import layout

SHOWN = 8  # answers in a table
Experience = dict[str, Tensor]  # what a loss needs of each token of a rollout, [answers, tokens] each
Learn = Callable[[Rollout, Tensor, Tensor, int], tuple[Experience, dict[str, float]]]  # see `Practice.prepare`


@dataclass(frozen=True)
class Schedule:
    """Rollouts of `rows * minibatches` answers, each used for `epochs * minibatches` optimizer steps of `rows` answers."""

    rows: int  # answers in a step, over all ranks
    epochs: int
    minibatches: int
    group_size: int  # answers to one prompt, lying together
    seed: int

    def __post_init__(self) -> None:
        if self.answers % self.group_size:
            what = f"{self.answers} answers of a rollout are no whole number of groups of {self.group_size}"
            raise RunError("group_size", what, "a divisor of global batch rows * minibatches")

    @property
    def answers(self) -> int:
        return self.rows * self.minibatches

    @property
    def updates(self) -> int:
        return self.epochs * self.minibatches

    def prompts(self, step: int, prompts: int) -> Tensor:
        """The prompt of each answer of the rollout at `step`, out of `prompts`: [answers]."""
        each, number = self.answers // self.group_size, step // self.updates
        rows = RowOrder(prompts, self.seed).take(number * each, (number + 1) * each)
        return torch.from_numpy(np.repeat(rows, self.group_size))

    def minibatch(self, step: int) -> Tensor:
        """Which answers of its rollout `step` trains on: [rows], a part of a permutation that every epoch draws anew."""
        number, update = divmod(step, self.updates)
        epoch, part = divmod(update, self.minibatches)
        order = np.random.default_rng((self.seed, number, epoch)).permutation(self.answers)
        return torch.from_numpy(order[part * self.rows : (part + 1) * self.rows])


class Places:
    """Rows of a step before `prepare` fills them: how many a micro-batch has, and nothing in them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def batch(self, indices: Sequence[int]) -> Batch:
        return {"input_ids": torch.empty(len(indices), 0, dtype=torch.int64)}


class Practice:
    """The answers that are being trained on. On every rank it holds those of all, so its state is the same everywhere."""

    def __init__(self, schedule: Schedule, rollouts: Rollouts, missing_eos_penalty: float | None, report: Report, sample_every: int | None) -> None:
        self.schedule, self.rollouts, self.penalty = schedule, rollouts, missing_eos_penalty or 0.0
        self.report, self.sample_every = report, sample_every
        self.rollout: Rollout | None = None
        self.experience: Experience = {}
        self.sums: dict[str, float] = {}
        self.means: dict[str, float] = {}
        self.seen = 0

    def places(self) -> Places:
        return Places(self.schedule.rows)

    def prepare(self, policy: Any, batch: GlobalBatch, learn: Learn, weights: Callable[[Tensor], Tensor]) -> GlobalBatch:
        """This rank's share of the step's answers, after a new rollout where one is due.

        `learn(rollout, scores, mask, answers at once)` gives what the loss needs of each token, and figures. `weights` turns the mask of the step's
        answers [rows, tokens] into what each token counts in the loss; its sum over the batch may be anything. A batch's `weights` and `shares` (equal
        over all tokens) are such that sums over a batch, divided by its rows, are means over the global batch.
        """
        sizes = [len(one["input_ids"]) for one in batch.micro_batches]
        if batch.step % self.schedule.updates == 0:
            self._collect(policy, batch.step, learn, max(sizes))
        assert self.rollout is not None
        answers, width = self.schedule.minibatch(batch.step), self.rollouts.sampling.max_new_tokens
        mask = self.rollout.mask(width)[answers]
        beside = {**self.experience, "weights": torch.zeros(self.schedule.answers, width), "shares": torch.zeros(self.schedule.answers, width)}
        beside["weights"][answers] = weights(mask) * self.schedule.rows
        beside["shares"][answers] = mask / mask.sum() * self.schedule.rows
        mine = answers[rank() * sum(sizes) : (rank() + 1) * sum(sizes)]
        mine = mine[(self.rollout.starts + self.rollout.lengths)[mine].argsort(descending=True, stable=True)]  # those of like length together
        parts = [layout(self.rollout, one, beside, width) for one in torch.split(mine, sizes)]
        shared = GlobalBatch(batch.step, parts, batch.weight, sum(part["input_ids"].numel() for part in parts))
        return shared.to(policy.device)

    def _collect(self, policy: Any, step: int, learn: Learn, at_once: int) -> None:
        schedule = self.schedule
        prompts = schedule.prompts(step, len(self.rollouts))
        self.rollout = made = self.rollouts.collect(policy, prompts, seed_of(schedule.seed, "rollout", step))
        scores = made.rewards - self.penalty * (1 - made.ended)
        self.experience, figures = learn(made, scores, made.mask(self.rollouts.sampling.max_new_tokens), at_once)
        figures |= {
            "reward/mean": float(made.rewards.mean()),
            "reward/std": float(made.rewards.std(correction=0)),
            "response_length": float(made.lengths.float().mean()),
            "ended": float(made.ended.float().mean()),
        }
        figures |= {f"reward/{name}": float(values.mean()) for name, values in made.components.items()}
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in figures.items()}
        self.seen += 1
        if self.sample_every is not None and step // self.sample_every != (step - schedule.updates) // self.sample_every:
            self._show(step)

    def _show(self, step: int) -> None:
        if self.rollout is None or rank() != 0:
            return
        shown = range(min(SHOWN, len(self.rollout.rewards)))
        texts = self.rollouts.texts(self.rollout, shown)
        rows = [[step, *texts[one], float(self.rollout.rewards[one])] for one in shown]
        self.report.table("generations", ("step", "prompt", "answer", "reward"), rows)

    def figures(self) -> dict[str, float]:
        """Means over the rollouts since this was last asked; where there was none, what it said then."""
        if self.seen:
            self.means = {name: value / self.seen for name, value in self.sums.items()}
        self.sums, self.seen = {}, 0
        return dict(self.means)

    def state_dict(self) -> dict[str, Any]:
        made = self.rollout.state_dict() if self.rollout else None
        return {"rollout": made, "experience": dict(self.experience), "sums": dict(self.sums), "means": dict(self.means), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rollout = Rollout(**state["rollout"]) if state["rollout"] else None
        self.experience, self.sums, self.means, self.seen = state["experience"], dict(state["sums"]), dict(state["means"]), state["seen"]
