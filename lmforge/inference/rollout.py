"""Answers to many prompts at once, drawn from a causal language model with a KV cache.

A loop of our own: transformers' generate samples rows from one random stream, so that what is drawn depends on how rows are batched, and does not
say what each token's probability was. Here a row has numbers of its own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lmforge.inference import forward

ROWS = 64  # rows in flight where nobody says how many


@dataclass(frozen=True)
class Answers:
    """One answer a row, padded on the right: token t is meant where t < lengths."""

    ids: Tensor  # [rows, max_new_tokens] int64, the end token included
    logprobs: Tensor  # [rows, max_new_tokens] fp32, under the distribution each token was drawn from, or the model's own; 0 after the end
    lengths: Tensor  # [rows] int64, at least 1
    ended: Tensor  # [rows] bool: the last token is a stop token


def uniforms(seed: int, rows: int, tokens: int) -> Tensor:
    """Numbers in [0, 1) for `rollout`: [rows, tokens] float64 on the CPU. A row's do not depend on how many rows are drawn with it."""
    return torch.rand(rows, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def rollout(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Collection[int],
    pad_id: int,
    noise: Tensor | None = None,
    batch: int = ROWS,
    answers: int = 1,
    top_p: float = 1.0,
    own_logprobs: bool = False,
) -> Answers:
    """`answers` to each prompt [its tokens, at least one], in order, at most `batch` rows at a time, with the model in evaluation mode.

    Token t of row i is drawn from softmax(logits / temperature), or what `nucleus` leaves of it, by inverting its distribution function at
    `noise[i, t]` (of `uniforms`); temperature 0 takes the likeliest token and needs no noise. A row ends with the first token among `stop_ids`, which
    belongs to the answer, or after `max_new_tokens`. A row's draws do not depend on the others, up to the rounding of its logits. A prompt is computed
    once for all its answers, which are in one batch even where they are more than `batch`. With `own_logprobs` the log-probabilities are the model's
    own, at temperature 1 and over the whole vocabulary, whatever the tokens were drawn from.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("an empty prompt: a model needs a token to start from")
    parts = []
    with _evaluating(model):
        at_once = max(1, batch // answers)
        for start in range(0, len(prompts), at_once):
            end = start + at_once
            drawn_at = None if noise is None else noise[start * answers : end * answers].to(model.device)
            running = _Running(model, prompts[start:end], answers, pad_id)
            parts.append(_answer(running, max_new_tokens, _Draws(temperature, top_p, own_logprobs, drawn_at), stop_ids, pad_id))
    return Answers(*(torch.cat(values) for values in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Draws:
    """How the next token is chosen."""

    temperature: float
    top_p: float
    own_logprobs: bool
    noise: Tensor | None  # [rows, max_new_tokens]

    def __post_init__(self) -> None:
        if self.temperature > 0 and self.noise is None:
            raise ValueError("sampling needs noise")

    def take(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(ids, log-probs), each [active], of logits [active, vocabulary] for the batch's `rows`."""
        if self.noise is None or self.temperature == 0:
            ids = logits.argmax(-1, keepdim=True)
            logps = torch.log_softmax(logits.float(), -1)
        else:
            logps = nucleus(torch.log_softmax(logits.float() / self.temperature, -1), self.top_p)
            below = logps.double().exp_().cumsum_(-1)
            # The product stays below the sum, which is 1 but for rounding; a token of probability 0 has no width and is never hit.
            ids = torch.searchsorted(below, self.noise[rows, step, None] * below[:, -1:], right=True)
            if self.own_logprobs:
                logps = torch.log_softmax(logits.float(), -1)
        return ids[:, 0], logps.gather(1, ids)[:, 0]


def nucleus(logps: Tensor, top_p: float) -> Tensor:
    """Log-probs [rows, vocabulary] of the smallest set of tokens whose probability reaches `top_p`, -inf elsewhere (Holtzman et al. 2020).

    At 1 that is every token, and nothing is sorted.
    """
    if top_p == 1:
        return logps
    ordered, order = logps.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().exp()
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[:, 0] = False
    return logps.masked_fill(outside.scatter(1, order, outside), -torch.inf).log_softmax(-1)


class _Running:
    """The rows of a batch that have not ended, with the model's cache for them: `answers` of each prompt, side by side."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], answers: int, pad_id: int) -> None:
        from transformers import DynamicCache

        self.model, self.answers, device = model, answers, model.device
        self.rows = torch.arange(len(prompts) * answers, device=device)
        longest = max(map(len, prompts))
        self.ids = torch.tensor([[pad_id] * (longest - len(one)) + list(one) for one in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
        base = forward.base(model)
        self.cache = DynamicCache(config=base.config)
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(base).forward).parameters else {}
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        # Ranks that each hold a part of the weights gather them in every pass, so none may stop before the others.
        self.together = any(isinstance(module, FSDPModule) for module in model.modules())

    def any(self, going: Tensor) -> bool:
        """Whether a row goes on, here or on a rank that this one must wait for."""
        some = going.any().float()
        if self.together:
            dist.all_reduce(some, op=dist.ReduceOp.MAX)
        return bool(some)

    def logits(self) -> Tensor:
        """Of the next token: [active, vocabulary]."""
        inputs: dict[str, Any] = {"input_ids": self.ids}
        model = self.model
        if virtual := forward.virtual_tokens(model):
            # PEFT would put the soft prompt before every token of the loop; it belongs before the first only.
            model = forward.base(model)
            if not self.cache.get_seq_length():
                prompt = self.model.get_prompt(batch_size=len(self.ids))
                embedded = model.get_input_embeddings()(self.ids)
                inputs = {"inputs_embeds": torch.cat([prompt.to(embedded.dtype), embedded], 1)}
                self.mask = torch.cat([self.mask.new_ones(len(self.ids), virtual), self.mask], 1)
                self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        run = {"attention_mask": self.mask, "position_ids": self.positions, "past_key_values": self.cache, "use_cache": True}
        logits: Tensor = model(**inputs, **run, **self.keep).logits[:, -1]
        if len(logits) < len(self.rows):  # the prompts, once each: from here on every answer has a row
            self.cache.batch_repeat_interleave(self.answers)
            self.mask, self.positions, logits = (one.repeat_interleave(self.answers, 0) for one in (self.mask, self.positions, logits))
        return logits

    def go_on(self, ids: Tensor, going: Tensor) -> None:
        """Append a token [active] to each row, and let go of ended rows once half of them have: they cost as much as the others."""
        self.ids, self.positions = ids[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        kept = going[self.rows].nonzero()[:, 0]
        if self.together and not len(kept):
            kept = torch.zeros(1, dtype=torch.int64, device=ids.device)  # what it says is not written down
        if 2 * len(kept) <= len(ids):
            self.rows, self.ids, self.positions, self.mask = self.rows[kept], self.ids[kept], self.positions[kept], self.mask[kept]
            self.cache.batch_select_indices(kept)


def _answer(running: _Running, tokens: int, draws: _Draws, stop_ids: Collection[int], pad_id: int) -> tuple[Tensor, ...]:
    """The fields of `Answers` for one batch."""
    device, count = running.rows.device, len(running.rows)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    ids = torch.full((count, tokens), pad_id, device=device)
    logprobs, lengths = torch.zeros(count, tokens, device=device), torch.zeros(count, dtype=torch.int64, device=device)
    going = torch.ones(count, dtype=torch.bool, device=device)
    for step in range(tokens):
        drawn, logps = draws.take(running.logits(), running.rows, step)
        rows, active = running.rows, going[running.rows]
        ids[rows, step] = torch.where(active, drawn, pad_id)
        logprobs[rows, step] = torch.where(active, logps, 0.0)
        lengths[rows] += active
        going[rows] = active & ~torch.isin(drawn, stops)
        if step + 1 == tokens or not running.any(going):
            break
        running.go_on(drawn, going)
    return ids, logprobs, lengths, ~going


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout; and without compiled blocks, which would be compiled anew for lengths that grow by one."""
    with forward.evaluating(model), torch.compiler.set_stance("force_eager"):
        yield
