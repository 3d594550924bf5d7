"""Answers as batches, and what a model says of their tokens. Within a batch answer tokens lie flat, [tokens], without padding between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lmforge.inference import forward
from lmforge.training.losses.policy import token_logprobs
from lmforge.training.objective import Batch
from lmforge.training.rl.ranks import gathered, share
from lmforge.training.rl.rollouts import Rollout

Pass = Callable[[Batch], dict[str, Tensor]]  # values of a batch's answer tokens by name, each [tokens]


def layout(rollout: Rollout, answers: Tensor, beside: Mapping[str, Tensor], tokens: int) -> Batch:
    """Some answers of a rollout as a batch on the CPU, cut to the longest of them.

    `input_ids`, `position_ids` [n, longest]; `targets` [tokens], the answers' tokens; `keep` [k], the positions that may predict one, and
    `picked` [tokens], which of the n * k positions kept predicts each. Every tensor [answers, tokens] of `beside` comes flat as well.
    """
    starts, lengths = rollout.starts[answers], rollout.lengths[answers]
    width, first = int((starts + lengths).max()), int(starts.min()) - 1
    input_ids = rollout.input_ids[answers, :width]
    keep = torch.arange(first, width - 1)
    mask = torch.arange(tokens) < lengths[:, None]
    before = starts[:, None] - 1 + torch.arange(tokens)  # the position that predicts each token
    row = torch.arange(len(answers))[:, None].expand_as(before)
    flat = {name: values[answers][mask] for name, values in beside.items()}
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(width).expand_as(input_ids).contiguous(),
        "keep": keep,
        "picked": (row * len(keep) + before - first)[mask],
        "targets": input_ids[row[mask], before[mask] + 1],
        **flat,
    }


def answer_logits(policy: Any, batch: Batch) -> Tensor:
    """What predicts each answer token: [tokens, vocabulary]. Padding is on the right, where a causal model does not see it."""
    return forward.logits(policy, {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}, batch["keep"]).flatten(0, 1)[batch["picked"]]


def logprobs(policy: Any, batch: Batch, temperature: float) -> Tensor:
    """Log-probability of each answer token: [tokens]."""
    return token_logprobs(answer_logits(policy, batch), batch["targets"], temperature)


@torch.no_grad()
def of_rollout(one_pass: Pass, rollout: Rollout, tokens: int, answers_at_once: int, device: torch.device) -> dict[str, Tensor]:
    """What `one_pass` says of all answers: each [answers, tokens] fp32 on the CPU, 0 after an answer's end. Ranks do their shares."""
    mine = share(len(rollout.starts))
    found: dict[str, Tensor] = {}
    for start in range(0, len(mine), answers_at_once):
        span = slice(start, start + answers_at_once)
        batch = layout(rollout, mine[span], {}, tokens)
        mask = torch.arange(tokens) < rollout.lengths[mine[span], None]
        for name, values in one_pass({name: value.to(device) for name, value in batch.items()}).items():
            whole = found.setdefault(name, torch.zeros(len(mine), tokens))
            whole[span].masked_scatter_(mask, values.float().cpu())
    return {name: gathered(values, len(rollout.starts), device) for name, values in found.items()}
