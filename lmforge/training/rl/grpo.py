"""GRPO: an answer is worth what it is better than the others to its prompt (Shao et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmforge.inference.forward import evaluating
from lmforge.training.losses import policy as losses
from lmforge.training.objective import Batch, LossParts
from lmforge.training.order import GlobalBatch
from lmforge.training.rl.practice import Experience, Places, Practice
from lmforge.training.rl.reference import Reference
from lmforge.training.rl.rollouts import Rollout
from lmforge.training.rl.tokens import answer_logits, logprobs, of_rollout


@dataclass(frozen=True)
class GrpoOptions:
    """The keys of the GRPO stage that its loss reads."""

    group_size: int
    kl_coef: float
    clip_low: float
    clip_high: float
    scale_rewards: losses.Scale
    loss_type: losses.LossType
    unbiased_kl: bool


class Grpo:
    """The clipped surrogate on group-relative advantages, with the KL to the reference in the loss; no value model.

    Without a `reference` the KL is neither taken nor logged. Where a rollout is trained on in one step, the policy of the rollout is the one that is
    trained: its log-probs come from the loss's own pass.
    """

    dropout = False

    def __init__(self, options: GrpoOptions, practice: Practice, reference: Reference | None) -> None:
        if options.kl_coef and reference is None:
            raise ValueError("a KL needs a reference")
        self.options, self.practice, self.reference = options, practice, reference
        self.period = practice.schedule.updates
        self.on_policy = self.period == 1
        self.temperature = practice.rollouts.sampling.temperature
        self.figures, self.state_dict, self.load_state_dict = practice.figures, practice.state_dict, practice.load_state_dict

    def dataset(self, split: str) -> Places:
        return self.practice.places()

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["input_ids"]))

    def prepare(self, model: Any, batch: GlobalBatch) -> GlobalBatch:
        def learn(rollout: Rollout, scores: Tensor, mask: Tensor, at_once: int) -> tuple[Experience, dict[str, float]]:
            return self._learn(model, rollout, scores, mask, at_once)

        def weights(mask: Tensor) -> Tensor:
            return losses.token_weights(mask, self.options.loss_type, mask.shape[1])

        return self.practice.prepare(model, batch, learn, weights)

    def _learn(self, model: Any, rollout: Rollout, scores: Tensor, mask: Tensor, at_once: int) -> tuple[Experience, dict[str, float]]:
        """Log-probs of the rollout's policy (where it will have moved) and of the reference, and each answer's advantage at all its tokens."""
        options, tokens = self.options, mask.shape[1]
        found: Experience = {}
        with evaluating(model):
            if not self.on_policy:
                found |= of_rollout(lambda batch: {"old": logprobs(model, batch, self.temperature)}, rollout, tokens, at_once, model.device)
            if self.reference is not None:
                with self.reference(model) as reference:
                    found |= of_rollout(lambda batch: {"reference": logprobs(reference, batch, self.temperature)}, rollout, tokens, at_once, model.device)
        advantages = losses.group_advantages(scores, options.group_size, options.scale_rewards)
        groups = scores.view(-1, options.group_size)
        figures = {
            "advantages/std": float(advantages.std(correction=0)),
            "reward/equal_groups": float((groups == groups[:, :1]).all(1).float().mean()),  # groups with nothing to learn from
        }
        if self.reference is not None:
            figures["kl_coef"] = options.kl_coef
            if not self.on_policy:
                figures["kl"] = float(losses.masked_mean(losses.kl_estimate(found["old"], found["reference"], "k1"), mask))
        return {**found, "advantages": advantages[:, None].expand_as(mask).contiguous()}, figures

    def loss(self, model: Any, batch: Batch) -> LossParts:
        options, weights = self.options, batch["weights"]
        logits = answer_logits(model, batch)
        logps = losses.token_logprobs(logits, batch["targets"], self.temperature)
        reference = batch["reference"] if options.kl_coef else None
        surrogate = losses.grpo_loss(
            logps,
            logps.detach() if self.on_policy else batch["old"],
            reference,
            batch["advantages"],
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            kl_coef=options.kl_coef,
            unbiased_kl=options.unbiased_kl,
        )
        with torch.no_grad():
            entropy = losses.entropy(logits, self.temperature)
        metrics = {"policy/loss": surrogate.loss, "entropy": entropy, "clip_fraction": surrogate.clipped, "approx_kl": surrogate.approx_kl}
        if self.on_policy and self.reference is not None:  # of the whole rollout, as it is elsewhere
            metrics["kl"] = losses.kl_estimate(logps, batch["reference"], "k1")
        sums = {name: (one.detach() * batch["shares"]).sum() for name, one in metrics.items()}
        return LossParts((surrogate.loss * weights).sum(), self.weight(batch).to(weights.device), sums)
