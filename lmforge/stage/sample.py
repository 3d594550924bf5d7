"""`stage=sample` as it runs: several answers to each prompt, drawn in batches with a KV cache, written as the `samples` artifact."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmforge.errors import DataError, RunError
from lmforge.formats import samples
from lmforge.formats.samples import Answer, Sampled
from lmforge.formats.tokens import Meta, Tokens, read_meta
from lmforge.inference.checkpoint import context_tokens, open_model, open_tokenizer
from lmforge.inference.generate import stop_tokens
from lmforge.inference.rollout import Answers, rollout, uniforms
from lmforge.stage.readback import Reader
from lmforge.stage.sampling import Sample
from lmforge.step import Context, Report
from lmforge.tokenizer.templates import Renderer
from lmforge.training.rl.rollouts import seed_of

SHOWN_PROMPTS = 8


@dataclass(frozen=True)
class Question:
    """A prompt of the tokens: its place in the split, its ids, the messages behind them, and the answer the data knows."""

    index: int
    ids: list[int]
    prompt: samples.Prompt
    reference: str | None


@dataclass(frozen=True)
class Drawn:
    """One draw: its ids, the end token included, whether it ended, and the log-probability (nats) of all of it at temperature 1."""

    ids: list[int]
    ended: bool
    logprob: float


def sample(stage: Sample, context: Context) -> dict[str, Any]:
    """Draw, keep what is distinct, write; returns the account and the shape of the answers.

    The same draw comes out whatever the batch size, up to the rounding of the model's arithmetic: each answer has random numbers of its own, made from
    the seed, the prompt's place in its split and the answer's number.
    """
    folder = context.inputs["tokens:prompt"]
    tokenizer = open_tokenizer(folder / "tokenizer")
    model: Any = open_model(context.inputs["checkpoint"])
    with Renderer(tokenizer) as renderer:
        asked, unreadable = questions(Tokens(folder, stage.split), Reader(tokenizer, renderer), stage.prompts, folder)
    _fits(asked, stage.max_new_tokens, context_tokens(model))
    drawn = _drawn(stage, asked, model, read_meta(folder), context.report)
    account: Counter[str] = Counter(drawn=0, kept=0, duplicates=0, empty=0)
    rows = [Sampled(f"{stage.split}-{one.index}", one.prompt, distinct(drawn[one.index], tokenizer, account), one.reference) for one in asked]
    tokenizer.save_pretrained(context.out / "tokenizer")
    how = {name: getattr(stage, name) for name in ("seed", "split", "temperature", "top_p", "max_new_tokens")}
    samples.write(context.out, rows, how | {"prompts": len(rows), "answers": stage.answers, "unreadable": unreadable} | dict(account))
    context.report.table("samples", ("prompt", "answer", "ended", "logprob"), list(_shown(rows)))
    return _figures(rows, account, unreadable)


def questions(tokens: Tokens, reader: Reader, count: int, folder: Path) -> tuple[list[Question], int]:
    """`count` prompts spread evenly over the split, or all where there are fewer; and how many cannot be read back into messages.

    Those are left out: a preference pair is a text that will be rendered again, and it has to give the very ids that were answered.
    """
    total = len(tokens)
    if not total:
        raise DataError(str(folder / tokens.split), "has no prompts", "choose the other split, or data with more rows")
    places = range(total) if count >= total else [place * total // count for place in range(count)]
    read = [(place, ids := tokens.example(place)[0].tolist(), reader.read(ids)) for place in places]
    found = [Question(place, ids, prompt, tokens.answers[place]) for place, ids, prompt in read if prompt is not None]
    if not found:
        raise DataError(str(folder / tokens.split), "no prompt can be read back into messages", "choose a tokenizer that decodes to the text it encoded")
    return found, len(read) - len(found)


def _fits(asked: Sequence[Question], new: int, room: int) -> None:
    longest = max(len(one.ids) for one in asked)
    if longest + new > room:
        raise RunError("max_new_tokens", f"{longest} prompt tokens + {new} new ones exceed the context of {room}", f"at most {room - longest}")


def batches(asked: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Prompts of like length together, the longest first, so that a batch that is too large fails at once."""
    ordered = sorted(asked, key=lambda one: (-len(one.ids), one.index))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _drawn(stage: Sample, asked: Sequence[Question], model: Any, meta: Meta, report: Report) -> dict[int, list[Drawn]]:
    """The answers to each question, by its place in the split."""
    stops = stop_tokens(model, meta["stop_token_ids"])
    drawn: dict[int, list[Drawn]] = {}
    for batch in batches(asked, max(1, stage.batch_size // stage.answers)):
        report.progress(len(drawn), len(asked), f"{len(drawn) * stage.answers:,} answers")
        found = rollout(
            model,
            [one.ids for one in batch],
            max_new_tokens=stage.max_new_tokens,
            temperature=stage.temperature,
            stop_ids=stops,
            pad_id=meta["eos_token_id"],
            noise=torch.cat([uniforms(seed_of(stage.seed, "sample", one.index), stage.answers, stage.max_new_tokens) for one in batch]),
            batch=stage.batch_size,
            answers=stage.answers,
            top_p=stage.top_p,
            own_logprobs=True,
        )
        rows = iter(unpadded(found))
        drawn.update({one.index: list(itertools.islice(rows, stage.answers)) for one in batch})
    return drawn


def unpadded(found: Answers) -> list[Drawn]:
    """The answers of `rollout`, row by row."""
    columns = (found.ids.tolist(), found.lengths.tolist(), found.ended.tolist(), found.logprobs.double().sum(1).tolist())
    return [Drawn(ids[:length], ended, logprob) for ids, length, ended, logprob in zip(*columns, strict=True)]


def distinct(drawn: Sequence[Drawn], tokenizer: Any, account: Counter[str]) -> tuple[Answer, ...]:
    """The answers that differ as text, in the order drawn; `account` counts the others."""
    found: dict[str, Answer] = {}
    for one in drawn:
        ids = one.ids[:-1] if one.ended else one.ids
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        fate = "empty" if not text.strip() else "duplicates" if text in found else "kept"
        account.update({"drawn": 1, fate: 1})
        if fate == "kept":
            found[text] = Answer(text, len(one.ids), one.ended, round(one.logprob, 4))
    return tuple(found.values())


def _shown(rows: Sequence[Sampled]) -> Iterator[tuple[str, str, bool, float]]:
    for one in rows[:SHOWN_PROMPTS]:
        prompt = "\n".join(str(message["content"]) for message in one.messages)
        yield from ((prompt, answer.text, answer.ended, answer.logprob) for answer in one.answers)


def _figures(rows: Sequence[Sampled], account: Counter[str], unreadable: int) -> dict[str, Any]:
    kept = [answer for one in rows for answer in one.answers]
    return {
        "prompts": len(rows),
        "answers": len(kept),
        "distinct_share": account["kept"] / account["drawn"],
        "ended_share": sum(one.ended for one in kept) / max(len(kept), 1),
        "mean_tokens": sum(one.tokens for one in kept) / max(len(kept), 1),
        "rankable_prompts": sum(len(one.answers) > 1 for one in rows),
        "unreadable_prompts": unreadable,
    }
