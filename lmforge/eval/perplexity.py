"""Held-out perplexity over packed rows, exactly as in training: positions restart and attention stops at a document's border, EOS is a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.text import Perplexity

from lmforge.errors import CheckpointError, DataError
from lmforge.formats.packing import IGNORE, Row, bfd_rows, collate, stream_rows
from lmforge.formats.tokens import Tokens
from lmforge.inference import forward
from lmforge.inference.checkpoint import context_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Floats = NDArray[np.float64]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts a split. Standard errors are over documents, as a ratio estimator: tokens of one document are not independent."""

    perplexity: float
    perplexity_standard_error: float | None
    nats_per_token: float
    nats_per_token_standard_error: float | None  # None for a single document
    bits_per_byte: float
    tokens: int  # labels counted
    documents: int

    def plain(self) -> dict[str, float | None]:
        """JSON-able."""
        return asdict(self)


def choose_rows(tokens: Tokens, max_tokens: int | None) -> list[Row]:
    """The split's packed rows (text as a stream, chats by best fit), or as many as hold `max_tokens`, spread evenly. DataError where there are none."""
    pack = bfd_rows if tokens.meta["view"] == "chat" else stream_rows
    rows: Sequence[Row] = pack(tokens.offsets, tokens.meta["seq_len"])
    if not len(rows):
        raise DataError(str(tokens.folder / tokens.split), "holds no tokens to measure on", "raise the data's held-out share")
    wanted = len(rows) if max_tokens is None else min(len(rows), max(1, max_tokens // tokens.meta["seq_len"]))
    return [rows[int(index)] for index in np.linspace(0, len(rows) - 1, wanted).round()]


def check_fits(model: PreTrainedModel, tokens: Tokens, seq_len: int) -> None:
    """CheckpointError where the model has no row for an id, or no position for a token."""
    embedding: Any = model.get_input_embeddings()
    have, need = embedding.num_embeddings, tokens.meta["vocab_size"]
    if need > have:
        raise CheckpointError("checkpoint", f"has {have:,} token embeddings and the tokens need {need:,}", "tokenize with its tokenizer")
    have, need = context_tokens(model), seq_len
    if need > have:
        raise CheckpointError("checkpoint", f"has a context of {have:,} tokens and the rows have {need:,}", "tokenize with a shorter seq_len")


def perplexity(model: PreTrainedModel, tokens: Tokens, rows: Sequence[Row], *, batch_tokens: int, progress: Progress) -> Likelihood:
    """Measure `model` on `rows` of `tokens`, `batch_tokens` at a time; every supervised label within a document weighs the same.

    Under a soft prompt a row holds one document, for each is to read the prompt; one that does not fit beside it goes on in a row of its own.
    """
    rows, seq_len = _rows_for(model, rows, tokens)
    check_fits(model, tokens, seq_len)
    size = max(1, batch_tokens // seq_len)
    metric = Perplexity(ignore_index=IGNORE).to(model.device)
    metric.set_dtype(torch.float64)  # a float32 sum loses digits after some million tokens
    nats, counts = np.zeros(len(tokens)), np.zeros(len(tokens))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        arrays = collate(part, tokens, seq_len)
        losses = _losses(model, {name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()}, metric)
        _by_document(losses, arrays["labels"] != IGNORE, _documents(part, tokens, seq_len), nats, counts)
        progress(min(start + size, len(rows)), len(rows), "perplexity")
    return _likelihood(float(metric.compute()), nats, counts, tokens)


@torch.inference_mode()
def _losses(model: PreTrainedModel, batch: dict[str, torch.Tensor], metric: Perplexity) -> Floats:
    """Nats of every label of a batch, which the metric counts too. The logits are gone when the next batch runs."""
    logits = forward.logits(model, batch).float()
    metric.update(logits, batch["labels"])
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="none")
    found: Floats = losses.double().cpu().numpy()
    return found


def _rows_for(model: PreTrainedModel, rows: Sequence[Row], tokens: Tokens) -> tuple[Sequence[Row], int]:
    """The rows and their length as the model can read them."""
    seq_len: int = tokens.meta["seq_len"]
    if not forward.virtual_tokens(model):
        return rows, seq_len
    room = min(seq_len, context_tokens(model))
    pieces = [[(at, min(at + room, end))] for row in rows for start, end in row for at in range(start, end, room)]
    return pieces, max(end - start for row in pieces for start, end in row)


def _documents(rows: Sequence[Row], tokens: Tokens, seq_len: int) -> NDArray[np.int64]:
    """The document of every place of the packed rows, shape [rows, seq_len]; padding gets 0, and has no label to count."""
    found = np.zeros((len(rows), seq_len), np.int64)
    for index, row in enumerate(rows):
        at = 0
        for start, end in row:
            found[index, at : at + end - start] = np.searchsorted(tokens.offsets, start, side="right") - 1
            at += end - start
    return found


def _by_document(losses: Floats, counted: NDArray[np.bool_], documents: NDArray[np.int64], nats: Floats, counts: Floats) -> None:
    """Add each label's loss to its document's sum, in place."""
    which = documents[counted]
    np.add.at(nats, which, losses[counted.ravel()])
    np.add.at(counts, which, 1)


def _likelihood(value: float, nats: Floats, counts: Floats, tokens: Tokens) -> Likelihood:
    read = counts > 0
    nats, counts, documents = nats[read], counts[read], int(read.sum())
    if not documents:
        raise DataError(str(tokens.folder / tokens.split), "has no label to measure on", "raise the data's held-out share")
    mean = nats.sum() / counts.sum()
    # ratio estimator: the spread of each document's surplus over what the mean predicts for its length
    spread = math.sqrt(((nats - mean * counts) ** 2).sum() * documents / (documents - 1)) / counts.sum() if documents > 1 else None
    # The first token of a segment has no label; it is taken to cost the average, so that parts and wholes of a split compare.
    per_byte = mean / math.log(2) * tokens.meta["tokens"][tokens.split] / max(1, tokens.meta["bytes"][tokens.split])
    return Likelihood(
        perplexity=value,
        perplexity_standard_error=value * spread if spread is not None else None,
        nats_per_token=float(mean),
        nats_per_token_standard_error=spread,
        bits_per_byte=float(per_byte),
        tokens=int(counts.sum()),
        documents=documents,
    )
