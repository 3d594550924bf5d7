"""Token losses against torch's and transformers' own, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from lmforge.training.losses.tokens import sequence_logprobs, token_cross_entropy


def logits_and_labels(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 37, (3, 11))
    labels[0, :5] = labels[2, 10] = -100
    return (torch.randn(3, 11, 37) * 4).to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 7, 33, None])
def test_chunks_equal_the_plain_form(dtype: torch.dtype, chunk: int | None) -> None:
    logits, labels = logits_and_labels(dtype)
    plain = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(3, 11)
    weights = torch.rand(3, 11)
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    ours = token_cross_entropy(logits, labels, chunk)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    assert ours.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=0 if dtype == torch.float32 else 1e-2, atol=1e-6 if dtype == torch.float32 else 1e-3)


def test_is_transformers_loss() -> None:
    logits, labels = logits_and_labels(torch.float32)
    expected = ForCausalLMLoss(logits, None, vocab_size=37, shift_labels=labels)
    ours = token_cross_entropy(logits, labels).sum() / (labels != -100).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(one, logits)[0] for one in (ours, expected)), rtol=0, atol=1e-7)


def test_gradient_by_finite_differences() -> None:
    logits, labels = logits_and_labels(torch.float32)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return token_cross_entropy(values, labels).double().sum()

    direction = torch.randn_like(logits)
    slope = (loss(logits + 1e-2 * direction) - loss(logits - 1e-2 * direction)) / 2e-2
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-3)


def test_sequence_logprobs_sum_what_is_supervised() -> None:
    logits, labels = logits_and_labels(torch.float32)
    table = logits.log_softmax(-1)
    by_hand = [sum(float(table[row, at, labels[row, at]]) for at in range(11) if labels[row, at] != -100) for row in range(3)]
    assert sequence_logprobs(logits, labels).tolist() == pytest.approx(by_hand, rel=1e-5)
