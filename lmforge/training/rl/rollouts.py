"""Rollouts: answers of the policy to prompts, with what each is worth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens
from lmforge.inference.checkpoint import open_tokenizer
from lmforge.inference.rollout import rollout, uniforms
from lmforge.reward.nodes import Episodes, Scorer
from lmforge.training.rl.ranks import gathered, share


@dataclass(frozen=True)
class Rollout:
    """Answers of all ranks, on the CPU: [answers] but for `input_ids`. An answer is input_ids[i, starts[i] : starts[i] + lengths[i]], end token included."""

    prompts: Tensor  # the prompt's row among the prompts
    input_ids: Tensor  # [answers, longest prompt + max_new_tokens]: prompt, answer, padding
    starts: Tensor
    lengths: Tensor
    ended: Tensor  # 1 where the answer has an end token
    rewards: Tensor  # fp32, what the scorer says
    components: dict[str, Tensor]  # the scorer's parts by name

    def mask(self, tokens: int) -> Tensor:
        """1 on the tokens of each answer: [answers, tokens] fp32."""
        return (torch.arange(tokens) < self.lengths[:, None]).float()

    def state_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from the policy's whole distribution, so that the ratio to it is right."""

    max_new_tokens: int
    temperature: float


class Rollouts:
    """Answers to one split of a `tokens:prompt` folder, scored; on several ranks each answers its share, and all hold the whole.

    Neither the number of ranks nor the size of a micro-batch changes what is drawn: it depends on the seed and on the answer's place.
    """

    def __init__(self, folder: Path, split: str, scorer: Scorer, sampling: Sampling) -> None:
        self.tokens, self.scorer, self.sampling = Tokens(folder, split), scorer, sampling
        self.tokenizer: Any = open_tokenizer(folder / "tokenizer")
        self.references = self.tokens.answers
        if not len(self.tokens):
            raise DataError(str(folder / split), "has no prompts", "give more data, or a longer seq_len: a prompt has seq_len - max_new_tokens tokens")
        if hasattr(scorer, "check"):
            scorer.check(self.references, split)

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.tokens)

    def prompt(self, row: int) -> list[int]:
        return [int(one) for one in self.tokens.example(row)[0]]

    def collect(self, policy: Any, rows: Tensor, seed: int) -> Rollout:
        """An answer to the prompt of each of `rows` [answers]. RunError where the reward of one is not a finite number."""
        count, width = len(rows), self.sampling.max_new_tokens
        mine = share(count)
        prompts = [self.prompt(row) for row in rows[mine].tolist()]
        answers = rollout(
            policy,
            prompts,
            max_new_tokens=width,
            temperature=self.sampling.temperature,
            stop_ids=self.tokens.meta["stop_token_ids"],
            pad_id=self.tokens.meta["eos_token_id"],
            noise=uniforms(seed, count, width)[mine],
        )
        longest = max(self.tokens.offsets[row + 1] - self.tokens.offsets[row] for row in rows.tolist())
        starts = torch.tensor([len(prompt) for prompt in prompts])
        input_ids = _joined(prompts, starts, answers.ids.cpu(), int(longest), self.tokens.meta["eos_token_id"])
        lengths = answers.lengths.cpu()
        rewards, components = self._score(rows[mine].tolist(), input_ids, starts, lengths)

        def whole(part: Tensor) -> Tensor:
            return gathered(part, count, policy.device)

        parts = {name: whole(values) for name, values in components.items()}
        return Rollout(rows.clone(), whole(input_ids), whole(starts), whole(lengths), whole(answers.ended.long()), whole(rewards), parts)

    def texts(self, result: Rollout, answers: Sequence[int]) -> list[tuple[str, str]]:
        """(prompt, answer) of some answers, as people read them."""
        rows = [(int(result.starts[one]), int(result.starts[one] + result.lengths[one]), result.input_ids[one].tolist()) for one in answers]
        prompts, written = self._decode([ids[:start] for start, _, ids in rows]), self._decode([ids[start:end] for start, end, ids in rows])
        return list(zip(prompts, written, strict=True))

    def _score(self, rows: list[int], input_ids: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(rewards, components) of this rank's answers."""
        ids = [one[:end] for one, end in zip(input_ids.tolist(), (starts + lengths).tolist(), strict=True)]
        begins: list[int] = starts.tolist()
        episodes = Episodes(
            prompts=self._decode([one[:start] for one, start in zip(ids, begins, strict=True)]),
            answers=self._decode([one[start:] for one, start in zip(ids, begins, strict=True)]),
            references=[self.references[row] for row in rows],
            ids=ids,
            starts=begins,
        )
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # a reward does not depend on the policy's precision
            rewards = torch.tensor(self.scorer(episodes), dtype=torch.float32)
        named: Mapping[str, Sequence[float]] = getattr(self.scorer, "components", {})
        return rewards, {name: torch.tensor(named[name], dtype=torch.float32) for name in sorted(named)}

    def _decode(self, ids: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts


def _joined(prompts: Sequence[Sequence[int]], starts: Tensor, answers: Tensor, longest: int, pad_id: int) -> Tensor:
    """Prompts and, right after each, its answer: [rows, longest + answers' width]."""
    joined = torch.full((len(prompts), longest + answers.shape[1]), pad_id)
    for row, prompt in enumerate(prompts):
        joined[row, : len(prompt)] = torch.tensor(prompt)
    return joined.scatter_(1, starts[:, None] + torch.arange(answers.shape[1]), answers)


def seed_of(*parts: object) -> int:
    """A seed for what is drawn at a place, such as (seed, "rollout", 12): the same in every process."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest(), "big") % 2**63
