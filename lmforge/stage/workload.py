"""What one optimizer step of a stage runs, as its memory and time are predicted from: which models see how many tokens, with gradients or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["trained", "value", "reference", "reward"]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Forward passes of one model over a micro-batch, and backward where `backward`."""

    model: Role
    sequences: int  # of a micro-batch on one data-parallel rank
    length: int  # tokens of each
    logits: int  # tokens of each whose logits are made; 0 with `scalar`
    backward: bool
    scalar: bool = False  # a head of one number, as reward and value models have
    packed: bool = False  # several documents in a sequence: attention takes a mask
    pairs: bool = False  # sequences are pairs, whose prompts may be computed once (lmforge.training.shared_prompt); `length` is that of the longest
    prompt: int | None = None  # tokens of each's prompt, which has no logits, where they are known; None: any number
    over_prompt: bool = False  # a pair's logits are made at its prompt too
    entropy: bool = False  # the loss has an entropy term with a gradient of its own
    times: float = 1.0  # passes over the same micro-batch in one optimizer step


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Answers drawn from the trained model with a cache of keys and values, on one data-parallel rank."""

    sequences: int  # in a batch
    prompt: int  # tokens of each, at most
    new: int  # tokens drawn of each, at most
    batches: float  # of them in one optimizer step


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step on one data-parallel rank: `passes` once for each of its `accumulation` micro-batches, and what comes before.

    Lengths are the longest that the stage's keys allow, for the data is not read while planning.
    """

    passes: tuple[Pass, ...]
    accumulation: int
    before: tuple[Pass, ...] = ()  # once a step, such as the log-probs of the old policy; `times` may be a share
    rollout: Rollout | None = None
