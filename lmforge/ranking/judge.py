"""A causal language model as judge: it reads two answers and says A or B, in both orders, for it leans to a side (Zheng et al. 2023, section 3.4)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmforge.errors import CheckpointError
from lmforge.formats.samples import Sampled
from lmforge.inference.checkpoint import context_tokens, open_model, open_tokenizer
from lmforge.inference.forward import logits
from lmforge.ranking.machine import Progress, Scores
from lmforge.ranking.pairs import Pair
from lmforge.tokenizer.templates import render

BATCH = 8
QUESTION = """Below are a request and two answers to it. Judge which answer does better what the request asks for: it is more correct, more complete, clearer.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better, A or B? Reply with one letter."""


@dataclass(frozen=True)
class Comparison:
    """What the judge reads, and the two tokens it may go on with."""

    ids: list[int]
    labels: tuple[int, int]  # the tokens that begin "A" and "B"


class Judge:
    """One opened model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer = open_tokenizer(folder)
        self._model: Any = open_model(folder)
        self._room = context_tokens(self._model)

    def scores(self, samples: Sequence[Sampled], progress: Progress) -> list[Scores]:
        """Each answer's mean log-odds of being preferred to the others of its prompt; a pair is doubtful where the two orders disagree.

        An answer that was cut off has no score and is compared with none; a prompt with a comparison longer than the judge's context has no scores.
        """
        found = []
        for number, sample in enumerate(samples):
            progress(number, len(samples))
            found.append(self._sample(sample))
        return found

    def _sample(self, sample: Sampled) -> Scores:
        ended = [place for place, answer in enumerate(sample.answers) if answer.ended]
        pairs = list(itertools.combinations(ended, 2))
        comparisons = self._comparisons(sample, pairs)
        if any(len(one.ids) > self._room for one in comparisons):
            return Scores((None,) * len(sample.answers))
        odds = self._odds(comparisons)
        leads = {pair: (odds[2 * at], -odds[2 * at + 1]) for at, pair in enumerate(pairs)}  # log-odds of the pair's first, as A and as B
        totals = dict.fromkeys(ended, 0.0)
        for (one, two), both in leads.items():
            totals[one] += sum(both) / 2
            totals[two] -= sum(both) / 2
        doubtful = frozenset(pair for pair, (as_a, as_b) in leads.items() if as_a * as_b <= 0)
        means = {place: round(total / max(len(ended) - 1, 1), 6) for place, total in totals.items()}
        return Scores(tuple(means.get(place) for place in range(len(sample.answers))), doubtful)

    def _comparisons(self, sample: Sampled, pairs: Sequence[Pair]) -> list[Comparison]:
        """Two of each pair: its first answer as A, then as B."""
        prompt = "\n\n".join(str(one["content"]) for one in sample.messages)
        orders = [order for one, two in pairs for order in ((one, two), (two, one))]
        texts = [QUESTION.format(prompt=prompt, first=sample.answers[one].text, second=sample.answers[two].text) for one, two in orders]
        if self._tokenizer.chat_template:
            turns = [[{"role": "user", "content": text}] for text in texts]
            return [self._comparison(text, "") for text in render(self._tokenizer, turns, add_generation_prompt=True)]
        return [self._comparison(f"{text}\n\nThe better answer is", " ") for text in texts]

    def _comparison(self, text: str, space: str) -> Comparison:
        special = not self._tokenizer.chat_template  # a template writes its own
        a, b = (self._tokenizer(f"{text}{space}{letter}", add_special_tokens=special)["input_ids"] for letter in "AB")
        shared = next((at for at, (one, two) in enumerate(zip(a, b, strict=False)) if one != two), None)
        if not shared:
            raise CheckpointError(str(self._folder), "its tokenizer does not tell A from B", "choose another judge")
        return Comparison(a[:shared], (a[shared], b[shared]))

    @torch.inference_mode()
    def _odds(self, comparisons: Sequence[Comparison]) -> list[float]:
        """log p(A) - log p(B) of each."""
        found: list[float] = []
        for start in range(0, len(comparisons), BATCH):
            part = comparisons[start : start + BATCH]
            longest = max(len(one.ids) for one in part)
            ids = torch.tensor([one.ids + [0] * (longest - len(one.ids)) for one in part], device=self._model.device)
            positions = torch.arange(longest, device=self._model.device).expand_as(ids)
            ends = torch.tensor([len(one.ids) - 1 for one in part], device=self._model.device)
            # Every row's logits at every row's end; the diagonal is each at its own.
            there = logits(self._model, {"input_ids": ids, "position_ids": positions}, ends)
            for row, one in enumerate(part):
                a, b = there[row, row, list(one.labels)].double().tolist()
                found.append(a - b)
        return found
