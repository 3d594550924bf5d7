"""Losses on pairs and on judged answers, in value and gradient: TRL's own loss functions on summed log-probs, the papers' formulae, and the edges.

Against whole trainers of TRL, on their own batches: test_objectives_trl.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lmforge.training.losses.preference import PairLoss, Pairs, dpo, hinge, ipo, kto, orpo, simpo
from lmforge.training.losses.reward import bradley_terry

COUNT = 7


def pairs(seed: int = 0) -> tuple[Pairs, tuple[Tensor, Tensor]]:
    """Random pairs, and the two tensors that carry gradient."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 9, (COUNT,), generator=generator) for _ in range(2)]
    policy = [(-2 * torch.rand(COUNT, generator=generator) * count).requires_grad_() for count in tokens]
    reference = [(-2 * torch.rand(COUNT, generator=generator) * count) for count in tokens]
    return Pairs(*policy, *reference, *tokens), (policy[0], policy[1])


def agree(ours: Callable[[Pairs], PairLoss], theirs: Callable[[Pairs], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Losses, their gradients and the rewards are equal to 1e-6."""
    given, inputs = pairs()
    mine, expected = ours(given), theirs(given)
    torch.testing.assert_close(tuple(mine), tuple(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(one[0].sum(), inputs, retain_graph=True) for one in (mine, expected)), rtol=1e-6, atol=1e-6)
    assert not mine.chosen_reward.requires_grad
    assert not mine.rejected_reward.requires_grad


def cpo(loss_type: str, of: Callable[[Pairs], tuple[Tensor, Tensor]], **settings: float) -> Callable[[Pairs], tuple[Tensor, Tensor, Tensor]]:
    """TRL's CPOTrainer.cpo_loss, which is a function of two log-probs: given log-ratios it is the loss with a reference."""
    from trl.experimental.cpo import CPOTrainer

    own = {"alpha": 0.0, "label_smoothing": 0.0, "loss_type": loss_type, "accelerator": SimpleNamespace(device="cpu"), **settings}
    return lambda given: CPOTrainer.cpo_loss(SimpleNamespace(**own), *of(given))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_trls_sigmoid_with_label_smoothing(smoothing: float) -> None:
    theirs = cpo("sigmoid", Pairs.ratios, beta=0.3, label_smoothing=smoothing)
    agree(partial(dpo, beta=0.3, label_smoothing=smoothing, length_normalized=False), theirs)


def test_length_normalized_dpo_is_dpo_on_log_ratios_per_token() -> None:
    theirs = cpo("sigmoid", lambda given: given.per_token(*given.ratios()), beta=2.0)
    agree(partial(dpo, beta=2.0, label_smoothing=0.0, length_normalized=True), theirs)


def test_ipo_is_the_papers_on_sums_and_trls_per_token() -> None:
    agree(partial(ipo, beta=0.4, average_log_ratio=False), cpo("ipo", Pairs.ratios, beta=0.4))
    agree(partial(ipo, beta=0.4, average_log_ratio=True), cpo("ipo", lambda given: given.per_token(*given.ratios()), beta=0.4))
    assert not torch.allclose(*(ipo(pairs()[0], beta=0.4, average_log_ratio=one).loss for one in (False, True)))


def test_ipo_has_its_minimum_where_the_margin_is_half_of_one_over_beta() -> None:
    given = Pairs(*(torch.tensor([one]) for one in (-3.0, -9.0, -4.0, -7.5)), torch.ones(1), torch.ones(1))  # h = 1 + 1.5
    assert float(ipo(given, beta=1 / 5, average_log_ratio=False).loss) == pytest.approx(0.0, abs=1e-12)
    assert float(ipo(given, beta=1.0, average_log_ratio=False).loss) == pytest.approx(4.0)


def test_hinge_is_trls() -> None:
    agree(partial(hinge, beta=0.3), cpo("hinge", Pairs.ratios, beta=0.3))


def test_simpo_is_trls() -> None:
    agree(partial(simpo, beta=2.0, gamma=1.1), cpo("simpo", Pairs.means, beta=2.0, simpo_gamma=1.1))


def test_orpo_is_trls_odds_ratio_and_the_papers_nll() -> None:
    from trl.experimental.orpo import ORPOTrainer

    def theirs(given: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        ratio, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu")), *given.means())
        return -given.chosen / given.chosen_tokens - ratio, chosen, rejected

    agree(partial(orpo, beta=0.7), theirs)


def test_orpo_by_the_papers_equations() -> None:
    given, _ = pairs()
    p, q = ((one / count).exp() for one, count in ((given.chosen, given.chosen_tokens), (given.rejected, given.rejected_tokens)))
    odds = (p / (1 - p)) / (q / (1 - q))
    torch.testing.assert_close(orpo(given, beta=0.7).loss, -p.log() - 0.7 * torch.sigmoid(odds.log()).log(), rtol=1e-5, atol=1e-5)


def test_orpo_of_a_certain_model_is_finite() -> None:
    policy = [torch.tensor([one, -1e3]).requires_grad_() for one in (0.0, -1e-9)]
    loss = orpo(Pairs(policy[0], policy[1], None, None, torch.ones(2), torch.ones(2)), beta=0.1).loss
    assert loss.isfinite().all()
    assert all(one.isfinite().all() for one in torch.autograd.grad(loss.sum(), policy))


def test_a_loss_that_needs_a_reference_says_so() -> None:
    given = Pairs(torch.zeros(1), torch.zeros(1), None, None, torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="reference"):
        dpo(given, beta=0.1, label_smoothing=0.0, length_normalized=False)


def test_dpo_by_hand() -> None:
    policy = torch.tensor([-3.0, -5.0], requires_grad=True)
    given = Pairs(policy[:1], policy[1:], torch.tensor([-4.0]), torch.tensor([-4.5]), torch.tensor([2]), torch.tensor([3]))
    loss, chosen, rejected = dpo(given, beta=0.5, label_smoothing=0.0, length_normalized=False)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-0.75)))  # margin 0.5 * (1 + 0.5)
    assert (float(chosen), float(rejected)) == (0.5, -0.25)
    loss.backward()
    assert policy.grad is not None
    assert float(policy.grad[0]) == pytest.approx(-0.5 / (1 + math.exp(0.75)))


