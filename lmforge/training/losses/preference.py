"""Losses on answers that somebody compared or judged, as pure functions of summed log-probabilities.

A reward here is what the loss sees of an answer (beta times its log-ratio to the reference, or its log-prob where there is no reference),
without gradient: it is what `rewards/...` in the metrics say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CERTAIN = -1e-6  # a mean log-prob no nearer to 0 has finite odds in fp32


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers: log-probabilities summed over an answer's tokens, and how many tokens those are; each [pairs].

    `nll` is what a pair adds to a cross entropy that is not that of the chosen answer per token.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    nll: Tensor | None = None

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of the policy to the reference, of the chosen and the rejected answers."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss needs the reference's log-probabilities")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the policy per token."""
        return self.per_token(self.chosen, self.rejected)

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the answers, divided by their tokens."""
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens


class PairLoss(NamedTuple):
    """A loss with gradient and the rewards without, each [pairs]."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


class AnswerLoss(NamedTuple):
    """A loss with gradient and the reward without, each [answers]."""

    loss: Tensor
    reward: Tensor


def dpo(pairs: Pairs, *, beta: float, label_smoothing: float, length_normalized: bool) -> PairLoss:
    """DPO, sigmoid (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): log-probs summed over the answer.

    `label_smoothing` is the share of labels assumed flipped (conservative DPO, Mitchell 2023). `length_normalized` divides each log-ratio by its
    answer's tokens (Lambert et al. 2024, Tulu 3, arXiv 2411.15124, section 5; TRL's `sigmoid_norm`).
    """
    ratios = pairs.ratios()
    chosen, rejected = pairs.per_token(*ratios) if length_normalized else ratios
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * functional.logsigmoid(margin) - label_smoothing * functional.logsigmoid(-margin)
    return _paired(loss, beta, chosen, rejected)


def ipo(pairs: Pairs, *, beta: float, average_log_ratio: bool) -> PairLoss:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17; its tau is beta here): (h - 1 / (2 beta))^2 with h of summed log-ratios.

    `average_log_ratio` divides each log-ratio by its answer's tokens first, as TRL does on word of the authors.
    """
    ratios = pairs.ratios()
    chosen, rejected = pairs.per_token(*ratios) if average_log_ratio else ratios
    return _paired((chosen - rejected - 1 / (2 * beta)) ** 2, beta, chosen, rejected)


def hinge(pairs: Pairs, *, beta: float) -> PairLoss:
    """The hinge of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on the log-ratio, as normalized by Liu et al. 2023 (RSO, arXiv 2309.06657)."""
    chosen, rejected = pairs.ratios()
    return _paired(torch.relu(1 - beta * (chosen - rejected)), beta, chosen, rejected)


def orpo(pairs: Pairs, *, beta: float) -> PairLoss:
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7; its lambda is beta here): per-token NLL of the chosen answer, and the log of an odds ratio.

    Odds are of the likelihood per token. The NLL is the answer's and a mean of each pair, or `pairs.nll`.
    """
    chosen, rejected = pairs.means()
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    nll = -chosen if pairs.nll is None else pairs.nll
    return _paired(nll - beta * functional.logsigmoid(odds), beta, chosen, rejected)


def simpo(pairs: Pairs, *, beta: float, gamma: float) -> PairLoss:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6): log-probs per token without a reference, and a target margin of gamma between the rewards."""
    chosen, rejected = pairs.means()
    return _paired(-functional.logsigmoid(beta * (chosen - rejected) - gamma), beta, chosen, rejected)


def kto(
    logps: Tensor, reference: Tensor, labels: Tensor, kl: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> AnswerLoss:  # fmt: skip
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, section 4) on single answers: weight * (1 - sigmoid(+-beta * (log-ratio - kl))).

    `labels` [answers] is true where the answer is desirable; `kl` [] is the baseline z0, which carries no gradient.
    """
    ratio, wanted = logps - reference, labels.bool()
    gain = beta * (ratio - kl.detach())
    weight = torch.where(wanted, desirable_weight, undesirable_weight)
    # 1 - sigmoid(x), written so that it does not cancel
    return AnswerLoss(weight * torch.sigmoid(torch.where(wanted, -gain, gain)), beta * ratio.detach())


def _paired(loss: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> PairLoss:
    return PairLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(values)) for values < 0; the better of two forms on either side of log(1/2) (Maechler 2012)."""
    values = values.clamp_max(CERTAIN)
    near = values > -0.693
    # Each form is given a harmless value where the other is taken, or its infinite slope would be 0 * inf.
    return torch.where(near, torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(torch.where(near, -1.0, values))))
