"""Reinforcement learning on answers the policy itself writes: PPO with a value model, GRPO with groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from lmforge.errors import PlanError, Problem
from lmforge.model.families import Weight
from lmforge.registry import Key, node, register
from lmforge.reward.nodes import Reward, RewardModel
from lmforge.stage.base import Load, Tuning
from lmforge.stage.reward import scalar_head
from lmforge.stage.workload import Pass, Rollout, Workload
from lmforge.step import Context

ROWS = 64  # answers drawn at once (lmforge.inference.rollout.ROWS, which a test holds equal: that module needs torch)


@node
class Reinforcement(Tuning):
    """Rollouts from the policy, scored by a reward, learned from in minibatches: a row is a prompt with its answer.

    Dropout is off, the models' and an adapter's: probability ratios are to the policy that was sampled, which has none.
    """

    consumes = ("checkpoint", "tokens:prompt")

    reward: Annotated[Reward, Key("what an answer is worth")]
    reward_from: Annotated[
        str | None, Key("a trained reward model: a folder, a hub id or a run; null = the one that an earlier stage makes, where one is needed", identity=False)
    ]
    max_new_tokens: Annotated[int, Key("longest answer; prompts get the rest of seq_len", "tokens", ge=1)]
    temperature: Annotated[float, Key("temperature that answers are drawn at, from the whole distribution; the loss is taken at the same one", gt=0)]
    epochs: Annotated[int, Key("passes over each rollout", ge=1)]
    minibatches: Annotated[int, Key("parts of a rollout, an optimizer step each", ge=1)]
    missing_eos_penalty: Annotated[float | None, Key("taken from the reward of an answer that did not end; null = nothing", ge=0)]
    eval_prompts: Annotated[int, Key("held-out prompts answered by the policy before and after, for the step's figures", "prompts", ge=2)]
    sample_every: Annotated[int | None, Key("how often answers are shown as a table; null = never", "optimizer steps", gt=0, identity=False)]

    def takes(self) -> tuple[str, ...]:
        """What it consumes, and what its reward needs."""
        return (*self.consumes, *self.reward.takes())

    def example_tokens(self, context_tokens: int) -> int:
        """The longest prompt: what an answer leaves of the sequence."""
        return self.length(context_tokens) - self.max_new_tokens

    @property
    def updates(self) -> int:
        """Optimizer steps a rollout."""
        return self.epochs * self.minibatches

    def account(self, rows: int, steps: int) -> Iterator[str]:
        """How many rollouts the steps are."""
        answers = rows * self.minibatches
        yield f"a rollout = {self.minibatches} x {rows:,} rows = {answers:,} answers, used for {self.epochs} x {self.minibatches} = {self.updates} steps"
        rollouts = -(-steps // self.updates)
        yield f"{steps:,} steps = {rollouts:,} rollouts = {rollouts * answers:,} answers of at most {self.max_new_tokens:,} tokens"

    def practised(self, micro_rows: int, accumulation: int, passes: Sequence[Pass], scored: Sequence[Pass]) -> Workload:
        """`passes` over a micro-batch of a step; in the step that a rollout is made in, its answers and `scored`, passes over all of them without gradient.

        A rollout is used for `updates` steps, so a step has as large a share of it. Answers are drawn as many at once as lmforge.inference.rollout says.
        """
        assert self.seq_len is not None
        answers = micro_rows * accumulation * self.minibatches
        share = accumulation * self.minibatches / self.updates
        reward = [self.one_pass(micro_rows, model="reward", backward=False, scalar=True, logits=0)] if "reward_model" in self.reward.takes() else []
        at_once = min(answers, ROWS)
        return Workload(
            passes=tuple(passes),
            accumulation=accumulation,
            before=tuple(dataclasses.replace(one, times=share) for one in (*scored, *reward)),
            rollout=Rollout(sequences=at_once, prompt=self.seq_len - self.max_new_tokens, new=self.max_new_tokens, batches=answers / at_once / self.updates),
        )

    def run(self, context: Context) -> dict[str, Any]:
        """Train from the checkpoint given; the figures are of held-out prompts, before and after."""
        from lmforge.stage.rl import train

        return train(self, context)


@register("stage", "ppo")
class Ppo(Reinforcement):
    """PPO (Schulman et al. 2017, arXiv 1707.06347) with a KL penalty to the starting policy and a value model (Ziegler et al. 2019; Ouyang et al. 2022)."""

    kl_coef: Annotated[float, Key("KL penalty in the reward, per token; the first value where kl_target adapts it", ge=0)]
    kl_target: Annotated[float | None, Key("KL of an answer to the starting policy aimed at; null = kl_coef stays (Ziegler et al. 2019, 2.2)", "nats", gt=0)]
    kl_horizon: Annotated[int, Key("answers over which an adaptive kl_coef may change by its own size", "answers", gt=0)]
    gamma: Annotated[float, Key("discount", gt=0, le=1)]
    gae_lambda: Annotated[float, Key("lambda of generalized advantage estimation (Schulman et al. 2016)", ge=0, le=1)]
    clip_range: Annotated[float, Key("how far the probability ratio may move from 1", gt=0)]
    value_clip_range: Annotated[float | None, Key("how far a value may move from the rollout's; null = as it likes", gt=0)]
    value_coef: Annotated[float, Key("weight of the value loss", ge=0)]
    entropy_coef: Annotated[float, Key("weight of an entropy bonus", ge=0)]
    whiten_advantages: Annotated[bool, Key("bring a rollout's advantages to mean 0 and variance 1")]
    whiten_rewards: Annotated[bool, Key("bring a rollout's rewards to variance 1")]
    value_init: Annotated[
        Literal["reward", "policy"] | None,
        Key("values start from the reward model's scores (shifted and scaled where reward is that model by itself), or at 0; null = reward where one is used"),
    ]

    def takes(self) -> tuple[str, ...]:
        """The reward model too, where the value model starts from it."""
        kinds = super().takes()
        return (*kinds, "reward_model") if self.value_init == "reward" and "reward_model" not in kinds else kinds

    @property
    def value_affine(self) -> tuple[float, float]:
        """(shift, scale) from what the value model's head says to values, so that they start in the reward's units."""
        if self.value_start == "reward" and isinstance(self.reward, RewardModel):
            return self.reward.shift, self.reward.scale
        return 0.0, 1.0

    @property
    def value_start(self) -> str:
        """`reward` or `policy`."""
        return self.value_init or ("reward" if "reward_model" in self.reward.takes() else "policy")

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """Policy and value model in one graph; before, both on the rollout, and the starting policy."""
        new = self.max_new_tokens
        policy = self.one_pass(micro_rows, logits=new, entropy=self.entropy_coef > 0)
        value = self.one_pass(micro_rows, model="value", logits=0, scalar=True)
        before = [dataclasses.replace(one, backward=False, entropy=False) for one in (policy, value)]
        return self.practised(micro_rows, accumulation, (policy, value), (*before, dataclasses.replace(before[0], model="reference")))

    def load(self, weights: Sequence[Weight]) -> Load:
        """Policy and value model trained; the starting policy and the reward model frozen."""
        whole, adapted = scalar_head(weights), not self.adapter.trains_all
        value = (*self.adapter.trainable(weights), whole[-1]) if adapted else whole
        reference = () if adapted else tuple(weights)  # an adapter is switched off instead
        reward, policy = (whole if "reward_model" in self.reward.takes() else ()), super().load(weights)
        # The value model has a base of its own under its adapter.
        return Load((*policy.trained, *value), (*reference, *reward), (*policy.base, *(whole if adapted else ())))


@register("stage", "grpo")
class Grpo(Reinforcement):
    """GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3): advantages relative to a group of answers to one prompt, so no value model."""

    group_size: Annotated[int, Key("answers to each prompt", "answers", ge=2)]
    kl_coef: Annotated[float, Key("weight of the KL to the starting policy in the loss, by the k3 estimator (Schulman 2020)", ge=0)]
    unbiased_kl: Annotated[bool, Key("multiply that KL by the probability ratio, so that its gradient has no bias (DeepSeek-V3.2; TRL's form)")]
    clip_low: Annotated[float, Key("how far the probability ratio may fall below 1", gt=0, lt=1)]
    clip_high: Annotated[float, Key("how far it may rise above 1; more than clip_low is clip-higher (DAPO, Yu et al. 2025)", gt=0)]
    scale_rewards: Annotated[Literal["group", "batch", "none"], Key("whose standard deviation advantages are divided by; none = Dr. GRPO (Liu et al. 2025)")]
    loss_type: Annotated[
        Literal["grpo", "dapo", "dr_grpo"], Key("mean of answers' means, mean over all tokens of the batch, or sum over tokens / (answers x max_new_tokens)")
    ]

    def account(self, rows: int, steps: int) -> Iterator[str]:
        """Whole groups only."""
        answers = rows * self.minibatches
        if answers % self.group_size:
            what = f"a rollout of {self.minibatches} x {rows} answers is no whole number of groups of {self.group_size}"
            raise PlanError("stage.grpo.group_size", what, "type a divisor of the answers, or another optimizer.global_batch_tokens")
        yield from super().account(rows, steps)

    def workload(self, micro_rows: int, accumulation: int) -> Workload:
        """The policy alone; before, its log-probs on the rollout where it will have moved, and those of the starting policy where they are asked for."""
        policy = self.one_pass(micro_rows, logits=self.max_new_tokens)
        once = dataclasses.replace(policy, backward=False)
        scored = [once] if self.updates > 1 else []
        if self.kl_coef or not self.adapter.trains_all:
            scored.append(dataclasses.replace(once, model="reference"))
        return self.practised(micro_rows, accumulation, (policy,), scored)

    def load(self, weights: Sequence[Weight]) -> Load:
        """The policy trained; the starting policy frozen where the loss needs it and no adapter can be switched off; the reward model frozen."""
        policy = super().load(weights)
        reference = tuple(weights) if self.kl_coef and self.adapter.trains_all else ()
        return Load(policy.trained, (*reference, *(scalar_head(weights) if "reward_model" in self.reward.takes() else ())), policy.base)

    def check(self, where: str) -> Iterator[Problem]:
        """Clipping must leave room."""
        yield from super().check(where)
        if self.clip_high < self.clip_low:
            yield Problem(f"{where}.clip_high", f"{self.clip_high:g} is below clip_low={self.clip_low:g}", "give at least clip_low; more is clip-higher")
