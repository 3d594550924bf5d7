"""Token losses. Labels arrive shifted: `labels[t]` is the token that `logits[t]` should predict, -100 = none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}  # fp32 logits alive at once: what stays in a core's cache, what fills a GPU


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Per-token cross entropy that keeps the logits in their own dtype and makes fp32 copies a chunk at a time, in both directions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, chunk: int) -> Tensor:
        losses, lse = torch.empty_like(targets, dtype=torch.float32), torch.empty_like(targets, dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            span = slice(start, start + chunk)
            part = logits[span].float()
            lse[span] = torch.logsumexp(part, -1)
            losses[span] = lse[span] - part.gather(1, targets[span].clamp_min(0)[:, None])[:, 0]
        ctx.save_for_backward(logits, targets, lse)
        ctx.chunk = chunk
        return losses.masked_fill_(targets == IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        scale = grad.masked_fill(targets == IGNORE, 0.0)[:, None]
        out = torch.empty_like(logits)
        for start in range(0, len(targets), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            part = (logits[span].float() - lse[span, None]).exp_()  # softmax
            part.scatter_add_(1, targets[span].clamp_min(0)[:, None], torch.full_like(scale[span], -1.0))
            out[span] = part.mul_(scale[span])
        return out, None, None


def token_cross_entropy(logits: Tensor, labels: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Cross entropy of each token in fp32, 0 where the label is -100.

    logits [..., vocabulary] in any float dtype, labels [...]; returns [...]. Equals torch's cross_entropy on `logits.float()`, with only
    `chunk_tokens` tokens of logits in fp32 at a time; on a CPU, where a chunk stays in the cache, it is also about twice as fast.
    """
    flat, targets = logits.flatten(0, -2), labels.flatten()
    chunk = chunk_tokens or max(1, CHUNK_BYTES[logits.device.type] // (4 * flat.shape[-1]))
    apply: Any = _ChunkedCrossEntropy.apply
    losses: Tensor = apply(flat, targets, chunk)
    return losses.view(labels.shape)


def sequence_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each sequence, summed over its supervised tokens: logits [n, length, vocabulary], labels [n, length] -> [n]."""
    return -token_cross_entropy(logits, labels).sum(-1)
