"""What training has done to the policy, on prompts it was not trained on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmforge.inference.forward import evaluating
from lmforge.training.losses.policy import exact_kl, masked_mean
from lmforge.training.objective import Batch
from lmforge.training.rl.reference import Reference
from lmforge.training.rl.rollouts import Rollout, Rollouts, seed_of
from lmforge.training.rl.tokens import answer_logits, of_rollout

ANSWERS_AT_ONCE = 16  # in a forward pass


@torch.no_grad()
def compare(policy: Any, start: Reference, rollouts: Rollouts, prompts: int, seed: int) -> tuple[dict[str, float], Rollout]:
    """Rewards of both policies' answers to the first `prompts` prompts, drawn with the same random numbers; and the trained one's answers.

    The gain's standard error is that of the mean of differences, prompt by prompt. The KL is that of the whole distributions, in nats, a mean over
    the tokens that the trained policy wrote. An answer that did not end counts with its reward, without the penalty of training.
    """
    rows, drawn = torch.arange(min(prompts, len(rollouts))), seed_of(seed, "held out")
    trained = rollouts.collect(policy, rows, drawn)
    with start(policy) as reference:
        before = rollouts.collect(reference, rows, drawn)
    tokens, temperature = rollouts.sampling.max_new_tokens, rollouts.sampling.temperature

    def apart(batch: Batch) -> dict[str, Tensor]:
        now = answer_logits(policy, batch)
        with start(policy) as reference:
            return {"kl": exact_kl(now, answer_logits(reference, batch), temperature)}

    with evaluating(policy):
        kl = of_rollout(apart, trained, tokens, ANSWERS_AT_ONCE, policy.device)["kl"]
    gain = (trained.rewards - before.rewards).double()
    return {
        "heldout_reward_start": float(before.rewards.double().mean()),
        "heldout_reward": float(trained.rewards.double().mean()),
        "heldout_reward_gain": float(gain.mean()),
        "heldout_reward_gain_standard_error": float(gain.std() / math.sqrt(len(gain))) if len(gain) > 1 else 0.0,
        "heldout_kl_per_token": float(masked_mean(kl, trained.mask(tokens))),
        "heldout_response_length": float(trained.lengths.double().mean()),
        "heldout_ended": float(trained.ended.double().mean()),
        "heldout_prompts": len(rows),
    }, trained