def kto_by_the_paper(logps: Tensor, reference: Tensor, labels: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """lambda_y - v(x, y), an answer at a time."""
    losses = []
    for logp, known, label in zip(logps, reference, labels.tolist(), strict=True):
        reward = logp - known
        value = weights[0] * torch.sigmoid(beta * (reward - kl)) if label else weights[1] * torch.sigmoid(beta * (kl - reward))
        losses.append((weights[0] if label else weights[1]) - value)
    return torch.stack(losses)


def test_kto_is_the_papers() -> None:
    given, (logps, _) = pairs()
    assert given.reference_chosen is not None
    labels, kl = torch.arange(COUNT) % 3 != 0, torch.tensor(0.8, requires_grad=True)
    loss, reward = kto(logps, given.reference_chosen, labels, kl, beta=0.6, desirable_weight=1.5, undesirable_weight=0.5)
    expected = kto_by_the_paper(logps, given.reference_chosen, labels, kl.detach(), 0.6, (1.5, 0.5))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(one.sum(), logps, retain_graph=True)[0] for one in (loss, expected)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reward, 0.6 * (logps - given.reference_chosen).detach())
    assert torch.autograd.grad(loss.sum(), kl, allow_unused=True) == (None,)


def test_bradley_terry_is_minus_the_log_of_the_models_probability() -> None:
    chosen, rejected = torch.tensor([0.3, -2.0]).requires_grad_(), torch.tensor([-0.4, 1.0]).requires_grad_()
    loss = bradley_terry(chosen, rejected, torch.tensor([0.5, 0.0]), centering=0.1)
    probability = chosen.exp() / (chosen.exp() + (rejected + torch.tensor([0.5, 0.0])).exp())
    torch.testing.assert_close(loss, -probability.log() + 0.1 * (chosen + rejected) ** 2, rtol=1e-6, atol=1e-6)
    assert float(bradley_terry(chosen[:1], rejected[:1], 0.0, centering=0.0)) == pytest.approx(float(functional.softplus(torch.tensor(-0.7))))


LOSSES = [partial(dpo, beta=0.1, label_smoothing=0.0, length_normalized=False), partial(orpo, beta=0.1), partial(simpo, beta=1, gamma=0.5)]


@pytest.mark.parametrize("loss", LOSSES, ids=["dpo", "orpo", "simpo"])
def test_a_likelier_chosen_answer_is_a_smaller_loss(loss: Any) -> None:
    given, inputs = pairs()
    chosen, rejected = torch.autograd.grad(loss(given).loss.sum(), inputs)
    assert (chosen < 0).all()
    assert (rejected > 0).all()
