"""`stage=sample` as it runs: several answers to each prompt, drawn in batches with a KV cache, written as the `samples` artifact."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmforge.errors import DataError, RunError
from lmforge.formats import samples
from lmforge.formats.samples import Answer, Sampled
from lmforge.formats.tokens import Tokens, read_meta
from lmforge.inference.checkpoint import context_tokens, open_model, open_tokenizer
from lmforge.inference.generate import stop_ids
from lmforge.stage.readback import Reader
from lmforge.stage.sampling import Sample
from lmforge.step import Context
from lmforge.tokenizer.templates import Renderer

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
    stops = stop_tokens(tokenizer, model, folder)
    drawn: dict[int, list[Drawn]] = {}
    for batch in batches(asked, max(1, stage.batch_size // stage.answers)):
        context.report.progress(len(drawn), len(asked), f"{sum(map(len, drawn.values())):,} answers")
        noise = torch.stack([_noise(stage.seed, one.index, number, stage.max_new_tokens) for one in batch for number in range(stage.answers)])
        found = draw(model, [one.ids for one in batch], noise, answers=stage.answers, stops=stops, temperature=stage.temperature, top_p=stage.top_p)
        drawn.update({one.index: found[place * stage.answers : (place + 1) * stage.answers] for place, one in enumerate(batch)})
    account: Counter[str] = Counter(drawn=0, kept=0, duplicates=0, empty=0)
    rows = [Sampled(f"{stage.split}-{one.index}", one.prompt, distinct(drawn[one.index], tokenizer, stops, account), one.reference) for one in asked]
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


def stop_tokens(tokenizer: Any, model: Any, folder: Path) -> list[int]:
    """What ends an answer: what the tokens name (EOS, the template's end of a turn), and what the checkpoint does."""
    return sorted({*read_meta(folder)["stop_token_ids"], *stop_ids(model, tokenizer)})


def _fits(asked: Sequence[Question], new: int, room: int) -> None:
    longest = max(len(one.ids) for one in asked)
    if longest + new > room:
        raise RunError("max_new_tokens", f"{longest} prompt tokens + {new} new ones exceed the context of {room}", f"at most {room - longest}")


def batches(asked: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Prompts of like length together, the longest first, so that a batch that is too large fails at once."""
    ordered = sorted(asked, key=lambda one: (-len(one.ids), one.index))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _noise(seed: int, index: int, number: int, length: int) -> Tensor:
    """Uniform numbers [length] that belong to one answer."""
    digest = hashlib.sha256(f"{seed}:{index}:{number}".encode()).digest()
    return torch.rand(length, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8])))


@torch.inference_mode()
def draw(
    model: Any, prompts: Sequence[Sequence[int]], noise: Tensor, *, answers: int, stops: Sequence[int], temperature: float, top_p: float
) -> list[Drawn]:
    """`answers` draws for each prompt, in order; `noise` [prompts * answers, most tokens] decides them.

    A prompt is computed once for all its answers, and an answer that has ended leaves the batch.
    """
    from transformers import DynamicCache

    ids, seen = left_padded(prompts)
    ids, seen, noise = ids.to(model.device), seen.to(model.device), noise.to(model.device)
    cache = DynamicCache(config=model.config)
    position = seen.sum(1) - 1
    given = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    logits = model(input_ids=ids, **given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(answers)
    logits, seen, position = (one.repeat_interleave(answers, 0) for one in (logits, seen, position))
    alive, ends = torch.arange(len(noise), device=model.device), torch.tensor(stops, device=model.device)
    written, totals, ended = [[] for _ in noise], [0.0] * len(noise), [False] * len(noise)  # type: ignore[var-annotated]
    for step in range(noise.shape[1]):
        logprobs = logits.float().log_softmax(-1)
        token = nucleus(logprobs, noise[alive, step], temperature, top_p)
        over = torch.isin(token, ends)
        gained = logprobs.gather(1, token[:, None])[:, 0]
        for row, one, logprob, last in zip(alive.tolist(), token.tolist(), gained.tolist(), over.tolist(), strict=True):
            written[row].append(one)
            totals[row] += logprob
            ended[row] = last
        if over.all() or step + 1 == noise.shape[1]:
            break
        if over.any():
            kept = (~over).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            alive, token, seen, position = (one[kept] for one in (alive, token, seen, position))
        seen, position = torch.cat([seen, seen.new_ones(len(seen), 1)], 1), position + 1
        given = {"attention_mask": seen, "position_ids": position[:, None]}
        logits = model(input_ids=token[:, None], **given, past_key_values=cache, use_cache=True).logits[:, -1]
    return [Drawn(*one) for one in zip(written, ended, totals, strict=True)]


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (1 = real), both [rows, longest]: a batch whose last column is every row's last token."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, seen


def nucleus(logprobs: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Tokens [rows] by inverting the distribution function at `uniform` [rows], of the smallest set whose probability reaches `top_p` (Holtzman et al. 2020).

    `logprobs` is [rows, vocabulary]. Temperature comes first, as in transformers.
    """
    probabilities, order = (logprobs / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    kept[:, 0] = probabilities[:, 0]
    edges = kept.cumsum(-1)
    place = torch.searchsorted(edges, uniform[:, None].to(edges) * edges[:, -1:], right=True)
    return order.gather(1, place.minimum(kept.count_nonzero(-1)[:, None] - 1))[:, 0]


def distinct(drawn: Sequence[Drawn], tokenizer: Any, stops: Sequence[int], account: Counter[str]) -> tuple[Answer, ...]:
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
