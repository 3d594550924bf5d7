"""The baseline a language model has to beat: an interpolated bigram model (Jelinek & Mercer 1980), trained on the same tokens.

    P(w | v) = L[b(v)] * c(v, w) / c(v)  +  (1 - L[b(v)]) * (c(w) + 1) / (N + V)

b(v) is the number of binary digits of c(v): a context that was seen often is trusted more. The weights L are fitted by EM on every 20th training
document, with counts of the others; then all training documents are counted. Nothing held out is looked at before it is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmforge.formats.packing import IGNORE, Row, collate
from lmforge.formats.tokens import Tokens

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
BUCKETS = 64  # binary digits of an int64 count
TUNE_EVERY = 20
EM_ROUNDS = 50
MAX_TRAIN_TOKENS = 50_000_000  # sorting more than this needs more memory than a laptop has; `bigram_train_tokens` reports what was read


@dataclass(frozen=True)
class Counts:
    """Sparse bigram counts: the sorted keys v * V + w with their counts, and the counts of contexts and words."""

    vocab_size: int
    keys: Ids
    counts: Ids
    contexts: Ids
    words: Ids

    @classmethod
    def of(cls, context: Ids, word: Ids, vocab_size: int) -> Counts:
        keys, counts = np.unique(context * vocab_size + word, return_counts=True)
        return cls(vocab_size, keys, counts, np.bincount(context, minlength=vocab_size), np.bincount(word, minlength=vocab_size))

    def probabilities(self, context: Ids, word: Ids) -> tuple[Floats, Floats, Ids]:
        """(bigram, unigram, bucket) of each event: c(v,w)/c(v), add-one unigram, binary digits of c(v)."""
        key = context * self.vocab_size + word
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        seen = np.where(self.keys[at] == key, self.counts[at], 0)
        before = self.contexts[context]
        digits = np.frexp(before.astype(np.float64))[1].astype(np.int64)  # 0 for 0, 1 for 1, 2 for 2-3, 3 for 4-7
        return seen / np.maximum(before, 1), (self.words[word] + 1) / (self.words.sum() + self.vocab_size), digits


def fit_weights(counts: Counts, context: Ids, word: Ids) -> Floats:
    """The weight of the bigram in each bucket by EM on events that were not counted; 0 where the context is unseen.

    Each bucket holds one more event, half for each part, so that no weight is ever 1: an unseen bigram would then be impossible.
    """
    weights = np.full(BUCKETS + 1, 0.5)
    weights[0] = 0.0
    bigram, unigram, bucket = counts.probabilities(context, word)
    events = np.bincount(bucket, minlength=BUCKETS + 1)
    for _ in range(EM_ROUNDS):
        weight = weights[bucket]
        share = weight * bigram / (weight * bigram + (1 - weight) * unigram)
        summed = np.bincount(bucket, weights=share, minlength=BUCKETS + 1)
        weights = (summed + 0.5) / (events + 1)
        weights[0] = 0.0
    return weights


def mean_nats(counts: Counts, weights: Floats, context: Ids, word: Ids) -> float:
    """Cross entropy of the events, in nats an event."""
    bigram, unigram, bucket = counts.probabilities(context, word)
    weight = weights[bucket]
    return float(-np.log(weight * bigram + (1 - weight) * unigram).mean())


def training_events(tokens: Tokens) -> tuple[Ids, Ids, NDArray[np.bool_]]:
    """(context, word, is it in the tuning slice) of every token that follows another one in its document."""
    documents = int(np.searchsorted(tokens.offsets, MAX_TRAIN_TOKENS, side="right")) - 1 or 1
    ends = tokens.offsets[1 : documents + 1]
    ids = np.asarray(tokens.ids[: ends[-1]], np.int64)
    of = np.repeat(np.arange(documents), np.diff(tokens.offsets[: documents + 1]))
    within = of[1:] == of[:-1]
    return ids[:-1][within], ids[1:][within], (of[1:][within] % TUNE_EVERY) == TUNE_EVERY - 1


def row_events(tokens: Tokens, rows: Sequence[Row]) -> tuple[Ids, Ids]:
    """(context, word) of every label in packed rows: the very labels a model is measured on."""
    contexts, words = [], []
    for row in rows:
        batch = collate([row], tokens, tokens.meta["seq_len"])
        counted = batch["labels"] != IGNORE
        contexts.append(batch["input_ids"][counted])
        words.append(batch["labels"][counted])
    return np.concatenate(contexts), np.concatenate(words)


def bigram_perplexity(train: Tokens, heldout: Tokens, rows: Sequence[Row]) -> dict[str, float]:
    """The baseline's perplexity on the labels of `rows`, and how many training tokens it counted."""
    context, word, tune = training_events(train)
    if not tune.any():  # fewer documents than one slice: every 20th event instead
        tune = np.arange(len(word)) % TUNE_EVERY == TUNE_EVERY - 1
    vocab_size = train.meta["vocab_size"]
    weights = fit_weights(Counts.of(context[~tune], word[~tune], vocab_size), context[tune], word[tune])
    nats = mean_nats(Counts.of(context, word, vocab_size), weights, *row_events(heldout, rows))
    return {"bigram_perplexity": math.exp(nats), "bigram_train_tokens": len(word)}
