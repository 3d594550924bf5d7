"""PPO's two networks as one module: the policy, which is what is saved, and the value model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmforge.inference import forward
from lmforge.training.objective import Batch


class Critic(nn.Module):
    """The value of every state, by a transformers sequence classifier with one label (a reward model, or a fresh head on a policy's weights).

    Its head reads every position, where a reward model's reads the last; under an adapter the head trains all the same. A value is
    (score - shift) * scale, as a reward model's reward is.
    """

    def __init__(self, scorer: Any, shift: float, scale: float) -> None:
        super().__init__()
        self.scorer, self.shift, self.scale = scorer, shift, scale
        for parameter in forward.base(scorer).score.parameters():
            parameter.requires_grad_(True)

    def forward(self, batch: Batch) -> Tensor:
        """Values of states in units of reward, one a position kept: [rows * kept], fp32."""
        classifier = forward.base(self.scorer)
        virtual = forward.virtual_tokens(self.scorer)
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        if virtual:
            embedded = classifier.get_input_embeddings()(batch["input_ids"])
            prompt = self.scorer.get_prompt(batch_size=len(embedded)).to(embedded.dtype)
            inputs = {"inputs_embeds": torch.cat([prompt, embedded], 1)}
        hidden = classifier.base_model(**inputs, attention_mask=None, use_cache=False).last_hidden_state
        values: Tensor = classifier.score(hidden[:, batch["keep"] + virtual])
        return (values.flatten().float() - self.shift) * self.scale


class ActorCritic(nn.Module):
    """`policy` is a causal language model, `critic` a `Critic`; they share no weights, so that the value loss leaves the policy alone."""

    def __init__(self, policy: Any, critic: Critic) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def transformers(self) -> list[Any]:
        """The models in it, as they are lowered."""
        return [self.policy, self.critic.scorer]
