"""A reward model on preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmforge.formats.tokens import Tokens
from lmforge.inference.forward import base, virtual_tokens
from lmforge.training import shared_prompt
from lmforge.training.losses.reward import bradley_terry
from lmforge.training.objective import Batch, LossParts
from lmforge.training.objectives.preference import PairRows


def pair_scores(model: Any, batch: Batch) -> Tensor:
    """Scores of a sequence classification model at each example's last token: fp32 [pairs, 2], chosen and rejected.

    Not transformers' own pooling, which looks for the last token that is not padding: an end token that also pads would be left out.
    """
    if virtual_tokens(model):
        raise ValueError("a soft prompt has no score: use another adapter for a reward model")
    network, mask = base(model), None
    if shared_prompt.shares(model, batch):
        mask = shared_prompt.mask(model, batch)
    else:
        batch = shared_prompt.unshare(batch)
    ids, positions, ends = batch["input_ids"], batch["position_ids"], batch["ends"]
    hidden = network.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
    last = hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1]))
    scores: Tensor = network.score(last).float().view(-1, 2)
    return scores


@dataclass(frozen=True)
class BradleyTerry:
    """-log sigmoid of the score difference, less `margin` and the pair's own margin where the tokens hold margins; weighted by pairs."""

    tokens: Path
    margin: float
    centering: float

    def dataset(self, split: str) -> PairRows:
        return PairRows(Tokens(self.tokens, split))

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["input_ids"]))

    def loss(self, model: Any, batch: Batch) -> LossParts:
        chosen, rejected = pair_scores(model, batch).unbind(1)
        margin = self.margin + batch["margin"] if "margin" in batch else self.margin
        loss = bradley_terry(chosen, rejected, margin, centering=self.centering)
        lead = (chosen - rejected).detach()
        metrics = {"accuracy": (lead > 0).sum(), "margin": lead.sum(), "rewards/mean": (chosen + rejected).detach().sum() / 2}
        return LossParts(loss.sum(), self.weight(batch).to(loss.device), metrics)
