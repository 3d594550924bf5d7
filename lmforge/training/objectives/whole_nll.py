"""A loss over pairs whose cross entropy is that of the whole chosen example, its prompt included, as TRL's ORPO has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmforge.inference.forward import logits
from lmforge.training import shared_prompt
from lmforge.training.losses.preference import Pairs
from lmforge.training.losses.tokens import IGNORE, token_cross_entropy
from lmforge.training.objective import Batch
from lmforge.training.objectives.preference import Preference
from lmforge.training.order import GlobalBatch


@dataclass(frozen=True)
class WholeNll(Preference):
    """The NLL is a mean over all tokens of the global batch's chosen examples but their first ones, whatever the micro-batches and ranks."""

    def prepare(self, model: Any, batch: GlobalBatch) -> GlobalBatch:
        """The same micro-batches with `nll_scale` [] in each: pairs a token, so that the mean over pairs is one over tokens."""
        counts = torch.zeros(2, dtype=torch.float64, device=batch.weight.device)
        for one in batch.micro_batches:
            chosen = one["unshared"][::2]
            counts += torch.stack([torch.full_like(counts[0], len(chosen)), (chosen[:, 1:] >= 0).sum()])
        if dist.is_initialized():
            dist.all_reduce(counts)
        scale = (counts[0] / counts[1]).float()
        return replace(batch, micro_batches=[{**one, "nll_scale": scale} for one in batch.micro_batches])

    def pairs(self, model: Any, batch: Batch) -> Pairs:
        """Of a batch that `prepare` has seen: all from one pass, with logits everywhere."""
        plain, whole = shared_prompt.unshare(batch), _whole(batch)
        of_chosen = shared_prompt.unshare({**batch, "labels": whole})["labels"][::2]
        if shared_prompt.shares(model, batch):
            labels = torch.where(whole == IGNORE, batch["labels"], whole)
            losses = token_cross_entropy(logits(model, batch, None, shared_prompt.mask(model, batch)), labels)
            losses = losses.repeat_interleave(2, 0).gather(1, batch["unshared"].clamp_min(0))
        else:
            labels = plain["labels"].clone()
            labels[::2] = of_chosen
            losses = token_cross_entropy(logits(model, plain), labels)
        answers = plain["labels"] != IGNORE
        logps, tokens = -(losses.double() * answers).sum(1).float().view(-1, 2), answers.sum(1).view(-1, 2)
        nll = (losses[::2].double() * (of_chosen != IGNORE)).sum(1).float() * batch["nll_scale"]
        (chosen, rejected), (chosen_tokens, rejected_tokens) = logps.unbind(1), tokens.unbind(1)
        return Pairs(chosen, rejected, None, None, chosen_tokens, rejected_tokens, nll)


def _whole(batch: Batch) -> Tensor:
    """Labels of the chosen examples at all their tokens, where those lie in the shared rows: [pairs, width]."""
    places, ids = batch["unshared"][::2], batch["input_ids"]
    here, following = places[:, :-1], places[:, 1:]
    spare = ids.shape[1]  # a column for what follows an example's last token
    found = torch.full((len(ids), spare + 1), IGNORE, device=ids.device)
    return found.scatter(1, torch.where(following >= 0, here, spare), ids.gather(1, following.clamp_min(0)))[:, :-1]
