"""PPO on language: the KL penalty is in the reward, the value model gives the baseline (Ziegler et al. 2019; Ouyang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmforge.inference.forward import evaluating
from lmforge.training.losses import policy as losses
from lmforge.training.objective import Batch, LossParts
from lmforge.training.order import GlobalBatch
from lmforge.training.rl.actor_critic import ActorCritic
from lmforge.training.rl.practice import Experience, Places, Practice
from lmforge.training.rl.reference import Reference
from lmforge.training.rl.rollouts import Rollout
from lmforge.training.rl.tokens import answer_logits, logprobs, of_rollout


@dataclass(frozen=True)
class PpoOptions:
    """The keys of the PPO stage that its loss reads."""

    kl_coef: float
    kl_target: float | None
    kl_horizon: int
    gamma: float
    gae_lambda: float
    clip_range: float
    value_clip_range: float | None
    value_coef: float
    entropy_coef: float
    whiten_advantages: bool
    whiten_rewards: bool


class Ppo:
    """The clipped surrogate, the clipped value loss and an entropy bonus, each a mean over all answer tokens of the global batch."""

    dropout = False

    def __init__(self, options: PpoOptions, practice: Practice, reference: Reference) -> None:
        self.options, self.practice, self.reference = options, practice, reference
        self.kl_coef = options.kl_coef
        self.temperature = practice.rollouts.sampling.temperature
        self.figures, self.period = practice.figures, practice.schedule.updates

    def dataset(self, split: str) -> Places:
        return self.practice.places()

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["input_ids"]))

    def prepare(self, model: ActorCritic | Any, batch: GlobalBatch) -> GlobalBatch:
        def learn(rollout: Rollout, scores: Tensor, mask: Tensor, at_once: int) -> tuple[Experience, dict[str, float]]:
            return self._learn(model, rollout, scores, mask, at_once)

        return self.practice.prepare(model.policy, batch, learn, lambda mask: mask / mask.sum())

    def _learn(self, model: ActorCritic, rollout: Rollout, scores: Tensor, mask: Tensor, at_once: int) -> tuple[Experience, dict[str, float]]:
        """Log-probs and values of the rollout's policy, and the advantages and returns that follow from its rewards."""
        options, coef = self.options, self.kl_coef
        found = self._passes(model, rollout, mask.shape[1], at_once)
        old, values = found["old"], found["values"]
        kl = losses.kl_estimate(old, found["reference"], "k1")
        rewards = losses.penalized_rewards(scores, kl, mask, coef)
        if options.whiten_rewards:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        advantages, returns = losses.gae(rewards, values, mask, gamma=options.gamma, lambda_=options.gae_lambda)
        per_answer = float((kl * mask).sum(1).mean())
        figures = {
            "kl": float(losses.masked_mean(kl, mask)),
            "kl_coef": coef,
            "reward/kl_penalty": coef * per_answer,
            "value/explained_variance": float(losses.explained_variance(values, returns, mask)),
            "advantages/std": float(advantages[mask.bool()].std(correction=0)),
        }
        if options.whiten_advantages:
            advantages = losses.whiten(advantages, mask)
        if options.kl_target is not None:
            self.kl_coef = losses.adapted_kl_coef(coef, per_answer, target=options.kl_target, horizon=options.kl_horizon, answers=len(scores))
        return {"old": old, "values": values, "advantages": advantages, "returns": returns}, figures

    def _passes(self, model: ActorCritic, rollout: Rollout, tokens: int, at_once: int) -> dict[str, Tensor]:
        def own(batch: Batch) -> dict[str, Tensor]:
            return {"old": logprobs(model.policy, batch, self.temperature), "values": model.critic(batch)[batch["picked"]]}

        device = model.policy.device
        with evaluating(model.policy, model.critic):
            found = of_rollout(own, rollout, tokens, at_once, device)
            with self.reference(model.policy) as reference:
                found |= of_rollout(lambda batch: {"reference": logprobs(reference, batch, self.temperature)}, rollout, tokens, at_once, device)
        return found

    def loss(self, model: ActorCritic | Any, batch: Batch) -> LossParts:
        options, weights = self.options, batch["weights"]
        logits = answer_logits(model.policy, batch)
        logps = losses.token_logprobs(logits, batch["targets"], self.temperature)
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.entropy_coef > 0):
            entropy = losses.entropy(logits, self.temperature)
        surrogate = losses.policy_loss(logps, batch["old"], batch["advantages"], clip_low=options.clip_range, clip_high=options.clip_range)
        values = model.critic(batch)[batch["picked"]]
        value = losses.value_loss(values, batch["values"], batch["returns"], clip_range=options.value_clip_range)
        total = surrogate.loss + options.value_coef * value - options.entropy_coef * entropy
        metrics = {
            "policy/loss": surrogate.loss,
            "value/loss": value,
            "entropy": entropy,
            "clip_fraction": surrogate.clipped,
            "approx_kl": surrogate.approx_kl,
        }
        sums = {name: (one.detach() * batch["shares"]).sum() for name, one in metrics.items()}
        return LossParts((total * weights).sum(), self.weight(batch).to(weights.device), sums)

    def state_dict(self) -> dict[str, Any]:
        return {"practice": self.practice.state_dict(), "kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.practice.load_state_dict(state["practice"])
        self.kl_coef = state["kl_coef"]
