"""Policy-gradient losses, of tokens: PPO's (Schulman et al. 2017, arXiv 1707.06347) and GRPO's (Shao et al. 2024, arXiv 2402.03300).

Tensors are [answers, tokens]: token t of an answer, with its log-probability, value and advantage in the state before it. `mask` is 1 on an
answer's tokens, its end token included, and 0 after them; what lies there is finite but means nothing. Losses come per token, so that the
caller decides how tokens are averaged.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmforge.training.losses.tokens import token_cross_entropy, token_entropy

KlEstimator = Literal["k1", "k2", "k3"]
Scale = Literal["group", "batch", "none"]
LossType = Literal["grpo", "dapo", "dr_grpo"]
STD_EPS = 1e-4  # added to a standard deviation of rewards, as TRL does: a group of equal rewards has advantage 0


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at `ids`: logits [..., vocabulary], ids [...] -> [...], fp32."""
    return -token_cross_entropy(logits, ids, temperature=temperature)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """-sum p log p of p = softmax(logits / temperature), in nats: [..., vocabulary] -> [...], fp32."""
    return token_entropy(logits, temperature=temperature)


def kl_estimate(logps: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """KL(policy || reference) per token from tokens the policy drew (Schulman 2020, "Approximating KL divergence").

    With d = log p_reference - log p: k1 = -d (unbiased, may be negative), k2 = d^2 / 2 (biased, small variance),
    k3 = exp(d) - 1 - d (unbiased, never negative; but far from the reference its mean misses up to 1 nat, for tokens that the policy no longer
    draws carry it).
    """
    difference = reference - logps
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - 1 - difference


def exact_kl(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """sum p (log p - log q) of the whole distributions at a temperature, in nats: two [..., vocabulary] -> [...], fp32."""
    logps, others = (torch.log_softmax(one.float() / temperature, -1) for one in (logits, reference))
    return (logps.exp() * (logps - others)).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all tokens of all answers: scalar."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all tokens, 0 outside the mask; the mean stays where `shift_mean` is false.

    The variance is the unbiased one.
    """
    mean = masked_mean(values, mask)
    variance = ((values - mean).square() * mask).sum() / (mask.sum() - 1).clamp_min(1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def penalized_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the answer's score at its last token (Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2).

    scores [answers], kl [answers, tokens] as k1; returns [answers, tokens].
    """
    last = mask.long().sum(1, keepdim=True) - 1
    return (-kl_coef * kl * mask).scatter_add(1, last, scores[:, None].to(kl.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lambda_: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16): (advantages, returns = advantages + values).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = sum_{l>=0} (gamma lambda)^l delta_{t+l}; nothing follows an answer's last token, whether it
    ended or was cut. Returns 0 outside the mask. The sum is one product with the triangle of (gamma lambda)^(s-t).
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = (rewards + gamma * following - values) * mask
    at = torch.arange(rewards.shape[1], device=rewards.device)
    distance = at[:, None] - at[None, :]  # s - t: [s, t]
    decay = torch.where(distance >= 0, torch.tensor(gamma * lambda_, dtype=torch.float64, device=at.device) ** distance.clamp_min(0), 0.0)
    advantages = (delta.double() @ decay).to(values.dtype) * mask
    return advantages, (advantages + values) * mask


class PolicyLoss(NamedTuple):
    """Per token [answers, tokens]; all but `loss` carry no gradient."""

    loss: Tensor
    clipped: Tensor  # 1 where the clip holds the gradient back
    approx_kl: Tensor  # k3 of the policy since the rollout


def policy_loss(logps: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> PolicyLoss:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = exp(log p - log p_old) (Schulman et al. 2017, eq. 7).

    `clip_high` above `clip_low` is DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476, eq. 10).
    """
    ratio = (logps - old).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    with torch.no_grad():
        clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
        return PolicyLoss(loss, clipped.float(), kl_estimate(old, logps, "k3"))


def value_loss(values: Tensor, old: Tensor, returns: Tensor, *, clip_range: float | None) -> Tensor:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 per token; without the second where `clip_range` is None.

    The clipped form is that of OpenAI's baselines, used by Ziegler et al. 2019 and Ouyang et al. 2022.
    """
    loss = (values - returns).square()
    if clip_range is not None:
        bounded = old + (values - old).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, (bounded - returns).square())
    return loss / 2


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over all tokens: 1 is perfect, 0 no better than a constant; 0 where the returns do not vary. Scalar."""
    error = returns - values
    left = masked_mean((error - masked_mean(error, mask)).square(), mask)
    whole = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    return torch.where(whole > 0, 1 - left / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, answers: int) -> float:
    """The next KL coefficient (Ziegler et al. 2019, arXiv 1909.08593, section 2.2): kl_coef * (1 + e * answers / horizon).

    e = clip(kl / target - 1, -0.2, 0.2), with `kl` the mean over answers of their summed KL, in nats. The paper's K_beta is answers / horizon.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


def group_advantages(scores: Tensor, group_size: int, scale: Scale) -> Tensor:
    """Scores minus their group's mean (Shao et al. 2024, section 4.1.2): scores [answers], groups lying together -> [answers].

    Divided by the group's standard deviation, by that of all scores ("batch"), or by nothing (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783,
    section 3.2: dividing weighs easy and hard prompts more); the deviation is the unbiased one, plus 1e-4.
    """
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + STD_EPS)
    if scale == "batch":
        centred = centred / (scores.std() + STD_EPS)
    return centred.flatten()


def token_weights(mask: Tensor, loss_type: LossType, max_new_tokens: int) -> Tensor:
    """What each token counts in the mean over the whole batch of answers: [answers, tokens], 0 outside the mask.

    `grpo`: an answer's mean, then the mean over answers (Shao et al. 2024, eq. 3), so a token of a long answer counts less. `dapo`: the mean over
    all tokens (Yu et al. 2025, eq. 8). `dr_grpo`: the sum over answers * max_new_tokens, a constant (Liu et al. 2025, section 3.2).
    """
    answers = len(mask)
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp_min(1) / answers
    if loss_type == "dapo":
        return mask / mask.sum().clamp_min(1)
    return mask / (answers * max_new_tokens)


def grpo_loss(
    logps: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, *, clip_low: float, clip_high: float, kl_coef: float, unbiased_kl: bool
) -> PolicyLoss:
    """Per token: the clipped surrogate plus kl_coef * KL(policy || reference) by k3, which has a gradient (Shao et al. 2024, eq. 3 and 4).

    `advantages` are an answer's at each of its tokens; without `reference` there is no KL. `unbiased_kl` multiplies the KL by the ratio, so that its
    gradient is that of the KL itself (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv 2512.02556, and TRL's default); the paper's own form has a gradient that
    is biased even where the ratio is 1.
    """
    parts = policy_loss(logps, old, advantages, clip_low=clip_low, clip_high=clip_high)
    if reference is None:
        return parts
    kl = kl_estimate(logps, reference, "k3")
    if unbiased_kl:
        kl = kl * (logps - old).exp()
    return parts._replace(loss=parts.loss + kl_coef * kl)
